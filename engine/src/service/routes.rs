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
#[derive(Default)]
struct Sequence {
    /// The position that the next token is sampled from.
    next: u32,
    /// The first position that is not in the trace yet.
    open: u32,
    hops: BTreeMap<u32, Vec<Hop>>,
}

impl Sequence {
    /// The route of a position whose hops are all there, `[layers, k]`; what is kept of it is given up.
    fn take(&mut self, position: u32, layers: usize) -> Option<Vec<i32>> {
        let mut hops = self.hops.remove(&position).filter(|hops| hops.len() == layers)?;
        hops.sort_by_key(|hop| hop.layer);
        Some(hops.iter().flat_map(|hop| hop.experts.iter().map(|&expert| expert as i32)).collect())
    }
}

/// Tokens whose routes are kept before they are counted, at most: counting takes time for a large model.
pub(super) const COUNT_AT: usize = 4096;
/// Of a request that runs on, routes of so many tokens are taken together: what lies between the last of these and the
/// first of the next is not counted.
const PIECE: u32 = 64;
/// The newest tokens of a request that runs are left out: hops that other processes tell come later than the tokens.
const LATE: u32 = 16;

impl Routes {
    /// Routes are counted when there are those of `count_at` tokens.
    pub(super) fn new(layers: usize, top_k: usize, experts: usize, count_at: usize) -> Self {
        Self { layers, experts, open: HashMap::new(), trace: RoutingTrace::new(layers, top_k), count_at }
    }

    pub(super) fn open(&mut self, sequence: u32, prompt: usize) {
        let next = prompt.saturating_sub(1) as u32;
        self.open.insert(sequence, Sequence { next, open: 0, hops: BTreeMap::new() });
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
        // A request that was preempted is replayed: what was counted is not counted again.
        if let Some(open) = self.open.get_mut(&sequence).filter(|open| position >= open.open) {
            let hop = Hop { layer: usize::from(layer), rank, experts, weights };
            let hops = open.hops.entry(position).or_default();
            hops.retain(|earlier| earlier.layer != hop.layer);
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

    /// The newest token was told; the next one comes from the position after it. Returns what was counted, where there was
    /// enough.
    pub(super) fn step(&mut self, sequence: u32) -> Option<Affinity> {
        let open = self.open.get_mut(&sequence)?;
        open.next += 1;
        let end = open.next.saturating_sub(LATE);
        if end.saturating_sub(open.open) < PIECE {
            return None;
        }
        let mut routes = std::mem::take(open);
        self.trace_to(&mut routes, end);
        self.open.insert(sequence, routes);
        self.count(false)
    }

    /// A request is over: its routes are counted, now or together with later ones; `last`: none runs any more. Returns what
    /// was counted.
    pub(super) fn close(&mut self, sequence: u32, last: bool) -> Option<Affinity> {
        if let Some(mut routes) = self.open.remove(&sequence) {
            self.trace_to(&mut routes, u32::MAX);
        }
        self.count(last)
    }

    /// Moves a request's routes before position `end` to the trace.
    fn trace_to(&mut self, routes: &mut Sequence, end: u32) {
        let mut expected = None;
        let positions: Vec<u32> = routes.hops.range(..end).map(|(&position, _)| position).collect();
        for position in positions {
            let route = routes.take(position, self.layers);
            if expected != Some(position) || route.is_none() {
                self.trace.mark_break();
            }
            if let Some(ids) = route {
                self.trace.push_token(&ids);
                expected = Some(position + 1);
            }
        }
        self.trace.mark_break();
        routes.open = end;
    }

    fn count(&mut self, last: bool) -> Option<Affinity> {
        if self.trace.tokens() < self.count_at && !(last && self.trace.tokens() > 0) {
            return None;
        }
        let empty = RoutingTrace::new(self.layers, self.trace.k());
        let trace = std::mem::replace(&mut self.trace, empty);
        let counted = Affinity::from_trace(&trace, self.experts);
        counted.map_err(|error| tracing::warn!(%error, "routes that cannot be counted")).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: u16 = 3;
    const EXPERTS: u32 = 8;

    /// All hops of a position, of no particular order.
    fn hops(routes: &mut Routes, sequence: u32, position: u32) {
        for layer in (0..LAYERS).rev() {
            let expert = (position * 5 + u32::from(layer) * 3) % EXPERTS;
            routes.add(Rank(0), sequence, position, layer, vec![expert], vec![1.0]);
        }
    }

    fn routes(count_at: usize) -> Routes {
        Routes::new(LAYERS.into(), 1, EXPERTS as usize, count_at)
    }

    #[test]
    fn a_request_that_runs_on_is_counted_while_it_runs() {
        let (prompt, told) = (30, 400);
        let mut all = routes(100);
        all.open(7, prompt as usize);
        let mut counted = Vec::new();
        (0..prompt).for_each(|position| hops(&mut all, 7, position));
        for token in 0..told {
            counted.extend(all.step(7));
            hops(&mut all, 7, prompt + token);
        }
        let while_it_ran: f64 = counted.iter().map(Affinity::tokens).sum();
        assert!(counted.len() >= 3 && while_it_ran >= 300.0, "{} counts of {while_it_ran}", counted.len());
        // A replay of all of it changes nothing, and no position is left out.
        (0..prompt + told).for_each(|position| hops(&mut all, 7, position));
        counted.extend(all.close(7, true));
        let mut sum = Affinity::zeros(LAYERS.into(), EXPERTS as usize);
        counted.iter().for_each(|counts| sum.merge(counts, 1.0).expect("the same shape"));
        assert_eq!(sum.tokens(), f64::from(prompt + told));
        let wraps: f64 = sum.wrap.expect("tokens that follow each other").iter().sum();
        assert!(wraps >= f64::from(prompt + told) * 0.98, "{wraps}");
    }

    #[test]
    fn hops_that_come_late_are_waited_for() {
        let mut all = routes(1);
        all.open(0, 1);
        let mut counted = 0.0;
        for token in 0..200u32 {
            counted += all.step(0).map_or(0.0, |counts| counts.tokens());
            if let Some(late) = token.checked_sub(LATE / 2) {
                hops(&mut all, 0, late);
            }
        }
        assert!(counted >= 128.0 && counted % f64::from(PIECE) == 0.0, "{counted}");
    }

    #[test]
    fn what_is_not_whole_is_left_out() {
        let mut all = routes(1);
        all.open(0, 4);
        [0, 1, 3].into_iter().for_each(|position| hops(&mut all, 0, position));
        all.add(Rank(1), 0, 2, 1, vec![4], vec![1.0]);
        let counts = all.close(0, true).expect("counts");
        assert_eq!((counts.tokens(), counts.wrap.map(|wrap| wrap.iter().sum())), (3.0, Some(1.0)));
    }
}
