//! How good a table is on counts or on tokens, apart from any solver.

use serde::{Deserialize, Serialize};

use crate::affinity::Affinity;
use crate::ids::{ExpertId, HostId, LayerId, Rank};
use crate::route::Strategy;
use crate::table::PlacementTable;
use crate::topology::Topology;
use crate::trace::RoutingTrace;

/// Rates of one table.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Score {
    /// Share of adjacent-layer transitions that stay on the rank.
    pub stay_rate: f64,
    /// Share of adjacent-layer transitions that stay on the host.
    pub host_stay_rate: f64,
    /// Share of steps from a token's last layer to its successor's first that stay on the rank; 1 where
    /// there is none.
    pub wrap_stay_rate: f64,
    /// Moves to another rank per token, wrap included.
    pub crossings_per_token: f64,
    /// Busiest rank over mean rank, mean over layers.
    pub max_load: f64,
    /// Busiest rank over mean rank in the worst layer.
    pub worst_load: f64,
}

/// Sums of (moves seen, kept on the rank, kept on the host).
#[derive(Default)]
struct Kept {
    all: f64,
    rank: f64,
    host: f64,
}

impl Kept {
    fn add(&mut self, count: f64, from: Rank, to: Rank, host: &dyn Fn(Rank) -> HostId) {
        self.all += count;
        self.rank += if from == to { count } else { 0.0 };
        self.host += if host(from) == host(to) { count } else { 0.0 };
    }

    fn rate(kept: f64, all: f64) -> f64 {
        if all > 0.0 { kept / all } else { 1.0 }
    }
}

/// Scores a table on tokens, as `coherent` routes them, replicas in use; all ranks count as one host.
pub fn score_trace(table: &PlacementTable, trace: &RoutingTrace) -> Score {
    score_trace_on(table, trace, &Topology::uniform(table.ranks))
}

/// Scores a table on tokens, as `coherent` routes them, replicas in use. A sequence's first token begins
/// on the rank of its first choice.
pub fn score_trace_on(table: &PlacementTable, trace: &RoutingTrace, topology: &Topology) -> Score {
    let host = |rank: Rank| topology.host_of(rank);
    let (mut moves, mut wraps) = (Kept::default(), Kept::default());
    let mut served = vec![0.0; table.layers * table.ranks];
    let mut residence = Rank(0);
    let layers = table.layers.min(trace.layers());
    for token in 0..trace.tokens() {
        for layer in 0..layers {
            let experts = chosen(trace, token, layer);
            let begins = layer == 0 && !trace.follows(token);
            let from = if begins { first_holder(table, &experts).unwrap_or(residence) } else { residence };
            let route = table.route(Strategy::Coherent, LayerId::from(layer), from, &experts, &[]);
            route.serving.iter().for_each(|rank| served[layer * table.ranks + rank.index()] += 1.0);
            match (layer, begins) {
                (0, true) => {}
                (0, false) => wraps.add(1.0, from, route.next, &host),
                _ => moves.add(1.0, from, route.next, &host),
            }
            residence = route.next;
        }
    }
    finish(&moves, &wraps, &served, table.ranks, trace.tokens() as f64)
}

fn chosen(trace: &RoutingTrace, token: usize, layer: usize) -> Vec<ExpertId> {
    trace.chosen(token, layer).iter().map(|&id| ExpertId(id as u16)).collect()
}

fn first_holder(table: &PlacementTable, experts: &[ExpertId]) -> Option<Rank> {
    experts.first().and_then(|&expert| table.holders(LayerId(0), expert).next())
}

/// Scores a table's primary holders on pair counts (top-k: every pair of choices counts).
pub fn score_affinity(table: &PlacementTable, affinity: &Affinity, topology: &Topology) -> Score {
    let e = affinity.experts;
    let host = |rank: Rank| topology.host_of(rank);
    let (mut moves, mut wraps) = (Kept::default(), Kept::default());
    for layer in 0..affinity.layers.saturating_sub(1) {
        let (from, to) = (&table.assignment[layer], &table.assignment[layer + 1]);
        add_counts(&mut moves, affinity.transition(layer), from, to, &host);
    }
    if let (Some(wrap), Some(last), Some(first)) =
        (&affinity.wrap, table.assignment.last(), table.assignment.first())
    {
        add_counts(&mut wraps, wrap, last, first, &host);
    }
    let load = affinity.load_or_derived();
    let mut served = vec![0.0; affinity.layers * table.ranks];
    for (at, tokens) in load.iter().enumerate() {
        served[at / e * table.ranks + table.assignment[at / e][at % e].index()] += tokens;
    }
    let pairs = affinity.layers.saturating_sub(1).max(1) as f64;
    finish(&moves, &wraps, &served, table.ranks, moves.all / pairs)
}

fn add_counts(kept: &mut Kept, counts: &[f64], from: &[Rank], to: &[Rank], host: &dyn Fn(Rank) -> HostId) {
    for (row, &g) in counts.chunks_exact(to.len()).zip(from) {
        row.iter()
            .zip(to)
            .filter(|(count, _)| **count > 0.0)
            .for_each(|(&count, &h)| kept.add(count, g, h, host));
    }
}

fn finish(moves: &Kept, wraps: &Kept, served: &[f64], ranks: usize, tokens: f64) -> Score {
    let imbalance: Vec<f64> = served.chunks_exact(ranks).filter_map(busiest_over_mean).collect();
    let crossed = moves.all - moves.rank + wraps.all - wraps.rank;
    Score {
        stay_rate: Kept::rate(moves.rank, moves.all),
        host_stay_rate: Kept::rate(moves.host, moves.all),
        wrap_stay_rate: Kept::rate(wraps.rank, wraps.all),
        crossings_per_token: if tokens > 0.0 { crossed / tokens } else { 0.0 },
        max_load: imbalance.iter().sum::<f64>() / imbalance.len().max(1) as f64,
        worst_load: imbalance.iter().copied().fold(0.0, f64::max),
    }
}

/// Busiest over mean of `[R]` loads; none where nothing was served.
pub(crate) fn busiest_over_mean(sums: &[f64]) -> Option<f64> {
    let total: f64 = sums.iter().sum();
    (total > 0.0).then(|| sums.iter().copied().fold(0.0, f64::max) * sums.len() as f64 / total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_and_counts_agree_for_one_choice() {
        let mut trace = RoutingTrace::new(3, 1);
        for token in [[0, 1, 2], [0, 0, 3], [2, 2, 2], [3, 1, 0]] {
            trace.push_token(&token);
        }
        let table = PlacementTable::linear(3, 4, 2);
        let affinity = Affinity::from_trace(&trace, 4).unwrap();
        let (a, b) = (score_trace(&table, &trace), score_affinity(&table, &affinity, &Topology::uniform(2)));
        assert_eq!(a, b);
        assert_eq!(a.stay_rate, 5.0 / 8.0);
        assert_eq!(a.crossings_per_token, (3.0 + 1.0) / 4.0);
        assert_eq!(a.worst_load, 1.5);
    }
}
