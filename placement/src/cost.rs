//! The objective: what a placement costs, as a sum of pair costs over edges between layers.
//!
//! cost = Σ_edges Σ_ij W[i][j] · D[rank of i][rank of j]  (+ the load terms of `load.rs`)
//!
//! An edge joins layer l to l+1 (transitions), the last layer to the first (wrap), or a layer to
//! itself (co-activation). W is counts times the term's weight, D the topology's cost of a move.

use serde::{Deserialize, Serialize};

use crate::affinity::Affinity;
use crate::capacity::Capacity;
use crate::ids::Rank;
use crate::load::LoadTerm;
use crate::topology::Topology;

/// Weights of the objective's terms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Weights {
    /// Moves between adjacent layers (ExFlow's objective).
    pub transitions: f64,
    /// Moves from a token's last MoE layer to its successor's first.
    pub wrap: f64,
    /// Pairs of experts chosen together in a layer that sit on different ranks: for top-2 exactly the
    /// distinct ranks per token beyond the first.
    pub coactivation: f64,
    /// Tokens on the most loaded rank of each layer, divided by the rank's relative speed.
    pub load: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self { transitions: 1.0, wrap: 1.0, coactivation: 0.0, load: 0.0 }
    }
}

/// Pair costs between the experts of two layers.
#[derive(Debug, Clone)]
pub(crate) struct Edge {
    /// The earlier layer.
    pub from: usize,
    /// The later layer; `from` itself for co-activation.
    pub to: usize,
    /// `[E, E]` weighted counts, from i to j.
    pub weight: Vec<f64>,
    /// `[E, E]` the same, from j to i: rows for the other end.
    pub transposed: Vec<f64>,
}

impl Edge {
    /// An edge of weighted counts `[E, E]`.
    pub(crate) fn new(from: usize, to: usize, weight: Vec<f64>, experts: usize) -> Self {
        let transposed =
            (0..experts * experts).map(|at| weight[at % experts * experts + at / experts]).collect();
        Self { from, to, weight, transposed }
    }

    /// Sum of the counts.
    pub(crate) fn total(&self) -> f64 {
        self.weight.iter().sum()
    }
}

/// A placement problem in numbers: L layers, E experts, R ranks.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    /// L.
    pub layers: usize,
    /// E.
    pub experts: usize,
    /// R.
    pub ranks: usize,
    /// The pair terms; edges without any count are left out.
    pub edges: Vec<Edge>,
    /// Edges that begin at each layer, `[L]`.
    pub leaving: Vec<Vec<usize>>,
    /// Edges that end at each layer, `[L]`.
    pub entering: Vec<Vec<usize>>,
    /// `[R, R]` cost of a move.
    pub dist: Vec<f64>,
    /// Hosts, `[R]`.
    pub host: Vec<usize>,
    /// How many experts a rank may hold.
    pub capacity: Capacity,
    /// Load terms.
    pub load: LoadTerm,
}

impl Problem {
    /// The problem of an affinity on a topology.
    pub(crate) fn new(
        affinity: &Affinity,
        topology: &Topology,
        weights: &Weights,
        capacity: Capacity,
        load: LoadTerm,
    ) -> Self {
        let (layers, experts, ranks) = (affinity.layers, affinity.experts, topology.len());
        let edges = edges_of(affinity, weights);
        let ends = |end: &dyn Fn(&Edge) -> usize| -> Vec<Vec<usize>> {
            (0..layers).map(|l| (0..edges.len()).filter(|&at| end(&edges[at]) == l).collect()).collect()
        };
        let (leaving, entering) = (ends(&|edge| edge.from), ends(&|edge| edge.to));
        let dist = topology.cost.clone();
        let host = topology.ranks.iter().map(|rank| rank.host.index()).collect();
        Self { layers, experts, ranks, edges, leaving, entering, dist, host, capacity, load }
    }

    /// Cost of the pair terms of `[L, E]` holders.
    pub(crate) fn pair_cost(&self, assignment: &[u16]) -> f64 {
        self.edges.iter().map(|edge| self.edge_cost(edge, assignment)).sum()
    }

    /// Cost of everything.
    pub(crate) fn cost(&self, assignment: &[u16]) -> f64 {
        self.pair_cost(assignment) + self.load.cost(assignment, self.experts)
    }

    fn edge_cost(&self, edge: &Edge, assignment: &[u16]) -> f64 {
        let (e, r) = (self.experts, self.ranks);
        let from = &assignment[edge.from * e..][..e];
        let to = &assignment[edge.to * e..][..e];
        let row_cost = |(row, &g): (&[f64], &u16)| -> f64 {
            let dist = &self.dist[g as usize * r..][..r];
            row.iter().zip(to).map(|(count, &h)| count * dist[h as usize]).sum()
        };
        edge.weight.chunks_exact(e).zip(from).map(row_cost).sum()
    }

    /// Whether a layer's cost is not linear in its own assignment.
    pub(crate) fn self_coupled(&self, layer: usize) -> bool {
        self.leaving[layer].iter().any(|&at| self.edges[at].to == layer)
    }

    /// Whether the last layer is joined to the first.
    pub(crate) fn has_wrap(&self) -> bool {
        self.edges.iter().any(|edge| edge.from > edge.to)
    }

    /// The same problem with hosts for ranks: capacities summed, costs averaged. None where each rank is a
    /// host of its own or all are on one.
    pub(crate) fn by_host(&self) -> Option<Self> {
        let hosts = self.host.iter().max().map_or(0, |most| most + 1);
        if hosts < 2 || hosts == self.ranks {
            return None;
        }
        let summed = |each: &[usize]| {
            let mut sums = vec![0; hosts];
            self.host.iter().zip(each).for_each(|(&host, n)| sums[host] += n);
            sums
        };
        let mut dist = vec![0.0; hosts * hosts];
        let size = summed(&vec![1; self.ranks]);
        for (at, cost) in self.dist.iter().enumerate() {
            let (a, b) = (self.host[at / self.ranks], self.host[at % self.ranks]);
            if a != b {
                dist[a * hosts + b] += cost / (size[a] * size[b]) as f64;
            }
        }
        let capacity = Capacity {
            least: summed(&self.capacity.least),
            most: summed(&self.capacity.most),
            total: None,
            domain: 0.0,
            slots: summed(&self.capacity.slots),
        };
        let (edges, leaving, entering) = (self.edges.clone(), self.leaving.clone(), self.entering.clone());
        let (host, load) = ((0..hosts).collect(), LoadTerm::default());
        Some(Self { ranks: hosts, edges, leaving, entering, dist, host, capacity, load, ..*self })
    }

    /// `[R]` least and most experts of a layer on each rank, all other layers as in `[L, E]` holders.
    pub(crate) fn bounds(&self, holders: &[u16], layer: usize) -> (Vec<usize>, Vec<usize>) {
        let capacity = &self.capacity;
        let Some(total) = &capacity.total else {
            return (capacity.least.clone(), capacity.most.clone());
        };
        let counts: Vec<Vec<usize>> = self.counts(holders);
        let others = counts.iter().enumerate().filter(|(at, _)| *at != layer).map(|(_, n)| n.as_slice());
        let used = capacity.used(self.ranks, others);
        let room = |(&total, used): (&usize, &f64)| {
            ((total as f64 - used - capacity.domain + 1e-9).max(0.0) as usize).min(self.experts)
        };
        (capacity.least.clone(), total.iter().zip(&used).map(room).collect())
    }

    /// `[L][R]` experts of each layer on each rank.
    pub(crate) fn counts(&self, holders: &[u16]) -> Vec<Vec<usize>> {
        let count = |row: &[u16]| {
            let mut counts = vec![0; self.ranks];
            row.iter().for_each(|&g| counts[g as usize] += 1);
            counts
        };
        holders.chunks_exact(self.experts).map(count).collect()
    }

    /// Whether `[L, E]` holders are within the capacity.
    pub(crate) fn fits(&self, holders: &[u16]) -> bool {
        let (capacity, counts) = (&self.capacity, self.counts(holders));
        let within = |n: &[usize]| {
            n.iter().zip(capacity.least.iter().zip(&capacity.most)).all(|(n, (a, b))| (a..=b).contains(&n))
        };
        counts.iter().all(|n| within(n))
            && capacity.total.as_ref().is_none_or(|total| {
                let used = capacity.used(self.ranks, counts.iter().map(Vec::as_slice));
                used.iter().zip(total).all(|(used, &total)| *used <= total as f64 + 1e-9)
            })
    }

    /// Sum of all counts times the dearest move: no cost is above it.
    pub(crate) fn scale(&self) -> f64 {
        let dearest = self.dist.iter().copied().fold(0.0, f64::max);
        self.edges.iter().map(Edge::total).sum::<f64>() * dearest
    }
}

fn edges_of(affinity: &Affinity, weights: &Weights) -> Vec<Edge> {
    let (l, e) = (affinity.layers, affinity.experts);
    let weighted = |counts: &[f64], weight: f64| -> Vec<f64> { counts.iter().map(|c| c * weight).collect() };
    let mut edges: Vec<Edge> = (0..l.saturating_sub(1))
        .map(|layer| {
            Edge::new(layer, layer + 1, weighted(affinity.transition(layer), weights.transitions), e)
        })
        .collect();
    if let (Some(wrap), true) = (&affinity.wrap, weights.wrap > 0.0) {
        edges.push(Edge::new(l - 1, 0, weighted(wrap, weights.wrap), e));
    }
    if let (Some(co), true) = (&affinity.coactivation, weights.coactivation > 0.0) {
        let halves = co.chunks_exact(e * e).map(|counts| weighted(counts, weights.coactivation / 2.0));
        edges.extend(halves.enumerate().map(|(layer, half)| Edge::new(layer, layer, half, e)));
    }
    edges.iter_mut().filter(|edge| edge.from == edge.to).for_each(|edge| clear_diagonal(edge, e));
    edges.retain(|edge| edge.weight.iter().any(|&count| count > 0.0));
    edges
}

/// An expert never parts from itself.
fn clear_diagonal(edge: &mut Edge, experts: usize) {
    for i in 0..experts {
        edge.weight[i * (experts + 1)] = 0.0;
        edge.transposed[i * (experts + 1)] = 0.0;
    }
}

/// `[L, E]` holders as the table writes them.
pub(crate) fn to_rows(assignment: &[u16], experts: usize) -> Vec<Vec<Rank>> {
    assignment.chunks_exact(experts).map(|row| row.iter().map(|&g| Rank(g)).collect()).collect()
}
