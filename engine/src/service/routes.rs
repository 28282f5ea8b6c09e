//! Where requests' tokens went: the path of each, and counts of which expert followed which.

use crate::generate::Hop;
use exflow_placement::{Affinity, Rank, RoutingTrace};
use std::collections::{BTreeMap, HashMap};

/// Routes of the requests that run, and those that are not counted yet.
pub(super) struct Routes {
    layers: usize,
    experts: usize,
    open: HashMap<u32, Sequence>,
    trace: RoutingTrace,
    count_at: usize,
}

/// Routes of one request, by position.
struct Sequence {
    /// The position that the next token is sampled from.
    next: u32,
    hops: BTreeMap<u32, Vec<Hop>>,
}

/// Tokens whose routes are kept before they are counted, at most: counting takes time for a large model.
pub(super) const COUNT_AT: usize = 4096;

impl Routes {
    /// Routes are counted when there are those of `count_at` tokens.
    pub(super) fn new(layers: usize, top_k: usize, experts: usize, count_at: usize) -> Self {
        Self { layers, experts, open: HashMap::new(), trace: RoutingTrace::new(layers, top_k), count_at }
    }

    pub(super) fn open(&mut self, sequence: u32, prompt: usize) {
        let next = prompt.saturating_sub(1) as u32;
        self.open.insert(sequence, Sequence { next, hops: BTreeMap::new() });
    }

    pub(super) fn add(
        &mut self,
        rank: Rank,
        sequence: u32,
        position: u32,
        layer: u16,
        experts: Vec<u32>,
        weights: Vec<f32>,
    ) {
        if let Some(open) = self.open.get_mut(&sequence) {
            let hop = Hop { layer: usize::from(layer), rank, experts, weights };
            let hops = open.hops.entry(position).or_default();
            hops.retain(|earlier| earlier.layer != hop.layer); // a request that was preempted is replayed
            hops.push(hop);
        }
    }

    /// The way of the position that the newest token was sampled from, in order of the layers.
    pub(super) fn path_of_token(&self, sequence: u32) -> Vec<Hop> {
        let hops = self.open.get(&sequence).and_then(|open| open.hops.get(&open.next));
        let mut hops = hops.cloned().unwrap_or_default();
        hops.sort_by_key(|hop| hop.layer);
        hops
    }

    /// The newest token was told; the next one comes from the position after it.
    pub(super) fn step(&mut self, sequence: u32) {
        if let Some(open) = self.open.get_mut(&sequence) {
            open.next += 1;
        }
    }

    /// A request is over: its routes are counted, now or together with later ones. Returns what was counted.
    pub(super) fn close(&mut self, sequence: u32, last: bool) -> Option<Affinity> {
        if let Some(open) = self.open.remove(&sequence) {
            let mut expected = None;
            for (position, mut hops) in open.hops {
                hops.sort_by_key(|hop| hop.layer);
                let whole = hops.len() == self.layers;
                if expected != Some(position) || !whole {
                    self.trace.mark_break();
                }
                if whole {
                    let ids: Vec<i32> =
                        hops.iter().flat_map(|h| h.experts.iter().map(|&e| e as i32)).collect();
                    self.trace.push_token(&ids);
                    expected = Some(position + 1);
                }
            }
            self.trace.mark_break();
        }
        if self.trace.tokens() < self.count_at && !(last && self.trace.tokens() > 0) {
            return None;
        }
        let empty = RoutingTrace::new(self.layers, self.trace.k());
        let trace = std::mem::replace(&mut self.trace, empty);
        let counted = Affinity::from_trace(&trace, self.experts);
        counted.map_err(|error| tracing::warn!(%error, "routes that cannot be counted")).ok()
    }
}
