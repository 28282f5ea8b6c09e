//! The chain closed to a ring by the wrap.
//!
//! With the wrap's far end left free, `past + ahead` bounds every ring through a state from below. That leaves few states
//! of each layer open for a ring cheaper than the best one known. A ring ends where it began: any price e(s) that is paid
//! where it begins and paid back where it ends leaves its cost as it is, but not the bound of ways whose ends
//! differ. With e = `ahead` of the lap before (value iteration for the cheapest mean cycle) each lap closes further states.
//! Rings are then searched through each open state of the layer that has fewest, forwards around the ring, among open
//! states alone.

use super::Exact;
use super::chain::{Chain, Direction, sum};
use crate::cost::Edge;
use crate::solve::state::State;
use crate::solve::sweep::Sweeper;

/// First states whose ring is looked for in a hurry, to have a good one before any is searched in full.
const HURRIED: usize = 1;
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

/// The cheapest ring is looked for first in this share of the way from the bound to the best ring known: the less there is
/// to win, the fewer states are open.
const NARROW: f64 = 0.04;
/// Where there is none, in a share so many times as wide.
const WIDENING: f64 = 2.5;

/// Laps that close fewer of the open states than this share are the last.
const WORTH: f64 = 0.15;
/// Laps at most.
const LAPS: usize = 12;

/// Where rings cheaper than some limit can pass.
struct Open {
    /// `[L][orbits]`: least cost from any beginning to a state of this layer, its own not included.
    past: Vec<Vec<f64>>,
    /// `[L][orbits]`: least cost from a state of this layer to any end, its own included.
    ahead: Vec<Vec<f64>>,
    /// `[L]` the states.
    states: Vec<Vec<u32>>,
}

/// The ring seen from the layer whose states are gone through one by one.
struct Rooted<'o> {
    layer: usize,
    open: &'o Open,
    /// `[orbits]` of that layer: what a ring that begins there is paid, and pays back at its end.
    price: Vec<f64>,
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
    let mut bound = chain.ahead[0][order[0]].min(cost);
    let mut excess = (cost - bound) * NARROW;
    loop {
        let all = cost * (1.0 - ROUNDING);
        if bound >= all {
            return Some(Exact { bound: cost, holders: best });
        }
        let limit = all.min(bound + excess);
        match ring.cheapest(limit, stop) {
            None => return Some(Exact { bound, holders: best }),
            Some(None) => (bound, excess) = (limit, excess * WIDENING),
            Some(Some(holders)) => {
                keep(holders, &mut cost);
                bound = cost;
            }
        }
    }
}

impl Open {
    /// Open states of all layers.
    fn size(&self) -> usize {
        self.states.iter().map(Vec::len).sum()
    }

    /// `[orbits]` a price for each orbit of a layer at which rings may be cut: `ahead`, counted from its least;
    /// infinite where no ring passes.
    fn price(&self, layer: usize) -> Vec<f64> {
        let least = self.ahead[layer].iter().copied().fold(f64::INFINITY, f64::min);
        let price =
            |(past, ahead): (&f64, &f64)| if past.is_finite() { ahead - least } else { f64::INFINITY };
        self.past[layer].iter().zip(&self.ahead[layer]).map(price).collect()
    }
}

impl<'c> Ring<'c, '_> {
    fn layers(&self) -> usize {
        self.chain.problem.layers
    }

    /// The edge from a layer to the next around the ring.
    fn edge(&self, layer: usize) -> Option<&'c Edge> {
        if layer + 1 < self.layers() { self.chain.edge(layer) } else { Some(self.wrap) }
    }

    /// The cheapest ring that costs less than `limit`: none where time ran out, some none where there is no such ring.
    fn cheapest(&self, mut limit: f64, stop: &dyn Fn() -> bool) -> Option<Option<Vec<u16>>> {
        let open = self.laps(self.open(limit, stop)?, limit, stop)?;
        let (root, orbits) = self.narrowest(&open);
        if orbits.is_empty() {
            return Some(None);
        }
        let from = self.rooted(root, &open, stop)?;
        let mut best = None;
        // Bounds of the rings through each orbit, rising.
        for (orbit, bound) in orbits {
            if bound >= limit {
                break;
            }
            if let Some(holders) =
                self.through(&from, self.chain.states.representative(orbit), limit, stop)?
            {
                limit = self.chain.problem.cost(&holders) * (1.0 - ROUNDING);
                best = Some(holders);
            }
        }
        Some(best)
    }

    /// States through which a ring below `limit` may pass, its two ends left unjoined.
    fn open(&self, limit: f64, stop: &dyn Fn() -> bool) -> Option<Open> {
        let begin = vec![0.0; self.chain.states.orbits()];
        self.opened(begin, self.chain.ahead.clone(), None, limit, stop)
    }

    /// States through which a way below `limit` passes, by what it costs to `begin` in each orbit of the first layer
    /// (`[orbits]`) and to end (`ahead`, `[L][orbits]`); of `among` alone, where that is given.
    fn opened(
        &self,
        begin: Vec<f64>,
        ahead: Vec<Vec<f64>>,
        among: Option<&Open>,
        limit: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<Open> {
        let chain = self.chain;
        let mut past = vec![begin];
        for layer in 0..self.layers() {
            past[layer].iter_mut().zip(&ahead[layer]).for_each(|(past, ahead)| {
                let bound = *past + ahead;
                if bound >= limit || bound.is_nan() {
                    *past = f64::INFINITY;
                }
            });
            if layer + 1 < self.layers() {
                let here = sum(&past[layer], &chain.own[layer]);
                let states = among.map(|open| &open.states[layer + 1][..]);
                past.push(chain.least(chain.edge(layer), &here, Direction::Forth, states, stop)?);
            }
        }
        let all: Vec<u32> = (0..chain.states.len() as u32).collect();
        let of_layer = |(layer, past): (usize, &Vec<f64>)| {
            let states = among.map_or(&all, |open| &open.states[layer]).iter().copied();
            states.filter(|&state| past[chain.states.orbit(state as usize)].is_finite()).collect()
        };
        let states = past.iter().enumerate().map(of_layer).collect();
        Some(Open { past, ahead, states })
    }

    /// Closes further states, lap by lap, while that is worth it.
    fn laps(&self, mut open: Open, limit: f64, stop: &dyn Fn() -> bool) -> Option<Open> {
        for _ in 0..LAPS {
            let before = open.size();
            let price = open.price(0);
            let mut ahead = vec![price.clone()];
            for layer in (0..self.layers()).rev() {
                let states = Some(&open.states[layer][..]);
                let step =
                    self.chain.least(self.edge(layer), ahead.last()?, Direction::Back, states, stop)?;
                ahead.push(sum(&step, &self.chain.own[layer]));
            }
            ahead.remove(0);
            ahead.reverse();
            let begin = price.iter().map(|price| if price.is_finite() { -price } else { f64::INFINITY });
            open = self.opened(begin.collect(), ahead, Some(&open), limit, stop)?;
            if open.size() as f64 > before as f64 * (1.0 - WORTH) {
                break;
            }
        }
        Some(open)
    }

    /// The layer with fewest open orbits, and these with what bounds the rings through them, rising.
    fn narrowest(&self, open: &Open) -> (usize, Vec<(usize, f64)>) {
        let finite = |layer: &usize| open.past[*layer].iter().filter(|past| past.is_finite()).count();
        let root = (0..self.layers()).min_by_key(finite).unwrap_or(0);
        let bounds = open.past[root].iter().zip(&open.ahead[root]).map(|(past, ahead)| past + ahead);
        let mut orbits: Vec<(usize, f64)> =
            bounds.enumerate().filter(|(_, bound)| bound.is_finite()).collect();
        orbits.sort_by(|a, b| a.1.total_cmp(&b.1));
        (root, orbits)
    }

    /// The ring seen from layer `root`.
    fn rooted<'o>(&self, root: usize, open: &'o Open, stop: &dyn Fn() -> bool) -> Option<Rooted<'o>> {
        let chain = self.chain;
        let price = open.price(root);
        let begin = price.iter().map(|price| if price.is_finite() { -price } else { f64::INFINITY });
        let mut past: Vec<Vec<f64>> = vec![begin.collect()];
        for at in 1..self.layers() {
            let (before, layer) = ((root + at - 1) % self.layers(), (root + at) % self.layers());
            let here = sum(&past[at - 1], &chain.own[before]);
            let states = Some(&open.states[layer][..]);
            past.push(chain.least(self.edge(before), &here, Direction::Forth, states, stop)?);
        }
        Some(Rooted { layer: root, open, price, past })
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
        let price = from.price[chain.states.orbit(first)];
        let mut ahead = vec![end];
        for at in (0..self.layers()).rev() {
            let layer = (from.layer + at) % self.layers();
            let states = Some(&from.open.states[layer][..]);
            let step = chain.least(self.edge(layer), ahead.last()?, Direction::Back, states, stop)?;
            let mut costs = sum(&step, &chain.own[layer]);
            let closed = |(cost, past): (&mut f64, &f64)| {
                let bound = *cost + past + price;
                if bound >= limit || bound.is_nan() {
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
