//! A table for those who are there: what absent ranks hold goes to the others, everything else stays where it is.

use crate::affinity::Affinity;
use crate::assign::{Assigner, Bounds};
use crate::ids::{ExpertId, LayerId, Rank};
use crate::table::{PlacementTable, Replica};
use std::collections::BTreeMap;

/// The experts that no rank has room for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no room for {} of the experts: {}", .experts.len(), by_layer(.experts))]
pub struct Shortage {
    /// In order of layers.
    pub experts: Vec<(LayerId, ExpertId)>,
}

/// `layer 0: experts 1, 5; layer 3: expert 2`, cut after a few.
fn by_layer(experts: &[(LayerId, ExpertId)]) -> String {
    const MOST: usize = 12;
    let mut layers: BTreeMap<LayerId, Vec<String>> = BTreeMap::new();
    for (layer, expert) in experts.iter().take(MOST) {
        layers.entry(*layer).or_default().push(expert.to_string());
    }
    let of = |(layer, ids): (LayerId, Vec<String>)| format!("layer {layer}: {}", ids.join(", "));
    let mut text = layers.into_iter().map(of).collect::<Vec<_>>().join("; ");
    if experts.len() > MOST {
        text += " and others";
    }
    text
}

impl PlacementTable {
    /// This table without the `absent` ranks, which keep their numbers and hold nothing. `room[rank]`: how many
    /// experts a rank can hold over all layers.
    ///
    /// An expert that has a copy on a rank that is there moves to the first such. The others are spread over the
    /// ranks with room, evenly in each layer, and, where there is an `affinity` of this table's shape, so that few
    /// tokens cross between them and what stayed: layer after layer is solved exactly, its neighbours fixed, until
    /// nothing improves. Copies that no longer fit are given up. The result depends on nothing but the arguments.
    ///
    /// # Errors
    /// The experts that nobody has room for.
    pub fn without(
        &self,
        absent: &[Rank],
        room: &[usize],
        affinity: Option<&Affinity>,
    ) -> Result<Self, Shortage> {
        let there = |rank: Rank| !absent.contains(&rank);
        let mut table = Self {
            cost: None,
            lower_bound: None,
            gap: None,
            baselines: BTreeMap::new(),
            cost_with_replicas: None,
            ..self.clone()
        };
        let mut held = vec![0; self.ranks];
        let mut orphans = Vec::new();
        for (l, row) in table.assignment.iter_mut().enumerate() {
            for (e, holder) in row.iter_mut().enumerate() {
                let (layer, expert) = (LayerId::from(l), ExpertId::from(e));
                match self.holders(layer, expert).find(|rank| there(*rank)) {
                    Some(rank) => *holder = rank,
                    None => orphans.push((layer, expert)),
                }
                held[holder.index()] += usize::from(there(*holder));
            }
        }
        let homeless = table.spread(&orphans, &mut held, |rank| there(Rank::from(rank)), room);
        if !homeless.is_empty() {
            return Err(Shortage { experts: homeless });
        }
        let fits = |counts: &&Affinity| (counts.layers, counts.experts) == (self.layers, self.experts);
        if let Some(affinity) = affinity.filter(fits) {
            let cap = self.experts.div_ceil((0..self.ranks).filter(|&r| there(Rank::from(r))).count().max(1));
            let most = Most { of_layer: cap, room, absent };
            table.bring_together(&orphans, &mut held, most, affinity);
        }
        let mut kept: Vec<Replica> = Vec::new();
        for copy in self.replicas.iter().filter(|copy| there(copy.rank)) {
            let primary = table.assignment[copy.layer.index()][copy.expert.index()];
            if primary != copy.rank && held[copy.rank.index()] < room[copy.rank.index()] {
                held[copy.rank.index()] += 1;
                kept.push(*copy);
            }
        }
        table.set_replicas(kept);
        if let Some(affinity) = affinity {
            table.look_ahead(affinity);
        }
        Ok(table)
    }

    /// Gives each orphan to the rank with room that holds the fewest of its layer, then the fewest at all, then has
    /// the lowest number; returns those that nobody has room for.
    fn spread(
        &mut self,
        orphans: &[(LayerId, ExpertId)],
        held: &mut [usize],
        there: impl Fn(usize) -> bool,
        room: &[usize],
    ) -> Vec<(LayerId, ExpertId)> {
        let mut homeless = Vec::new();
        for &(layer, expert) in orphans {
            let row = &mut self.assignment[layer.index()];
            let of_layer = |rank: usize| row.iter().filter(|holder| holder.index() == rank).count();
            let fits = |rank: &usize| there(*rank) && held[*rank] < room[*rank];
            match (0..self.ranks).filter(fits).min_by_key(|&rank| (of_layer(rank), held[rank], rank)) {
                Some(rank) => {
                    row[expert.index()] = Rank::from(rank);
                    held[rank] += 1;
                }
                None => homeless.push((layer, expert)),
            }
        }
        homeless
    }

    /// Moves the orphans, and nothing else, to where their neighbours are: from where they are, from each layer put
    /// beside the one before it, and from each put beside the one after it; the best of the three.
    fn bring_together(
        &mut self,
        orphans: &[(LayerId, ExpertId)],
        held: &mut Vec<usize>,
        most: Most<'_>,
        affinity: &Affinity,
    ) {
        /// Far more than it takes; the cost falls with each that changes anything.
        const SWEEPS: usize = 64;
        let mut by_layer: BTreeMap<LayerId, Vec<ExpertId>> = BTreeMap::new();
        for &(layer, expert) in orphans {
            by_layer.entry(layer).or_default().push(expert);
        }
        let forth: Vec<_> = by_layer.iter().collect();
        let back: Vec<_> = by_layer.iter().rev().collect();
        let starts = [None, Some((&forth, Beside::Before)), Some((&back, Beside::After))];
        let tries = starts.map(|start| {
            let (mut table, mut held) = (self.clone(), held.clone());
            if let Some((layers, beside)) = start {
                table.sweep(layers, beside, &mut held, most, affinity);
            }
            for _ in 0..SWEEPS {
                if !table.sweep(&forth, Beside::Both, &mut held, most, affinity) {
                    break;
                }
            }
            (table.staying(affinity), table, held)
        });
        // Of equals the first.
        let best = tries.into_iter().reduce(|best, other| if other.0 > best.0 { other } else { best });
        if let Some((_, table, counts)) = best {
            (*self, *held) = (table, counts);
        }
    }

    /// Assigns each layer's orphans anew, exactly; returns whether any moved.
    fn sweep(
        &mut self,
        layers: &[(&LayerId, &Vec<ExpertId>)],
        beside: Beside,
        held: &mut [usize],
        most: Most<'_>,
        affinity: &Affinity,
    ) -> bool {
        let mut assigner = Assigner::new(self.ranks);
        let mut changed = false;
        for &(&layer, experts) in layers {
            let row = &self.assignment[layer.index()];
            let mut holders: Vec<u16> = experts.iter().map(|e| row[e.index()].0).collect();
            let before = holders.clone();
            let upper = (0..self.ranks).map(|rank| {
                let of_layer = row.iter().filter(|holder| holder.index() == rank).count();
                let orphans = holders.iter().filter(|&&holder| usize::from(holder) == rank).count();
                let free =
                    most.of_layer.saturating_sub(of_layer).min(most.room[rank].saturating_sub(held[rank]));
                if most.absent.contains(&Rank::from(rank)) { 0 } else { orphans + free }
            });
            let upper: Vec<usize> = upper.collect();
            let bounds = Bounds { least: &vec![0; self.ranks], most: &upper };
            let cost = self.crossings(layer, experts, beside, affinity);
            assigner.solve(&cost, &mut holders, bounds, 1e-9, &mut Vec::new());
            for ((expert, from), to) in experts.iter().zip(&before).zip(&holders) {
                held[usize::from(*from)] -= 1;
                held[usize::from(*to)] += 1;
                self.assignment[layer.index()][expert.index()] = Rank(*to);
            }
            changed |= before != holders;
        }
        changed
    }

    /// `[R, experts]`: minus the transitions that would stay on a rank if it held an expert of `layer`.
    fn crossings(
        &self,
        layer: LayerId,
        experts: &[ExpertId],
        beside: Beside,
        affinity: &Affinity,
    ) -> Vec<f64> {
        let (e, l) = (self.experts, layer.index());
        let mut cost = vec![0.0; self.ranks * experts.len()];
        for (from, to, counts) in self.pairs(affinity) {
            for (at, expert) in experts.iter().enumerate() {
                let mut stays = |rank: Rank, count: f64| cost[rank.index() * experts.len() + at] -= count;
                if to == l && beside != Beside::After {
                    let rows = self.assignment[from].iter().zip(counts.chunks_exact(e));
                    rows.for_each(|(&rank, row)| stays(rank, row[expert.index()]));
                }
                if from == l && beside != Beside::Before {
                    let row = &counts[expert.index() * e..][..e];
                    self.assignment[to].iter().zip(row).for_each(|(&rank, &count)| stays(rank, count));
                }
            }
        }
        cost
    }

    /// Layers that follow each other, with the counts `[E, E]` between them.
    fn pairs<'a>(&self, affinity: &'a Affinity) -> impl Iterator<Item = (usize, usize, &'a [f64])> + use<'a> {
        let last = self.layers.saturating_sub(1);
        // A layer that followed itself would not be fixed while it is solved.
        let wrap = affinity.wrap.as_deref().filter(|_| last > 0).map(|counts| (last, 0, counts));
        (0..last).map(|l| (l, l + 1, affinity.transition(l))).chain(wrap)
    }

    /// Transitions that stay on a rank.
    fn staying(&self, affinity: &Affinity) -> f64 {
        let of_pair = |(from, to, counts): (usize, usize, &[f64])| -> f64 {
            let (from, to) = (&self.assignment[from], &self.assignment[to]);
            let rows = from.iter().zip(counts.chunks_exact(self.experts));
            let row = |(rank, row): (&Rank, &[f64])| -> f64 {
                to.iter().zip(row).filter(|(other, _)| *other == rank).map(|(_, count)| count).sum()
            };
            rows.map(row).sum()
        };
        self.pairs(affinity).map(of_pair).sum()
    }
}

/// Which neighbours count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Before,
    After,
    Both,
}

/// What a rank may hold.
#[derive(Clone, Copy)]
struct Most<'a> {
    /// Of one layer.
    of_layer: usize,
    /// Of all layers together, by rank.
    room: &'a [usize],
    /// These hold nothing.
    absent: &'a [Rank],
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMPLE: [usize; 4] = [usize::MAX; 4];

    #[test]
    fn what_is_there_stays_and_orphans_are_spread() {
        let table = PlacementTable::round_robin(3, 8, 4);
        let rest = table.without(&[Rank(2)], &AMPLE, None).unwrap();
        rest.check().unwrap();
        for (before, after) in table.assignment.iter().flatten().zip(rest.assignment.iter().flatten()) {
            assert!(before == after || *before == Rank(2) && *after != Rank(2));
        }
        assert_eq!(rest.experts_per_rank(), [8, 8, 0, 8]);
        assert_eq!(table.without(&[], &AMPLE, None).unwrap().assignment, table.assignment);
        assert_eq!(
            table.without(&[Rank(1), Rank(2), Rank(3)], &AMPLE, None).unwrap().experts_per_rank()[0],
            24
        );
    }

    #[test]
    fn copies_take_over_and_yield_where_room_is_short() {
        let mut table = PlacementTable::linear(1, 4, 4);
        let copy = |expert, rank| Replica { layer: LayerId(0), expert: ExpertId(expert), rank: Rank(rank) };
        table.set_replicas(vec![copy(2, 0), copy(0, 3), copy(1, 3)]);
        let rest = table.without(&[Rank(2)], &[2, 1, 2, 2], None).unwrap();
        assert_eq!(rest.assignment[0], [0, 1, 0, 3].map(Rank), "rank 0 had a copy of expert 2");
        assert_eq!(rest.replicas, [copy(0, 3)], "one of rank 3's copies still fits");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let table = PlacementTable::round_robin(2, 4, 2);
        let shortage = table.without(&[Rank(1)], &[6, 0], None).unwrap_err();
        assert_eq!(shortage.experts, [(LayerId(1), ExpertId(1)), (LayerId(1), ExpertId(3))]);
        assert_eq!(shortage.to_string(), "no room for 2 of the experts: layer 1: 1, 3");
    }

    /// Transitions that cross, of all.
    fn crossing(table: &PlacementTable, affinity: &Affinity) -> f64 {
        let cross = |l: usize, next: usize, counts: &[f64]| -> f64 {
            let pair = |i: usize| {
                let (from, to) = (i / table.experts, i % table.experts);
                table.assignment[l][from] != table.assignment[next][to]
            };
            counts.iter().enumerate().filter(|(i, _)| pair(*i)).map(|(_, count)| count).sum()
        };
        let inner: f64 = (1..table.layers).map(|l| cross(l - 1, l, affinity.transition(l - 1))).sum();
        inner + affinity.wrap.as_ref().map_or(0.0, |wrap| cross(table.layers - 1, 0, wrap))
    }

    #[test]
    fn chains_of_orphans_stay_together() {
        // Expert e is always followed by expert e, so that a good table loses nothing with a rank.
        let (layers, experts) = (5, 8);
        let mut affinity = Affinity::zeros(layers, experts);
        for pair in 0..layers - 1 {
            (0..experts).for_each(|e| affinity.transitions[(pair * experts + e) * experts + e] = 1.0);
        }
        let table = PlacementTable::linear(layers, experts, 4);
        assert_eq!(crossing(&table, &affinity), 0.0);
        let blind = table.without(&[Rank(2)], &AMPLE, None).unwrap();
        let rest = table.without(&[Rank(2)], &AMPLE, Some(&affinity)).unwrap();
        assert!(crossing(&blind, &affinity) > 0.0, "spreading alone tears chains apart");
        assert_eq!(crossing(&rest, &affinity), 0.0);
        for row in &rest.assignment {
            let most = (0..4).map(|r| row.iter().filter(|h| **h == Rank(r)).count()).max();
            assert_eq!(most, Some(3), "eight experts on three ranks");
        }
    }

    #[test]
    fn affinity_never_costs_room_balance_or_crossings() {
        let mut rng = crate::rng::Rng::new(7);
        let mut gained = 0;
        for case in 0..60 {
            let (layers, experts, ranks) = (1 + case % 4, 6 + case % 5, 3 + case % 2);
            let mut affinity = Affinity::zeros(layers, experts);
            affinity.transitions.iter_mut().for_each(|count| *count = rng.below(20) as f64);
            if let Some(wrap) = affinity.wrap.as_mut().filter(|_| layers > 1 && case % 3 == 0) {
                wrap.iter_mut().for_each(|count| *count = rng.below(20) as f64);
            }
            let table = PlacementTable::round_robin(layers, experts, ranks);
            let absent = [Rank((case % ranks) as u16)];
            let room: Vec<usize> = (0..ranks).map(|r| layers * experts / 2 + r).collect();
            let blind = table.without(&absent, &room, None).unwrap();
            let rest = table.without(&absent, &room, Some(&affinity)).unwrap();
            rest.check().unwrap();
            assert!(crossing(&rest, &affinity) <= crossing(&blind, &affinity), "case {case}");
            gained += usize::from(crossing(&rest, &affinity) < crossing(&blind, &affinity));
            assert!(rest.experts_per_rank().iter().zip(&room).all(|(held, room)| held <= room));
            for ((before, blind), after) in
                table.assignment.iter().zip(&blind.assignment).zip(&rest.assignment)
            {
                assert!(
                    before.iter().zip(after).all(|(b, a)| b == a || absent.contains(b)),
                    "what is there stays"
                );
                let most =
                    |row: &[Rank]| (0..ranks).map(|r| row.iter().filter(|h| h.index() == r).count()).max();
                assert!(most(after) <= most(blind).max(Some(experts.div_ceil(ranks - 1))), "case {case}");
            }
        }
        assert!(gained > 20, "{gained}");
    }
}
