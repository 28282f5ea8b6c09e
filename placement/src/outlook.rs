//! What lies ahead of a token of several experts: how many of its next layer's experts each rank is expected to hold, by
//! the experts that it chose now. It decides between ranks that could all be the token's next residence.

use serde::{Deserialize, Serialize};

use crate::affinity::Affinity;
use crate::ids::{ExpertId, LayerId, Rank};
use crate::table::PlacementTable;

/// Steps of one expected expert: whole numbers, so that every rank and every file says the same.
const STEPS: f64 = 1000.0;

/// Frames that another rank must save more than where a token would go on by weight: what a token has chosen at the layers
/// before, which counts of pairs do not tell, speaks for where it is.
pub(crate) const MARGIN: f64 = 0.1;

/// Expected numbers of experts, made from counts for one table and carried with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Outlook {
    /// `[L, E, R]` thousandths: of a token that chose the expert, choices of the next MoE layer (after the last: of its
    /// successor's first) that the rank holds a copy of.
    held: Vec<u16>,
}

impl Outlook {
    /// Numbers that a table of this shape has.
    pub(crate) fn len_of(table: &PlacementTable) -> usize {
        table.layers * table.experts * table.ranks
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    /// Of the table as it is. None for counts of another shape, without loads, or of one expert a token, whose next
    /// residence is where that expert is.
    pub(crate) fn of(table: &PlacementTable, affinity: &Affinity) -> Option<Self> {
        let (layers, experts) = (affinity.layers, affinity.experts);
        if (layers, experts) != (table.layers, table.experts) || affinity.check().is_err() {
            return None;
        }
        let load = affinity.load.as_ref()?;
        let pairs: f64 = affinity.transitions.iter().sum();
        let leaving: f64 = load[..experts * (layers - 1)].iter().sum();
        if pairs <= 1.01 * leaving {
            return None;
        }
        let mut held = vec![0; Self::len_of(table)];
        for layer in 0..layers {
            let (counts, next) = match layer + 1 == layers {
                true => (affinity.wrap.as_deref(), 0),
                false => (Some(affinity.transition(layer)), layer + 1),
            };
            let Some(counts) = counts else { continue };
            let holders: Vec<Vec<Rank>> = (0..experts)
                .map(|expert| table.holders(LayerId::from(next), ExpertId::from(expert)).collect())
                .collect();
            for expert in 0..experts {
                let row = &counts[expert * experts..][..experts];
                let mut sums = vec![0.0; table.ranks];
                for (count, holders) in row.iter().zip(&holders) {
                    holders.iter().for_each(|rank| sums[rank.index()] += count);
                }
                let tokens = load[layer * experts + expert].max(1.0);
                let to = &mut held[(layer * experts + expert) * table.ranks..][..table.ranks];
                for (to, sum) in to.iter_mut().zip(sums) {
                    *to = (STEPS * sum / tokens).round().clamp(0.0, f64::from(u16::MAX)) as u16;
                }
            }
        }
        Some(Self { held })
    }

    /// Choices of the next layer that `rank` is expected to hold for a token that chose `experts` at `layer`, in
    /// thousandths: the mean over what each of them says.
    fn expected(&self, table: &PlacementTable, layer: LayerId, experts: &[ExpertId], rank: Rank) -> f64 {
        let of = |expert: &ExpertId| {
            let at = (layer.index() * table.experts + expert.index()) * table.ranks + rank.index();
            f64::from(self.held.get(at).copied().unwrap_or(0))
        };
        experts.iter().map(of).sum::<f64>() / (STEPS * experts.len().max(1) as f64)
    }

    /// The row of the next dispatch that a token saves by going on at `rank`: how probably any of its next experts is there
    /// (as if their numbers were Poisson's).
    pub(crate) fn met(
        &self,
        table: &PlacementTable,
        (layer, experts): (LayerId, &[ExpertId]),
        rank: Rank,
    ) -> f64 {
        1.0 - (-self.expected(table, layer, experts, rank)).exp()
    }
}

impl PlacementTable {
    /// Has the next residence of tokens with several experts decided by what these counts say of the layer after. Counts
    /// that do not fit, and those of one expert a token, change nothing.
    pub fn look_ahead(&mut self, affinity: &Affinity) {
        self.outlook = Outlook::of(self, affinity);
    }
}

#[cfg(test)]
#[path = "outlook_tests.rs"]
mod tests;
