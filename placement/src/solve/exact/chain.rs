//! The chain of layers, solved backwards over orbits; and the ring, searched forwards under the chain's bound.

use super::Exact;
use super::states::States;
use crate::cost::{Edge, Problem};

/// A solved chain.
pub(crate) struct Chain<'p> {
    problem: &'p Problem,
    states: States,
    /// `[L][orbits]`: least cost from a state of this layer to the end, its own included.
    ahead: Vec<Vec<f64>>,
    /// `[L][orbits]`: least cost from any beginning to a state of this layer, its own not included; only for a ring.
    past: Vec<Vec<f64>>,
    /// `[L][orbits]`: what a layer costs by itself.
    own: Vec<Vec<f64>>,
    /// The edge from the last layer to the first.
    wrap: Option<&'p Edge>,
}

/// Which end of an edge is known.
#[derive(Clone, Copy)]
enum Direction {
    /// The later layer.
    Back,
    /// The earlier layer.
    Forth,
}

/// A state on the way along a ring: how it was reached, and for what.
struct Reached {
    state: usize,
    cost: f64,
    from: usize,
}

impl<'p> Chain<'p> {
    /// Solves the chain, the wrap's far end left free; none where `stop` said so.
    pub(crate) fn new(problem: &'p Problem, states: States, stop: &dyn Fn() -> bool) -> Option<Self> {
        let layers = problem.layers;
        let own = (0..layers).map(|layer| own_costs(problem, &states, layer)).collect();
        let wrap = problem.edges.iter().find(|edge| edge.from > edge.to);
        let (ahead, past) = (vec![Vec::new(); layers], Vec::new());
        let mut chain = Self { problem, states, ahead, past, own, wrap };
        let end = vec![0.0; chain.states.orbits()];
        for layer in (0..layers).rev() {
            let edge = if layer + 1 < layers { chain.edge(layer) } else { chain.wrap };
            let next = chain.ahead.get(layer + 1).unwrap_or(&end);
            let step = chain.least(edge, next, Direction::Back, stop)?;
            chain.ahead[layer] = sum(&step, &chain.own[layer]);
        }
        if wrap.is_some() {
            chain.past.push(end);
            for layer in 0..layers - 1 {
                let here = sum(&chain.past[layer], &chain.own[layer]);
                let next = chain.least(chain.edge(layer), &here, Direction::Forth, stop)?;
                chain.past.push(next);
            }
        }
        Some(chain)
    }

    /// The edge from a layer to the next.
    fn edge(&self, layer: usize) -> Option<&'p Edge> {
        self.problem.leaving[layer]
            .iter()
            .map(|&at| &self.problem.edges[at])
            .find(|edge| edge.to == layer + 1)
    }

    /// Per orbit at one end of an edge: the least of the edge's cost plus `beyond` over all states at the other end.
    fn least(
        &self,
        edge: Option<&Edge>,
        beyond: &[f64],
        direction: Direction,
        stop: &dyn Fn() -> bool,
    ) -> Option<Vec<f64>> {
        let least = beyond.iter().copied().fold(f64::INFINITY, f64::min);
        let Some(edge) = edge else { return Some(vec![least; beyond.len()]) };
        let mut costs = vec![f64::INFINITY; self.states.len()];
        for (orbit, &beyond) in beyond.iter().enumerate().filter(|(_, beyond)| beyond.is_finite()) {
            if stop() {
                return None;
            }
            // Renaming both ends changes nothing: one state for each orbit of the far end is enough.
            let state = self.states.representative(orbit);
            let table = match direction {
                Direction::Back => self.table_before(edge, state),
                Direction::Forth => self.table_after(edge, state),
            };
            self.states.weigh(&table, |state, cost| costs[state] = costs[state].min(cost + beyond));
        }
        let mut folded = vec![f64::INFINITY; beyond.len()];
        for (state, cost) in costs.into_iter().enumerate() {
            let best = &mut folded[self.states.orbit(state)];
            *best = best.min(cost);
        }
        Some(folded)
    }

    /// `[R, E]` cost of each expert of the earlier layer on each rank, the later layer in `state`.
    fn table_before(&self, edge: &Edge, state: usize) -> Vec<f64> {
        let r = self.problem.ranks;
        self.marginals(&edge.transposed, state, |g, h| self.problem.dist[g * r + h])
    }

    /// `[R, E]` cost of each expert of the later layer on each rank, the earlier layer in `state`.
    fn table_after(&self, edge: &Edge, state: usize) -> Vec<f64> {
        let r = self.problem.ranks;
        self.marginals(&edge.weight, state, |h, g| self.problem.dist[g * r + h])
    }

    fn marginals(&self, rows: &[f64], state: usize, dist: impl Fn(usize, usize) -> f64) -> Vec<f64> {
        let (e, r) = (self.problem.experts, self.problem.ranks);
        let mut table = vec![0.0; r * e];
        for (row, &there) in rows.chunks_exact(e).zip(self.states.row(state)) {
            for rank in 0..r {
                let price = dist(rank, usize::from(there));
                if price != 0.0 {
                    table[rank * e..][..e].iter_mut().zip(row).for_each(|(sum, count)| *sum += price * count);
                }
            }
        }
        table
    }

    /// The cheapest placement.
    pub(crate) fn solve(&self, known: &[u16], stop: &dyn Fn() -> bool) -> Option<Exact> {
        let mut order: Vec<usize> = (0..self.states.orbits()).collect();
        order.sort_by(|&a, &b| self.ahead[0][a].total_cmp(&self.ahead[0][b]));
        let Some(wrap) = self.wrap else {
            let holders = self.walk(self.states.representative(order[0]));
            return Some(Exact { bound: self.problem.cost(&holders), holders: Some(holders) });
        };
        let (mut best, mut cost) = (None, self.problem.cost(known));
        for orbit in order {
            let free = self.ahead[0][orbit];
            // Rings from here on are bounded by `free`, which only rises.
            if free >= cost * (1.0 - 1e-12) {
                break;
            }
            match self.ring(wrap, self.states.representative(orbit), cost, stop) {
                None => return Some(Exact { bound: free, holders: best }),
                Some(None) => {}
                Some(Some(holders)) => {
                    cost = self.problem.cost(&holders);
                    best = Some(holders);
                }
            }
        }
        Some(Exact { bound: cost, holders: best })
    }

    /// `[L, E]` holders of a cheapest chain that begins in `state`.
    fn walk(&self, mut state: usize) -> Vec<u16> {
        let mut way = vec![state];
        for layer in 0..self.problem.layers - 1 {
            let mut best = (f64::INFINITY, 0);
            let ahead = &self.ahead[layer + 1];
            let mut take = |next: usize, cost: f64| {
                let sum = cost + ahead[self.states.orbit(next)];
                if sum < best.0 {
                    best = (sum, next);
                }
            };
            match self.edge(layer) {
                Some(edge) => self.states.weigh(&self.table_after(edge, state), take),
                None => (0..self.states.len()).for_each(|next| take(next, 0.0)),
            }
            state = best.1;
            way.push(state);
        }
        self.holders(&way)
    }

    fn holders(&self, way: &[usize]) -> Vec<u16> {
        way.iter().flat_map(|&state| self.states.row(state).iter().map(|&g| u16::from(g))).collect()
    }

    /// The cheapest ring through `first` that costs less than `below`: none where time ran out, some none where there
    /// is no such ring.
    fn ring(
        &self,
        wrap: &Edge,
        first: usize,
        below: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<Option<Vec<u16>>> {
        let limit = below * (1.0 - 1e-12);
        let ahead = self.back_from(wrap, first, limit, stop)?;
        let mut ways = vec![vec![Reached { state: first, cost: 0.0, from: 0 }]];
        for layer in 0..self.problem.layers - 1 {
            let next = self.step(layer, ways.last()?, &ahead[layer + 1], limit, stop)?;
            if next.is_empty() {
                return Some(None);
            }
            ways.push(next);
        }
        // The wrap's price, its far end the first state.
        let last = self.problem.layers - 1;
        let mut close = vec![f64::INFINITY; self.states.len()];
        self.states.weigh(&self.table_before(wrap, first), |state, cost| close[state] = cost);
        let whole =
            |way: &Reached| way.cost + self.own[last][self.states.orbit(way.state)] + close[way.state];
        let ends = ways[last].iter().enumerate().map(|(at, way)| (whole(way), at));
        let (cost, mut at) = ends.min_by(|a, b| a.0.total_cmp(&b.0))?;
        if cost >= limit {
            return Some(None);
        }
        let mut way = Vec::with_capacity(self.problem.layers);
        for reached in ways.iter().rev() {
            way.push(reached[at].state);
            at = reached[at].from;
        }
        way.reverse();
        Some(Some(self.holders(&way)))
    }

    /// As `ahead`, the wrap's far end in the orbit of `first`; infinite where no ring below `limit` passes.
    fn back_from(
        &self,
        wrap: &Edge,
        first: usize,
        limit: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<Vec<Vec<f64>>> {
        let mut end = vec![f64::INFINITY; self.states.orbits()];
        end[self.states.orbit(first)] = 0.0;
        let mut ahead = vec![end];
        for layer in (0..self.problem.layers).rev() {
            let edge = if layer + 1 < self.problem.layers { self.edge(layer) } else { Some(wrap) };
            let step = self.least(edge, ahead.last()?, Direction::Back, stop)?;
            let mut costs = sum(&step, &self.own[layer]);
            let closed = |(cost, past): (&mut f64, &f64)| {
                if *cost + past >= limit {
                    *cost = f64::INFINITY;
                }
            };
            costs.iter_mut().zip(&self.past[layer]).for_each(closed);
            ahead.push(costs);
        }
        ahead.reverse();
        Some(ahead)
    }

    /// The states of the next layer from which a ring below `limit` may still be closed.
    fn step(
        &self,
        layer: usize,
        here: &[Reached],
        ahead: &[f64],
        limit: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<Vec<Reached>> {
        let mut cost = vec![f64::INFINITY; self.states.len()];
        let mut from = vec![0usize; self.states.len()];
        for (at, way) in here.iter().enumerate() {
            if stop() {
                return None;
            }
            let base = way.cost + self.own[layer][self.states.orbit(way.state)];
            let mut take = |next: usize, step: f64| {
                if base + step < cost[next] {
                    (cost[next], from[next]) = (base + step, at);
                }
            };
            match self.edge(layer) {
                Some(edge) => self.states.weigh(&self.table_after(edge, way.state), take),
                None => (0..self.states.len()).for_each(|next| take(next, 0.0)),
            }
        }
        let open = (0..cost.len()).filter(|&state| cost[state] + ahead[self.states.orbit(state)] < limit);
        Some(open.map(|state| Reached { state, cost: cost[state], from: from[state] }).collect())
    }
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Per orbit: pairs inside the layer, and load.
fn own_costs(problem: &Problem, states: &States, layer: usize) -> Vec<f64> {
    let (e, r) = (problem.experts, problem.ranks);
    let inner = problem.leaving[layer].iter().map(|&at| &problem.edges[at]).find(|edge| edge.to == layer);
    let cost = |orbit: usize| {
        let row = states.row(states.representative(orbit));
        let pairs = inner.map_or(0.0, |edge| {
            let price = |at: usize| problem.dist[usize::from(row[at / e]) * r + usize::from(row[at % e])];
            edge.weight.iter().enumerate().map(|(at, count)| count * price(at)).sum()
        });
        if !problem.load.is_active() {
            return pairs;
        }
        let holders: Vec<u16> = row.iter().map(|&g| u16::from(g)).collect();
        pairs + problem.load.layer_cost(layer, &problem.load.of_layer(layer, &holders))
    };
    (0..states.orbits()).map(cost).collect()
}
