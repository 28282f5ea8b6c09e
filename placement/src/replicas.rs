//! Copies of experts in slots that are left over, and what they save.
//!
//! A token prefers a copy where it is (`route.rs`), and then goes on from there; so a copy saves a move now and
//! changes every later one. The model is a first-order Markov chain: ρ_l(r | e) is the share of the tokens at expert e
//! of layer l that reside on rank r, V_l(e, r) what such a token still has to pay to the end of the next lap.
//!
//!   cost = Σ_l Σ_ij W[i][j] Σ_r ρ_l(r | i) · D[r][s(r, j)],   s(r, j) = r if r holds j, else j's primary
//!
//! Given the layer before, the gains of a layer's copies add up, so that each layer's best choice is the copies of
//! largest gain, rank by rank; layers are chosen one after another, twice.

use crate::affinity::Affinity;
use crate::capacity::Capacity;
use crate::cost::Weights;
use crate::ids::{ExpertId, LayerId, Rank};
use crate::table::{PlacementTable, Replica};
use crate::topology::Topology;

/// Times that all layers' copies are chosen anew.
const PASSES: usize = 2;
/// Laps over all layers until the shares at the first layer no longer depend on how they began.
const LAPS: usize = 2;

/// Copies for the table's spare slots, ascending; only such as save something.
pub(crate) fn choose(
    table: &PlacementTable,
    affinity: &Affinity,
    topology: &Topology,
    weights: &Weights,
    capacity: &Capacity,
) -> Vec<Replica> {
    let mut chain = Chain::new(table, affinity, topology, weights);
    let mut room = Room::new(table, capacity);
    if room.is_empty() {
        return Vec::new();
    }
    if capacity.total.is_some() {
        let shares = chain.shares();
        let ahead = chain.ahead();
        let gains = (0..chain.layers).flat_map(|layer| chain.gains(layer, &shares, &ahead)).collect();
        return room.fill(gains);
    }
    let mut chosen: Vec<Vec<Replica>> = vec![Vec::new(); chain.layers];
    for _ in 0..PASSES {
        let ahead = chain.ahead();
        for (layer, copies) in chosen.iter_mut().enumerate() {
            chain.clear(layer);
            let shares = chain.shares();
            room.clear(layer, table);
            *copies = room.fill(chain.gains(layer, &shares, &ahead));
            copies.iter().for_each(|copy| chain.hold(copy));
        }
    }
    chosen.concat()
}

/// Predicted cost of all moves of a table with copies, in the units of the table's cost.
pub(crate) fn predicted_cost(
    table: &PlacementTable,
    affinity: &Affinity,
    topology: &Topology,
    weights: &Weights,
) -> f64 {
    let chain = Chain::new(table, affinity, topology, weights);
    let shares = chain.shares();
    (0..chain.layers).map(|layer| chain.cost_into(layer, &shares)).sum()
}

/// A copy that could be made: what it saves.
struct Gain {
    copy: Replica,
    saved: f64,
}

/// The chain's counts and who holds what.
struct Chain<'c> {
    layers: usize,
    experts: usize,
    ranks: usize,
    dist: &'c [f64],
    /// `[L]`: weighted counts `[E, E]` into each layer from the one before; of the first, the wrap.
    into: Vec<Option<(&'c [f64], f64)>>,
    /// `[L, E]` primaries.
    primary: Vec<usize>,
    /// `[L, E, R]` whether a rank holds an expert.
    held: Vec<bool>,
}

impl<'c> Chain<'c> {
    fn new(
        table: &PlacementTable,
        affinity: &'c Affinity,
        topology: &'c Topology,
        weights: &Weights,
    ) -> Self {
        let (layers, experts, ranks) = (table.layers, table.experts, table.ranks);
        let counted = |counts: &'c [f64], weight: f64| (weight > 0.0).then_some((counts, weight));
        let wrap = affinity.wrap.as_deref().and_then(|wrap| counted(wrap, weights.wrap));
        let mut into = vec![wrap];
        into.extend((1..layers).map(|layer| counted(affinity.transition(layer - 1), weights.transitions)));
        let primary: Vec<usize> = table.assignment.iter().flatten().map(|rank| rank.index()).collect();
        let mut held = vec![false; layers * experts * ranks];
        primary.iter().enumerate().for_each(|(at, &rank)| held[at * ranks + rank] = true);
        let mut chain = Self { layers, experts, ranks, dist: &topology.cost, into, primary, held };
        table.replicas.iter().for_each(|copy| chain.hold(copy));
        chain
    }

    fn hold(&mut self, copy: &Replica) {
        let at = copy.layer.index() * self.experts + copy.expert.index();
        self.held[at * self.ranks + copy.rank.index()] = true;
    }

    /// Primaries alone hold the experts of a layer.
    fn clear(&mut self, layer: usize) {
        for at in layer * self.experts..(layer + 1) * self.experts {
            let row = &mut self.held[at * self.ranks..][..self.ranks];
            row.fill(false);
            row[self.primary[at]] = true;
        }
    }

    /// The rank that serves expert `at` (of `[L, E]`) for a token on `rank`.
    fn server(&self, at: usize, rank: usize) -> usize {
        if self.held[at * self.ranks + rank] { rank } else { self.primary[at] }
    }

    fn before(&self, layer: usize) -> usize {
        (layer + self.layers - 1) % self.layers
    }

    /// `[L, E, R]` ρ.
    fn shares(&self) -> Vec<f64> {
        let (e, r) = (self.experts, self.ranks);
        let mut shares = vec![0.0; self.layers * e * r];
        self.primary.iter().enumerate().for_each(|(at, &rank)| shares[at * r + rank] = 1.0);
        let laps = if self.into[0].is_some() { LAPS } else { 1 };
        for lap in 0..laps {
            for layer in usize::from(lap == 0)..self.layers {
                let arriving = self.arriving(layer, &shares);
                for expert in 0..e {
                    let (at, from) = (layer * e + expert, &arriving[expert * r..][..r]);
                    let whole: f64 = from.iter().sum();
                    if whole <= 0.0 {
                        continue;
                    }
                    let mut next = vec![0.0; r];
                    (0..r).for_each(|rank| next[self.server(at, rank)] += from[rank] / whole);
                    shares[at * r..][..r].copy_from_slice(&next);
                }
            }
        }
        shares
    }

    /// `[E, R]` counts that want each expert of `layer` and come from each rank; unweighted.
    fn arriving(&self, layer: usize, shares: &[f64]) -> Vec<f64> {
        let (e, r) = (self.experts, self.ranks);
        let mut arriving = vec![0.0; e * r];
        let Some((counts, _)) = self.into[layer] else { return arriving };
        let before = self.before(layer);
        for (i, row) in counts.chunks_exact(e).enumerate() {
            let from = &shares[(before * e + i) * r..][..r];
            for (rank, share) in from.iter().enumerate().filter(|(_, share)| **share > 0.0) {
                row.iter().enumerate().for_each(|(j, count)| arriving[j * r + rank] += share * count);
            }
        }
        arriving
    }

    fn cost_into(&self, layer: usize, shares: &[f64]) -> f64 {
        let (e, r) = (self.experts, self.ranks);
        let Some((_, weight)) = self.into[layer] else { return 0.0 };
        let arriving = self.arriving(layer, shares);
        let price = |at: usize| {
            let (expert, rank) = (at / r, at % r);
            self.dist[rank * r + self.server(layer * e + expert, rank)]
        };
        weight * arriving.iter().enumerate().map(|(at, count)| count * price(at)).sum::<f64>()
    }

    /// `[L, E, R]` V: two laps back from nothing.
    fn ahead(&self) -> Vec<f64> {
        let (e, r) = (self.experts, self.ranks);
        let mut ahead = vec![0.0; self.layers * e * r];
        let laps = if self.into[0].is_some() { LAPS } else { 1 };
        for _ in 0..laps {
            for layer in (0..self.layers).rev() {
                let next = (layer + 1) % self.layers;
                let Some((counts, weight)) = self.into[next] else { continue };
                for (i, row) in counts.chunks_exact(e).enumerate() {
                    let whole: f64 = row.iter().sum();
                    for rank in 0..r {
                        let pay = |(j, count): (usize, &f64)| {
                            let server = self.server(next * e + j, rank);
                            let later = ahead[(next * e + j) * r + server];
                            count * (weight * self.dist[rank * r + server] + later)
                        };
                        let sum: f64 = row.iter().enumerate().map(pay).sum();
                        ahead[(layer * e + i) * r + rank] = if whole > 0.0 { sum / whole } else { 0.0 };
                    }
                }
            }
        }
        ahead
    }

    /// What each further copy in a layer saves.
    fn gains(&self, layer: usize, shares: &[f64], ahead: &[f64]) -> Vec<Gain> {
        let (e, r) = (self.experts, self.ranks);
        let Some((_, weight)) = self.into[layer] else { return Vec::new() };
        let arriving = self.arriving(layer, shares);
        let gain = |at: usize| {
            let (expert, rank) = (at / r, at % r);
            let (here, primary) = (layer * e + expert, self.primary[layer * e + expert]);
            let later = ahead[here * r + primary] - ahead[here * r + rank];
            let copy = Replica {
                layer: LayerId::from(layer),
                expert: ExpertId::from(expert),
                rank: Rank::from(rank),
            };
            Gain { copy, saved: arriving[at] * (weight * self.dist[rank * r + primary] + later) }
        };
        let open = (0..e * r).filter(|&at| !self.held[layer * e * r + at]);
        open.map(gain).filter(|gain| gain.saved > 0.0).collect()
    }
}

/// Slots that are left over.
struct Room<'c> {
    capacity: &'c Capacity,
    /// `[L][R]` experts held.
    counts: Vec<Vec<usize>>,
    /// `[R]` what is left of a rank's total.
    left: Vec<f64>,
}

impl<'c> Room<'c> {
    fn new(table: &PlacementTable, capacity: &'c Capacity) -> Self {
        let mut room = Self { capacity, counts: vec![vec![0; table.ranks]; table.layers], left: Vec::new() };
        (0..table.layers).for_each(|layer| room.clear(layer, table));
        if let Some(total) = &capacity.total {
            let used = capacity.used(table.ranks, room.counts.iter().map(Vec::as_slice));
            room.left = total.iter().zip(used).map(|(&total, used)| total as f64 - used).collect();
        }
        room
    }

    fn is_empty(&self) -> bool {
        let open = |counts: &Vec<usize>| counts.iter().zip(&self.capacity.slots).any(|(n, slots)| n < slots);
        !self.counts.iter().any(open)
    }

    /// Takes a layer's copies out again.
    fn clear(&mut self, layer: usize, table: &PlacementTable) {
        self.counts[layer].fill(0);
        table.assignment[layer].iter().for_each(|rank| self.counts[layer][rank.index()] += 1);
    }

    /// Copies by falling gain per byte, while there is room.
    fn fill(&mut self, mut gains: Vec<Gain>) -> Vec<Replica> {
        let price = |counts: &[Vec<usize>], copy: &Replica| {
            let held = counts[copy.layer.index()][copy.rank.index()];
            self.capacity.taken(held + 1) - self.capacity.taken(held)
        };
        let value = |gain: &Gain| gain.saved / price(&self.counts, &gain.copy);
        gains.sort_by(|a, b| value(b).total_cmp(&value(a)).then(a.copy.cmp(&b.copy)));
        let mut chosen = Vec::new();
        for Gain { copy, .. } in gains {
            let (layer, rank) = (copy.layer.index(), copy.rank.index());
            let price = price(&self.counts, &copy);
            let fits = match self.left.get(rank) {
                Some(left) => *left + 1e-9 >= price,
                None => self.counts[layer][rank] < self.capacity.slots[rank],
            };
            if fits {
                self.counts[layer][rank] += 1;
                self.left.get_mut(rank).into_iter().for_each(|left| *left -= price);
                chosen.push(copy);
            }
        }
        chosen
    }
}
