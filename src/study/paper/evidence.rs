//! What the checks on routes work with: counts to solve on, counts that were kept back, and the table solved on the first.

use super::RoutingHistory;
use crate::study::Gathered;
use exflow_placement::{
    Affinity, Balance, PlacementTable, RoutingTrace, Score, SolveError, SolveOptions, Topology,
    score_affinity, solve,
};
use std::time::Duration;

/// Tokens of a trace go in blocks of so many, in turn, to the profile and to what is kept back.
const BLOCK: usize = 256;

/// How the checks are made.
#[derive(Debug, Clone, Copy)]
pub struct StudyOptions {
    /// R.
    pub ranks: usize,
    /// Time for each solve.
    pub time_limit: Duration,
    /// Seed of solver, splits and shuffles.
    pub seed: u64,
}

impl StudyOptions {
    /// For a solve with each expert once, and layers spread evenly.
    pub(super) fn solving(&self) -> SolveOptions {
        SolveOptions {
            seed: self.seed,
            time_limit: self.time_limit,
            replicas: false,
            ..SolveOptions::default()
        }
    }
}

/// Routes, split, and a table.
#[derive(Debug)]
pub struct Evidence<'e> {
    pub(super) options: StudyOptions,
    /// All counts.
    pub(super) whole: Affinity,
    /// Counts that are solved on.
    pub(super) profile: Affinity,
    /// Counts that are scored on.
    pub(super) unseen: Affinity,
    /// Routes that are replayed, none of them in `profile`; where there is a trace.
    pub(super) replayed: Option<RoutingTrace>,
    /// Traces of other texts.
    pub(super) others: &'e [(String, RoutingTrace)],
    /// Solved on `profile` for equal ranks.
    pub(super) table: PlacementTable,
}

impl<'e> Evidence<'e> {
    /// The first trace, or else the affinity, or else the last checkpoint of the history; none where nothing is there.
    pub(super) fn new(
        found: &'e Gathered,
        history: Option<&RoutingHistory>,
        options: &StudyOptions,
    ) -> Result<Option<Self>, SolveError> {
        let counts = found.affinity.as_ref().or_else(|| history.and_then(|h| h.counts.last()));
        let Some(whole) = counts.cloned() else { return Ok(None) };
        let trace = found.traces.first().filter(|(_, trace)| trace.tokens() >= 4 * BLOCK);
        let (profile, unseen, replayed) = match trace {
            Some((_, trace)) => {
                let [first, second] = dealt(trace);
                let counts = |trace: &RoutingTrace| Affinity::from_trace(trace, whole.experts);
                (counts(&first)?, counts(&second)?, Some(second))
            }
            None => {
                let (first, second) = whole.split(0.5, options.seed);
                (first, second, None)
            }
        };
        let others = found.traces.get(1..).unwrap_or_default();
        let table = solve(&profile, &Topology::uniform(options.ranks), &options.solving(), &mut |_| ())?;
        let options = *options;
        Ok(Some(Self { options, whole, profile, unseen, replayed, others, table }))
    }

    /// Equal ranks with equal links.
    pub(super) fn topology(&self) -> Topology {
        Topology::uniform(self.options.ranks)
    }

    pub(super) fn round_robin(&self, ranks: usize) -> PlacementTable {
        PlacementTable::round_robin(self.profile.layers, self.profile.experts, ranks)
    }

    /// A table for a topology, solved on `on`.
    pub(super) fn solved(&self, on: &Affinity, topology: &Topology) -> Result<PlacementTable, SolveError> {
        solve(on, topology, &self.options.solving(), &mut |_| ())
    }

    /// A table for a topology in which layers may be left off ranks, solved on the profile.
    pub(super) fn in_total(&self, topology: &Topology) -> Result<PlacementTable, SolveError> {
        let options = SolveOptions { balance: Balance::Total, ..self.options.solving() };
        solve(&self.profile, topology, &options, &mut |_| ())
    }

    /// On the tokens that were kept back.
    pub(super) fn score(&self, table: &PlacementTable) -> Score {
        score_affinity(table, &self.unseen, &Topology::uniform(table.ranks))
    }
}

/// Blocks of a trace in turn, so that both parts hold of every text.
fn dealt(trace: &RoutingTrace) -> [RoutingTrace; 2] {
    let mut parts =
        [RoutingTrace::new(trace.layers(), trace.k()), RoutingTrace::new(trace.layers(), trace.k())];
    for token in 0..trace.tokens() {
        let part = &mut parts[token / BLOCK % 2];
        if token % BLOCK == 0 || !trace.follows(token) {
            part.mark_break();
        }
        let ids: Vec<i32> =
            (0..trace.layers()).flat_map(|layer| trace.chosen(token, layer).to_vec()).collect();
        part.push_token(&ids);
    }
    parts
}
