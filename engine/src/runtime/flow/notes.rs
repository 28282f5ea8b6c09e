//! What ranks tell each other in flow beside rows, partials, keys and values; and what of it came out of order.

use super::super::moving::MoveNews;
use super::super::outlet::News;
use super::super::sequence::Sampled;
use super::super::worker::Directive;
use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// One message of class ids.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Note {
    /// What rank 0 orders.
    Orders(Vec<Directive>),
    /// A sampled id, and which one of its sequence it is, from 0.
    Sampled(Sampled, u32),
    /// The sender holds the whole prompt of a sequence; told to its home.
    Holds(u32),
    /// To rank 0: what its driver is to know, from a rank of another process.
    News(Vec<News>),
    /// To rank 0: what the sender has done of a move of experts.
    Moved(MoveNews),
    /// The sender has stopped.
    Goodbye,
}

/// Sampled ids that came before their predecessors, and who holds which prompt.
#[derive(Debug)]
pub(crate) struct Notes {
    me: Rank,
    sampled: HashMap<u32, BTreeMap<u32, Sampled>>,
    /// Home: the ranks that a prompt has still to reach.
    lacking: HashMap<u32, BTreeSet<Rank>>,
    /// Elsewhere: the sequences whose home has not been told that their prompt is here.
    owed: HashSet<u32>,
}

impl Notes {
    pub(crate) fn new(me: Rank) -> Self {
        Self { me, sampled: HashMap::new(), lacking: HashMap::new(), owed: HashSet::new() }
    }

    /// A sequence begins, whose prompt must reach `ranks`.
    pub(crate) fn admit(&mut self, sequence: u32, home: Rank, ranks: &[Rank]) {
        if home == self.me {
            let others = ranks.iter().copied().filter(|rank| *rank != self.me);
            self.lacking.insert(sequence, others.collect());
        } else if ranks.contains(&self.me) {
            self.owed.insert(sequence);
        }
    }

    pub(crate) fn end(&mut self, sequence: u32) {
        self.sampled.remove(&sequence);
        self.lacking.remove(&sequence);
        self.owed.remove(&sequence);
    }

    /// The sequences whose homes have not been told that their prompt is here.
    pub(crate) fn owing(&self) -> Vec<u32> {
        self.owed.iter().copied().collect()
    }

    /// Whether this rank has still to tell a sequence's home that the prompt is here.
    pub(crate) fn owes(&self, sequence: u32) -> bool {
        self.owed.contains(&sequence)
    }

    pub(crate) fn acknowledged(&mut self, sequence: u32) {
        self.owed.remove(&sequence);
    }

    /// Home: a rank holds the prompt.
    pub(crate) fn holds(&mut self, sequence: u32, rank: Rank) {
        if let Some(lacking) = self.lacking.get_mut(&sequence) {
            lacking.remove(&rank);
        }
    }

    /// Whether tokens of a sequence may leave this rank for good: anywhere but at home they have already.
    pub(crate) fn is_coherent(&self, sequence: u32) -> bool {
        self.lacking.get(&sequence).is_none_or(BTreeSet::is_empty)
    }

    /// Keeps a sampled id until its predecessors are there.
    pub(crate) fn sampled(&mut self, sampled: Sampled, index: u32) {
        self.sampled.entry(sampled.sequence).or_default().insert(index, sampled);
    }

    /// The sampled id number `index` of a sequence, if it is there.
    pub(crate) fn next(&mut self, sequence: u32, index: u32) -> Option<Sampled> {
        self.sampled.get_mut(&sequence)?.remove(&index)
    }
}
