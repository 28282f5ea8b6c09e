//! Contexts that follow experts: who is new in the domain of a layer gets the keys and values of the sequences that run,
//! from the cache of one who was in it before.
//!
//! From the order to load on everybody sends what it makes to the domains of both tables. What was made before, or by
//! who had not heard the order yet, reaches the old domain, and its first member passes it on: every position that it
//! has or gets, up to those that went by the new table, which only those have made who had heard. The watermark keeps
//! tokens from attending before all is there, so that none of this has to be exact, but complete.

use super::super::bounds;
use super::super::step::Bulk;
use super::super::worker::Worker;
use crate::EngineError;
use crate::options::Prefill;
use exflow_placement::{LayerId, PlacementTable, Rank, Strategy};
use std::time::{Duration, Instant};

/// Positions that are read from the device at once, of all sequences and layers together.
const SLICE: u32 = 64;
/// What that may take between two steps, but for the slice that goes beyond.
const BUDGET: Duration = Duration::from_millis(2);
/// Tokens at the end of a text that are not waited for: they are on their way.
const ON_THEIR_WAY: usize = 2;

/// A context of one layer that this rank passes on.
#[derive(Debug)]
pub(super) struct Debt {
    sequence: u32,
    layer: usize,
    to: Rank,
    /// The next position.
    next: u32,
    /// Where it ends, once that is known.
    end: Option<u32>,
}

impl Worker {
    /// Takes note of the contexts that this rank is to pass on, and to get, where `table` is to be the next one.
    pub(super) fn owe_contexts(&mut self, table: &PlacementTable) {
        (self.moving.debts, self.moving.awaited) = (Vec::new(), Vec::new());
        if self.options.strategy != Strategy::Coherent {
            return; // no token leaves its home, which has all of its context
        }
        let (me, groups) = (self.comm.rank(), &self.options.groups);
        for (&sequence, running) in &self.sequences.running {
            let (home, prompt) = (running.start.home, running.start.prompt.len() as u32);
            let replicated = self.options.prefill == Prefill::Replicated;
            for layer in 0..self.decoder.spec.layers {
                let before = self.decoder.spec.moe_before(layer).map(LayerId::from);
                let there = bounds::domain(groups, self.tables.now(), before, home);
                let new = bounds::domain(groups, table, before, home);
                for to in new.into_iter().filter(|to| !there.contains(to)) {
                    let next = if replicated { prompt } else { 0 };
                    if to == me {
                        self.moving.awaited.push((sequence, layer));
                    } else if there.first() == Some(&me) {
                        self.moving.debts.push(Debt { sequence, layer, to, next, end: None });
                    }
                }
            }
        }
    }

    /// Whether the contexts are here that this rank needs to serve tokens of the next table, but for their ends.
    pub(super) fn has_contexts(&mut self) -> bool {
        let (sequences, coherence) = (&self.sequences, &self.coherence);
        self.moving.awaited.retain(|&(id, layer)| {
            sequences.running.get(&id).is_some_and(|sequence| {
                let needed = sequence.tokens().saturating_sub(ON_THEIR_WAY) as u32;
                !coherence.is_complete(layer as u16, id, needed)
            })
        });
        self.moving.awaited.is_empty()
    }

    /// Nothing before these positions, by sequence, was made by who had not heard of the new table.
    pub(super) fn end_debts(&mut self, ends: &[(u32, u32)]) {
        let end = |id| ends.iter().find(|(sequence, _)| *sequence == id).map(|(_, end)| *end);
        self.moving.debts.iter_mut().for_each(|debt| debt.end = end(debt.sequence).or(Some(0)));
    }

    /// Passes a part of what is owed on.
    pub(super) fn pass_on(&mut self) -> Result<(), EngineError> {
        let began = Instant::now();
        while !self.moving.debts.is_empty() && self.pass_a_slice()? && began.elapsed() < BUDGET {}
        Ok(())
    }

    /// Whether there was anything.
    fn pass_a_slice(&mut self) -> Result<bool, EngineError> {
        let mut debts = std::mem::take(&mut self.moving.debts);
        debts.retain(|debt| {
            self.sequences.running.contains_key(&debt.sequence) && debt.end.is_none_or(|end| debt.next < end)
        });
        let mut bulk = Bulk::new(self.comm.world_size());
        let mut left = SLICE;
        for debt in &mut debts {
            let there = self.coherence.complete(debt.layer as u16, debt.sequence);
            let end = there.min(debt.end.unwrap_or(u32::MAX)).min(debt.next.saturating_add(left));
            if end > debt.next {
                let positions = debt.next..end;
                let words = self.stepper().read_context(debt.layer, debt.sequence, positions.clone())?;
                for (position, words) in positions.zip(&words) {
                    bulk.add(debt.to, (debt.layer as u16, debt.sequence, position), words);
                }
                left -= end - debt.next;
                debt.next = end;
            }
        }
        bulk.send(self.comm.as_mut())?;
        // Others take their turn first next time.
        let half = debts.len() / 2;
        debts.rotate_left(half);
        self.moving.debts = debts;
        Ok(left < SLICE)
    }
}
