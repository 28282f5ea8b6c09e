//! Context coherence: keys and values that were made on other ranks, on their way into this rank's cache, and the
//! watermark per (sequence, layer) up to which a context is complete.

use super::sequence::BLOCK;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Keys and values of one position at one layer, waiting to be written into the cache.
pub(crate) struct Arrived {
    pub(crate) sequence: u32,
    pub(crate) position: u32,
    /// What the cache holds of it.
    pub(crate) values: Vec<f32>,
}

/// What this rank's cache holds of every running sequence.
#[derive(Default)]
pub(crate) struct Coherence {
    marks: HashMap<(u32, u16), Watermark>,
    waiting: BTreeMap<u16, Vec<Arrived>>,
    /// In rounds: what came before the order that makes room for it.
    early: Vec<(u16, Arrived)>,
}

/// Positions `0..complete` are there; `ahead` holds those beyond a gap.
#[derive(Default)]
struct Watermark {
    complete: u32,
    ahead: BTreeSet<u32>,
}

impl Watermark {
    fn add(&mut self, position: u32) {
        if position >= self.complete {
            self.ahead.insert(position);
        }
        while self.ahead.remove(&self.complete) {
            self.complete += 1;
        }
    }
}

impl Coherence {
    /// Takes in what a peer made; it counts as there, as it is written before the next attention of its layer.
    pub(crate) fn receive(&mut self, layer: u16, arrived: Arrived) {
        self.note(layer, arrived.sequence, arrived.position);
        self.waiting.entry(layer).or_default().push(arrived);
    }

    /// Keeps what there is no room for yet; false where `most` are kept already.
    pub(crate) fn keep(&mut self, layer: u16, arrived: Arrived, most: usize) -> bool {
        let fits = self.early.len() < most;
        if fits {
            self.early.push((layer, arrived));
        }
        fits
    }

    /// What was kept, to be looked at again.
    pub(crate) fn take_early(&mut self) -> Vec<(u16, Arrived)> {
        std::mem::take(&mut self.early)
    }

    /// Takes note of a position that this rank made itself.
    pub(crate) fn note(&mut self, layer: u16, sequence: u32, position: u32) {
        self.marks.entry((sequence, layer)).or_default().add(position);
    }

    /// Whether everything before `position` is there.
    pub(crate) fn is_complete(&self, layer: u16, sequence: u32, position: u32) -> bool {
        position == 0 || self.marks.get(&(sequence, layer)).is_some_and(|mark| mark.complete >= position)
    }

    /// Positions from the first on that are all there.
    pub(crate) fn complete(&self, layer: u16, sequence: u32) -> u32 {
        self.marks.get(&(sequence, layer)).map_or(0, |mark| mark.complete)
    }

    /// What waits to be written for a layer.
    pub(crate) fn take(&mut self, layer: u16) -> Vec<Arrived> {
        self.waiting.remove(&layer).unwrap_or_default()
    }

    /// Forgets a sequence that ended: its blocks may belong to another one now.
    pub(crate) fn forget(&mut self, sequence: u32) {
        self.marks.retain(|(id, _), _| *id != sequence);
        self.waiting.values_mut().for_each(|list| list.retain(|arrived| arrived.sequence != sequence));
        self.early.retain(|(_, arrived)| arrived.sequence != sequence);
    }
}

/// Blocks in a row of the block table, for contexts of up to `positions`.
pub(crate) fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(BLOCK).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_complete_only_without_gaps() {
        let mut coherence = Coherence::default();
        assert!(coherence.is_complete(0, 7, 0), "nothing is needed at the start");
        for position in [0, 2, 3] {
            coherence.receive(0, Arrived { sequence: 7, position, values: vec![] });
        }
        assert!(coherence.is_complete(0, 7, 1) && !coherence.is_complete(0, 7, 2));
        coherence.note(0, 7, 1);
        assert!(coherence.is_complete(0, 7, 4) && !coherence.is_complete(1, 7, 4));
        coherence.forget(7);
        assert!(!coherence.is_complete(0, 7, 1) && coherence.take(0).is_empty());
    }

    #[test]
    fn what_comes_early_is_kept_up_to_a_bound() {
        let arrived = |sequence| Arrived { sequence, position: 0, values: Vec::new() };
        let mut coherence = Coherence::default();
        assert!(coherence.keep(0, arrived(1), 2) && coherence.keep(1, arrived(2), 2));
        assert!(!coherence.keep(0, arrived(3), 2), "two are kept");
        coherence.forget(1);
        assert!(coherence.keep(0, arrived(3), 2));
        let kept: Vec<_> = coherence.take_early().iter().map(|(layer, a)| (*layer, a.sequence)).collect();
        assert_eq!(kept, [(1, 2), (0, 3)]);
        assert!(coherence.take_early().is_empty());
    }
}
