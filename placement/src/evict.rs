//! A table for those who are there: what absent ranks hold goes to the others, everything else stays where it is.

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
    /// An expert that has a copy on a rank that is there moves to the first such; any other goes to the rank with room
    /// that holds the fewest of its layer, then the fewest at all, then has the lowest number. Copies that no longer
    /// fit are given up. The result depends on nothing but the arguments.
    pub fn without(&self, absent: &[Rank], room: &[usize]) -> Result<Self, Shortage> {
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
        let mut homeless = Vec::new();
        for (layer, expert) in orphans {
            let row = &mut table.assignment[layer.index()];
            let of_layer = |rank: usize| row.iter().filter(|holder| holder.index() == rank).count();
            let fits = |rank: &usize| there(Rank::from(*rank)) && held[*rank] < room[*rank];
            match (0..self.ranks).filter(fits).min_by_key(|&rank| (of_layer(rank), held[rank], rank)) {
                Some(rank) => {
                    row[expert.index()] = Rank::from(rank);
                    held[rank] += 1;
                }
                None => homeless.push((layer, expert)),
            }
        }
        if !homeless.is_empty() {
            return Err(Shortage { experts: homeless });
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
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMPLE: [usize; 4] = [usize::MAX; 4];

    #[test]
    fn what_is_there_stays_and_orphans_are_spread() {
        let table = PlacementTable::round_robin(3, 8, 4);
        let rest = table.without(&[Rank(2)], &AMPLE).unwrap();
        rest.check().unwrap();
        for (before, after) in table.assignment.iter().flatten().zip(rest.assignment.iter().flatten()) {
            assert!(before == after || *before == Rank(2) && *after != Rank(2));
        }
        assert_eq!(rest.experts_per_rank(), [8, 8, 0, 8]);
        assert_eq!(table.without(&[], &AMPLE).unwrap().assignment, table.assignment);
        assert_eq!(table.without(&[Rank(1), Rank(2), Rank(3)], &AMPLE).unwrap().experts_per_rank()[0], 24);
    }

    #[test]
    fn copies_take_over_and_yield_where_room_is_short() {
        let mut table = PlacementTable::linear(1, 4, 4);
        let copy = |expert, rank| Replica { layer: LayerId(0), expert: ExpertId(expert), rank: Rank(rank) };
        table.set_replicas(vec![copy(2, 0), copy(0, 3), copy(1, 3)]);
        let rest = table.without(&[Rank(2)], &[2, 1, 2, 2]).unwrap();
        assert_eq!(rest.assignment[0], [0, 1, 0, 3].map(Rank), "rank 0 had a copy of expert 2");
        assert_eq!(rest.replicas, [copy(0, 3)], "one of rank 3's copies still fits");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let table = PlacementTable::round_robin(2, 4, 2);
        let shortage = table.without(&[Rank(1)], &[6, 0]).unwrap_err();
        assert_eq!(shortage.experts, [(LayerId(1), ExpertId(1)), (LayerId(1), ExpertId(3))]);
        assert_eq!(shortage.to_string(), "no room for 2 of the experts: layer 1: 1, 3");
    }
}
