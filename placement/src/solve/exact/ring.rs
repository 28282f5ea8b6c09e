//! The chain closed to a ring by the wrap.
//!
//! With the wrap's far end left free, `past + ahead` bounds every ring through a state from below. That leaves few states
//! of each layer open for a ring cheaper than the best one known, and fewest in some layer: rings are searched through
//! each open state of that layer, forwards around the ring, among open states alone.

use super::Exact;
use super::chain::{Chain, Direction, sum};
use crate::cost::Edge;
use crate::solve::state::State;
use crate::solve::sweep::Sweeper;

/// First states whose ring is looked for in a hurry, to have a good one before any is searched in full.
const HURRIED: usize = 3;
/// States of a layer that such a search keeps.
const WIDTH: usize = 24;

/// Costs below the best ring's by less than this share are rounding.
const ROUNDING: f64 = 1e-12;

/// A state on the way along a ring: how it was reached, and for what.
struct Reached {
    state: usize,
    cost: f64,
    from: usize,
}

/// Where rings cheaper than some limit can pass.
struct Open {
    /// `[L][orbits]`: least cost from any beginning to a state of this layer, its own not included.
    past: Vec<Vec<f64>>,
    /// `[L]` the states.
    states: Vec<Vec<u32>>,
}

/// The ring seen from the layer whose states are gone through one by one.
struct Rooted<'o> {
    layer: usize,
    open: &'o Open,
    /// `[L][orbits]`, counted from that layer: least cost from any of its states to a state, its own not included.
    past: Vec<Vec<f64>>,
}

/// One ring problem.
struct Ring<'c, 'p> {
    chain: &'c Chain<'p>,
    wrap: &'c Edge,
}

/// The cheapest ring, `known` `[L, E]` or cheaper; `order` has the first layer's orbits, most promising first. None where
/// time ran out before anything was proven.
pub(super) fn solve(
    chain: &Chain<'_>,
    wrap: &Edge,
    order: &[usize],
    known: &[u16],
    stop: &dyn Fn() -> bool,
) -> Option<Exact> {
    let ring = Ring { chain, wrap };
    let (mut best, mut cost) = (None, chain.problem.cost(known));
    let mut keep = |holders: Vec<u16>, cost: &mut f64| {
        let found = chain.problem.cost(&holders);
        if found < *cost {
            (best, *cost) = (Some(holders), found);
        }
    };
    let mut sweeper = Sweeper::new(chain.problem);
    for &orbit in order.iter().take(HURRIED) {
        if chain.ahead[0][orbit] < cost && !stop() {
            let Some(way) = ring.hurried(chain.states.representative(orbit)) else { continue };
            let mut state = State::new(chain.problem, way);
            sweeper.settle(&mut state);
            keep(state.holders, &mut cost);
        }
    }
    let below = |cost: f64| cost * (1.0 - ROUNDING);
    let first = chain.ahead[0][order[0]];
    let Some(open) = ring.open(below(cost), stop) else {
        return Some(Exact { bound: first.min(cost), holders: best });
    };
    let (root, orbits) = ring.narrowest(&open);
    let bound = orbits.first().map_or(cost, |(_, bound)| bound.min(cost));
    let Some(past) = ring.past_from(root, &open, stop) else { return Some(Exact { bound, holders: best }) };
    let from = Rooted { layer: root, open: &open, past };
    for (orbit, free) in orbits {
        // Rings from here on are bounded by `free`, which only rises.
        if free >= below(cost) {
            break;
        }
        match ring.through(&from, chain.states.representative(orbit), below(cost), stop) {
            None => return Some(Exact { bound: free, holders: best }),
            Some(None) => {}
            Some(Some(holders)) => keep(holders, &mut cost),
        }
    }
    Some(Exact { bound: cost, holders: best })
}

impl<'c> Ring<'c, '_> {
    fn layers(&self) -> usize {
        self.chain.problem.layers
    }

    /// The edge from a layer to the next around the ring.
    fn edge(&self, layer: usize) -> Option<&'c Edge> {
        if layer + 1 < self.layers() { self.chain.edge(layer) } else { Some(self.wrap) }
    }

    /// States through which a ring below `limit` may pass, its two ends left unjoined.
    fn open(&self, limit: f64, stop: &dyn Fn() -> bool) -> Option<Open> {
        let chain = self.chain;
        let mut past = vec![vec![0.0; chain.states.orbits()]];
        for layer in 0..self.layers() {
            let closed = |(past, ahead): (&mut f64, &f64)| {
                if *past + ahead >= limit {
                    *past = f64::INFINITY;
                }
            };
            past[layer].iter_mut().zip(&chain.ahead[layer]).for_each(closed);
            if layer + 1 < self.layers() {
                let here = sum(&past[layer], &chain.own[layer]);
                past.push(chain.least(chain.edge(layer), &here, Direction::Forth, None, stop)?);
            }
        }
        let of_layer = |past: &Vec<f64>| {
            let states = 0..chain.states.len() as u32;
            states.filter(|&state| past[chain.states.orbit(state as usize)].is_finite()).collect()
        };
        let states = past.iter().map(of_layer).collect();
        Some(Open { past, states })
    }

    /// The layer with fewest open orbits, and these with what bounds the rings through them, rising.
    fn narrowest(&self, open: &Open) -> (usize, Vec<(usize, f64)>) {
        let finite = |layer: &usize| open.past[*layer].iter().filter(|past| past.is_finite()).count();
        let root = (0..self.layers()).min_by_key(finite).unwrap_or(0);
        let bounds = open.past[root].iter().zip(&self.chain.ahead[root]).map(|(past, ahead)| past + ahead);
        let mut orbits: Vec<(usize, f64)> =
            bounds.enumerate().filter(|(_, bound)| bound.is_finite()).collect();
        orbits.sort_by(|a, b| a.1.total_cmp(&b.1));
        (root, orbits)
    }

    /// `past` of the ring seen from layer `root`; infinite for what is not open.
    fn past_from(&self, root: usize, open: &Open, stop: &dyn Fn() -> bool) -> Option<Vec<Vec<f64>>> {
        let chain = self.chain;
        let zero = |past: &f64| if past.is_finite() { 0.0 } else { f64::INFINITY };
        let mut past: Vec<Vec<f64>> = vec![open.past[root].iter().map(zero).collect()];
        for at in 1..self.layers() {
            let (before, layer) = ((root + at - 1) % self.layers(), (root + at) % self.layers());
            let here = sum(&past[at - 1], &chain.own[before]);
            let states = Some(&open.states[layer][..]);
            past.push(chain.least(self.edge(before), &here, Direction::Forth, states, stop)?);
        }
        Some(past)
    }

    /// The cheapest ring through state `first` of the root layer that costs less than `limit`: none where time ran out,
    /// some none where there is no such ring.
    fn through(
        &self,
        from: &Rooted<'_>,
        first: usize,
        limit: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<Option<Vec<u16>>> {
        let (root, open) = (from.layer, from.open);
        let ahead = self.back_from(from, first, limit, stop)?;
        if ahead[0][self.chain.states.orbit(first)] >= limit {
            return Some(None);
        }
        let mut ways = vec![vec![Reached { state: first, cost: 0.0, from: 0 }]];
        for at in 1..self.layers() {
            let (before, layer) = ((root + at - 1) % self.layers(), (root + at) % self.layers());
            let ahead = |state: u32| ahead[at][self.chain.states.orbit(state as usize)];
            let reachable = |state: &u32| ahead(*state) < limit;
            let targets: Vec<u32> = open.states[layer].iter().copied().filter(reachable).collect();
            let mut next = self.step(before, ways.last()?, Some(&targets));
            next.retain(|way| way.cost + ahead(way.state as u32) < limit);
            if next.is_empty() {
                return Some(None);
            }
            if stop() {
                return None;
            }
            ways.push(next);
        }
        let (holders, cost) = self.closed(root, first, &ways)?;
        Some((cost < limit).then_some(holders))
    }

    /// A cheap ring through state `first` of the first layer: of each layer only the most promising states are kept.
    fn hurried(&self, first: usize) -> Option<Vec<u16>> {
        let mut ways = vec![vec![Reached { state: first, cost: 0.0, from: 0 }]];
        for layer in 0..self.layers() - 1 {
            let mut next = self.step(layer, ways.last()?, None);
            let ahead = &self.chain.ahead[layer + 1];
            let whole = |way: &Reached| way.cost + ahead[self.chain.states.orbit(way.state)];
            if next.len() > WIDTH {
                next.select_nth_unstable_by(WIDTH - 1, |a, b| whole(a).total_cmp(&whole(b)));
                next.truncate(WIDTH);
            }
            ways.push(next);
        }
        self.closed(0, first, &ways).map(|(holders, _)| holders)
    }

    /// `[L + 1][orbits]`, counted from `root` around the ring: least cost from a state to the end, its own included,
    /// where the end is in the orbit of `first`; infinite where no ring below `limit` passes.
    fn back_from(
        &self,
        from: &Rooted<'_>,
        first: usize,
        limit: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<Vec<Vec<f64>>> {
        let chain = self.chain;
        let mut end = vec![f64::INFINITY; chain.states.orbits()];
        end[chain.states.orbit(first)] = 0.0;
        let mut ahead = vec![end];
        for at in (0..self.layers()).rev() {
            let layer = (from.layer + at) % self.layers();
            let states = Some(&from.open.states[layer][..]);
            let step = chain.least(self.edge(layer), ahead.last()?, Direction::Back, states, stop)?;
            let mut costs = sum(&step, &chain.own[layer]);
            let closed = |(cost, past): (&mut f64, &f64)| {
                if *cost + past >= limit {
                    *cost = f64::INFINITY;
                }
            };
            costs.iter_mut().zip(&from.past[at]).for_each(closed);
            ahead.push(costs);
        }
        ahead.reverse();
        Some(ahead)
    }

    /// The states of the layer after `layer`, all or those in `targets`, each reached for least.
    fn step(&self, layer: usize, here: &[Reached], targets: Option<&[u32]>) -> Vec<Reached> {
        let states = &self.chain.states;
        let mut cost = vec![f64::INFINITY; states.len()];
        let mut from = vec![0usize; states.len()];
        for (at, way) in here.iter().enumerate() {
            let base = way.cost + self.chain.own[layer][states.orbit(way.state)];
            let mut take = |next: usize, step: f64| {
                if base + step < cost[next] {
                    (cost[next], from[next]) = (base + step, at);
                }
            };
            match (self.edge(layer), targets) {
                (Some(edge), Some(targets)) => {
                    states.weigh_some(&self.chain.table_after(edge, way.state), targets, take);
                }
                (Some(edge), None) => states.weigh(&self.chain.table_after(edge, way.state), take),
                (None, _) => (0..states.len()).for_each(|next| take(next, 0.0)),
            }
        }
        let reached = |(state, cost): (usize, &f64)| Reached { state, cost: *cost, from: from[state] };
        cost.iter().enumerate().filter(|(_, cost)| cost.is_finite()).map(reached).collect()
    }

    /// The cheapest of `ways`, one list for each layer from `root` on, joined to `first`: `[L, E]` holders and cost.
    fn closed(&self, root: usize, first: usize, ways: &[Vec<Reached>]) -> Option<(Vec<u16>, f64)> {
        let (chain, layers) = (self.chain, self.layers());
        let last = (root + layers - 1) % layers;
        let mut close = vec![f64::INFINITY; chain.states.len()];
        match self.edge(last) {
            Some(edge) => {
                chain.states.weigh(&chain.table_before(edge, first), |state, cost| close[state] = cost);
            }
            None => close.fill(0.0),
        }
        let whole =
            |way: &Reached| way.cost + chain.own[last][chain.states.orbit(way.state)] + close[way.state];
        let ends = ways[layers - 1].iter().enumerate().map(|(at, way)| (whole(way), at));
        let (cost, mut at) = ends.min_by(|a, b| a.0.total_cmp(&b.0))?;
        let mut way = vec![0; layers];
        for (step, reached) in ways.iter().enumerate().rev() {
            way[(root + step) % layers] = reached[at].state;
            at = reached[at].from;
        }
        Some((chain.holders(&way), cost))
    }
}
