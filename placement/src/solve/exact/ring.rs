//! The chain closed to a ring by the wrap: for each first state, in the order of the chain's bound, the cheapest ring
//! through it, searched forwards among the states from which a ring cheaper than the best one known can still be closed.

use super::Exact;
use super::chain::{Chain, Direction, sum};
use crate::cost::Edge;

/// First states whose ring is looked for in a hurry, to have a good one before any is searched in full.
const HURRIED: usize = 4;
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

/// One ring problem.
struct Ring<'c, 'p> {
    chain: &'c Chain<'p>,
    wrap: &'c Edge,
}

/// The cheapest ring, `known` `[L, E]` or cheaper, first orbits in `order`; none where time ran out before anything was
/// proven.
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
    for &orbit in order.iter().take(HURRIED) {
        if chain.ahead[0][orbit] < cost && !stop() {
            ring.hurried(chain.states.representative(orbit)).into_iter().for_each(|way| keep(way, &mut cost));
        }
    }
    let first = chain.ahead[0][order[0]];
    let Some(open) = ring.open(cost * (1.0 - ROUNDING), stop) else {
        return Some(Exact { bound: first.min(cost), holders: best });
    };
    for &orbit in order {
        let free = chain.ahead[0][orbit];
        // Rings from here on are bounded by `free`, which only rises.
        if free >= cost * (1.0 - ROUNDING) {
            break;
        }
        match ring.through(chain.states.representative(orbit), &open, cost * (1.0 - ROUNDING), stop) {
            None => return Some(Exact { bound: free, holders: best }),
            Some(None) => {}
            Some(Some(holders)) => keep(holders, &mut cost),
        }
    }
    Some(Exact { bound: cost, holders: best })
}

impl Ring<'_, '_> {
    fn layers(&self) -> usize {
        self.chain.problem.layers
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

    /// The cheapest ring through `first` that costs less than `limit`: none where time ran out, some none where there
    /// is no such ring.
    fn through(
        &self,
        first: usize,
        open: &Open,
        limit: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<Option<Vec<u16>>> {
        let ahead = self.back_from(first, open, limit, stop)?;
        let mut ways = vec![vec![Reached { state: first, cost: 0.0, from: 0 }]];
        for layer in 0..self.layers() - 1 {
            let ahead = |state: u32| ahead[layer + 1][self.chain.states.orbit(state as usize)];
            let targets: Vec<u32> =
                open.states[layer + 1].iter().copied().filter(|&state| ahead(state).is_finite()).collect();
            let mut next = self.step(layer, ways.last()?, Some(&targets));
            next.retain(|way| way.cost + ahead(way.state as u32) < limit);
            if next.is_empty() {
                return Some(None);
            }
            if stop() {
                return None;
            }
            ways.push(next);
        }
        let (holders, cost) = self.closed(first, &ways)?;
        Some((cost < limit).then_some(holders))
    }

    /// A cheap ring through `first`: of each layer only the most promising states are kept.
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
        self.closed(first, &ways).map(|(holders, _)| holders)
    }

    /// As the chain's `ahead`, the wrap's far end in the orbit of `first`; infinite where no ring below `limit` passes.
    fn back_from(
        &self,
        first: usize,
        open: &Open,
        limit: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<Vec<Vec<f64>>> {
        let chain = self.chain;
        let mut end = vec![f64::INFINITY; chain.states.orbits()];
        end[chain.states.orbit(first)] = 0.0;
        let mut ahead = vec![end];
        for layer in (0..self.layers()).rev() {
            let edge = if layer + 1 < self.layers() { chain.edge(layer) } else { Some(self.wrap) };
            let states = Some(&open.states[layer][..]);
            let step = chain.least(edge, ahead.last()?, Direction::Back, states, stop)?;
            let mut costs = sum(&step, &chain.own[layer]);
            let closed = |(cost, past): (&mut f64, &f64)| {
                if *cost + past >= limit {
                    *cost = f64::INFINITY;
                }
            };
            costs.iter_mut().zip(&open.past[layer]).for_each(closed);
            ahead.push(costs);
        }
        ahead.reverse();
        Some(ahead)
    }

    /// The states of the next layer, all or those in `targets`, each reached for least.
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
            match (self.chain.edge(layer), targets) {
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

    /// The cheapest of `ways`, one list for each layer, joined to `first` by the wrap: `[L, E]` holders and cost.
    fn closed(&self, first: usize, ways: &[Vec<Reached>]) -> Option<(Vec<u16>, f64)> {
        let (chain, last) = (self.chain, self.layers() - 1);
        let mut close = vec![f64::INFINITY; chain.states.len()];
        chain.states.weigh(&chain.table_before(self.wrap, first), |state, cost| close[state] = cost);
        let whole =
            |way: &Reached| way.cost + chain.own[last][chain.states.orbit(way.state)] + close[way.state];
        let ends = ways[last].iter().enumerate().map(|(at, way)| (whole(way), at));
        let (cost, mut at) = ends.min_by(|a, b| a.0.total_cmp(&b.0))?;
        let mut way = Vec::with_capacity(ways.len());
        for reached in ways.iter().rev() {
            way.push(reached[at].state);
            at = reached[at].from;
        }
        way.reverse();
        Some((chain.holders(&way), cost))
    }
}
