//! The chain of layers, solved backwards over orbits.

use super::Exact;
use super::ring;
use super::states::States;
use crate::cost::{Edge, Problem};

/// A solved chain.
pub(crate) struct Chain<'p> {
    pub(super) problem: &'p Problem,
    pub(super) states: States,
    /// `[L][orbits]`: least cost from a state of this layer to the end, its own included.
    pub(super) ahead: Vec<Vec<f64>>,
    /// `[L][orbits]`: what a layer costs by itself.
    pub(super) own: Vec<Vec<f64>>,
    /// The edge from the last layer to the first.
    wrap: Option<&'p Edge>,
}

/// Which end of an edge is known.
#[derive(Clone, Copy)]
pub(super) enum Direction {
    /// The later layer.
    Back,
    /// The earlier layer.
    Forth,
}

impl<'p> Chain<'p> {
    /// Solves the chain, the wrap's far end left free; none where `stop` said so.
    pub(crate) fn new(problem: &'p Problem, states: States, stop: &dyn Fn() -> bool) -> Option<Self> {
        let layers = problem.layers;
        let own = (0..layers).map(|layer| own_costs(problem, &states, layer)).collect();
        let wrap = problem.edges.iter().find(|edge| edge.from > edge.to);
        let ahead = vec![Vec::new(); layers];
        let mut chain = Self { problem, states, ahead, own, wrap };
        let end = vec![0.0; chain.states.orbits()];
        for layer in (0..layers).rev() {
            let edge = if layer + 1 < layers { chain.edge(layer) } else { chain.wrap };
            let next = chain.ahead.get(layer + 1).unwrap_or(&end);
            let step = chain.least(edge, next, Direction::Back, None, stop)?;
            chain.ahead[layer] = sum(&step, &chain.own[layer]);
        }
        Some(chain)
    }

    /// The edge from a layer to the next.
    pub(super) fn edge(&self, layer: usize) -> Option<&'p Edge> {
        self.problem.leaving[layer]
            .iter()
            .map(|&at| &self.problem.edges[at])
            .find(|edge| edge.to == layer + 1)
    }

    /// Per orbit at one end of an edge: the least of the edge's cost plus `beyond` over all states at the other end.
    /// Only of the states in `open`, where it is given: other orbits may come out dearer than they are.
    pub(super) fn least(
        &self,
        edge: Option<&Edge>,
        beyond: &[f64],
        direction: Direction,
        open: Option<&[u32]>,
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
            let take = |state: usize, cost: f64| costs[state] = costs[state].min(cost + beyond);
            match open {
                Some(open) => self.states.weigh_some(&table, open, take),
                None => self.states.weigh(&table, take),
            }
        }
        let mut folded = vec![f64::INFINITY; beyond.len()];
        for (state, cost) in costs.into_iter().enumerate() {
            let best = &mut folded[self.states.orbit(state)];
            *best = best.min(cost);
        }
        Some(folded)
    }

    /// `[R, E]` cost of each expert of the earlier layer on each rank, the later layer in `state`.
    pub(super) fn table_before(&self, edge: &Edge, state: usize) -> Vec<f64> {
        let r = self.problem.ranks;
        self.marginals(&edge.transposed, state, |g, h| self.problem.dist[g * r + h])
    }

    /// `[R, E]` cost of each expert of the later layer on each rank, the earlier layer in `state`.
    pub(super) fn table_after(&self, edge: &Edge, state: usize) -> Vec<f64> {
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

    /// The cheapest placement; of a ring, `known` `[L, E]` is one to begin from.
    pub(crate) fn solve(&self, known: &[u16], stop: &dyn Fn() -> bool) -> Option<Exact> {
        let mut order: Vec<usize> = (0..self.states.orbits()).collect();
        order.sort_by(|&a, &b| self.ahead[0][a].total_cmp(&self.ahead[0][b]));
        if let Some(wrap) = self.wrap {
            return ring::solve(self, wrap, &order, known, stop);
        }
        let holders = self.walk(self.states.representative(order[0]));
        Some(Exact { bound: self.problem.cost(&holders), holders: Some(holders) })
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

    pub(super) fn holders(&self, way: &[usize]) -> Vec<u16> {
        way.iter().flat_map(|&state| self.states.row(state).iter().map(|&g| u16::from(g))).collect()
    }
}

pub(super) fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
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
