//! Route plan of one token at one layer: experts chosen -> ranks that serve them -> next residence.
//! Pure and deterministic: every rank that computes it gets the same answer.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{ExpertId, LayerId, Rank};
use crate::outlook;
use crate::table::PlacementTable;

/// Where a token goes after its experts ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Back home after every layer: two exchanges a layer.
    Vanilla,
    /// It stays with the expert that served it: one exchange a layer.
    Coherent,
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Vanilla => "vanilla",
            Self::Coherent => "coherent",
        })
    }
}

/// The text names no strategy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown strategy {0:?}: say vanilla or coherent")]
pub struct UnknownStrategy(String);

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "vanilla" => Ok(Self::Vanilla),
            "coherent" => Ok(Self::Coherent),
            _ => Err(UnknownStrategy(text.to_owned())),
        }
    }
}

/// One token's way through one MoE layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// `[K]`: the rank that serves the k-th chosen expert.
    pub serving: Vec<Rank>,
    /// g1: the residence at the next layer.
    pub next: Rank,
}

impl Route {
    /// S: the distinct serving ranks, ascending.
    pub fn ranks(&self) -> Vec<Rank> {
        let mut ranks = self.serving.clone();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }
}

impl PlacementTable {
    /// The route of a token that resides on `residence` and chose `experts` with router `weights` (both
    /// `[K]`, largest weight first). An expert is served on the residence where a copy is there, else on
    /// a rank that serves another choice already, else on its primary.
    pub fn route(
        &self,
        strategy: Strategy,
        layer: LayerId,
        residence: Rank,
        experts: &[ExpertId],
        weights: &[f32],
    ) -> Route {
        let serving = self.serving(layer, residence, experts);
        let next = match strategy {
            Strategy::Vanilla => residence,
            Strategy::Coherent => self.next_residence(layer, &serving, residence, experts, weights),
        };
        Route { serving, next }
    }

    /// Where a token goes on: the rank of S that saves most, by weight between equals; with an outlook another one where it is
    /// expected to save clearly more.
    fn next_residence(
        &self,
        layer: LayerId,
        serving: &[Rank],
        residence: Rank,
        experts: &[ExpertId],
        weights: &[f32],
    ) -> Rank {
        let by_weight = by_weight(serving, residence, weights);
        if serving.len() < 2 {
            return by_weight;
        }
        let now = |rank: Rank| saved_now(serving, residence, rank);
        let most = |than: Rank, margin: f64, saved: &dyn Fn(Rank) -> f64| {
            let ranks = serving.iter().map(|&rank| (saved(rank), rank));
            ranks.fold((saved(than) + margin, than), |best, next| if next.0 > best.0 { next } else { best }).1
        };
        let without = most(by_weight, 0.0, &|rank| f64::from(now(rank)));
        let Some(outlook) = &self.outlook else { return without };
        let ahead = |rank: Rank| f64::from(now(rank)) + outlook.met(self, (layer, experts), rank);
        most(without, outlook::MARGIN, &ahead)
    }

    fn serving(&self, layer: LayerId, residence: Rank, experts: &[ExpertId]) -> Vec<Rank> {
        let fixed: Vec<Option<Rank>> =
            experts.iter().map(|&expert| self.only_choice(layer, residence, expert)).collect();
        let mut used: Vec<Rank> = fixed.iter().copied().flatten().collect();
        let mut serve = |(&expert, fixed): (&ExpertId, Option<Rank>)| {
            fixed.unwrap_or_else(|| {
                let shared = self.holders(layer, expert).find(|rank| used.contains(rank));
                let rank = shared.or_else(|| self.holders(layer, expert).next()).unwrap_or(residence);
                used.push(rank);
                rank
            })
        };
        experts.iter().zip(fixed).map(&mut serve).collect()
    }

    /// The residence where it holds the expert, the single holder where there is one, else open.
    fn only_choice(&self, layer: LayerId, residence: Rank, expert: ExpertId) -> Option<Rank> {
        let mut holders = self.holders(layer, expert);
        let first = holders.next()?;
        if first == residence {
            return Some(residence);
        }
        let mut several = false;
        for copy in holders {
            several = true;
            if copy == residence {
                return Some(residence);
            }
        }
        (!several).then_some(first)
    }
}

/// Crossings that a token saves at this layer by going on at `rank`: the partials that are made there; and one more where
/// nobody but `rank` and the residence serves it, as then its row and the residence's partials travel at once, where
/// one that stays waits for a row to go and a partial to come back.
fn saved_now(serving: &[Rank], residence: Rank, rank: Rank) -> u32 {
    let here = serving.iter().filter(|serves| **serves == rank).count() as u32;
    let at_once = rank != residence && serving.iter().all(|serves| [residence, rank].contains(serves));
    here + u32::from(at_once)
}

/// The residence if it serves a choice, else the rank of the largest weight (of equal ones the earlier).
fn by_weight(serving: &[Rank], residence: Rank, weights: &[f32]) -> Rank {
    if serving.contains(&residence) {
        return residence;
    }
    let weight = |k: usize| weights.get(k).copied().unwrap_or(f32::NEG_INFINITY);
    let best = (0..serving.len()).reduce(|best, k| if weight(k) > weight(best) { k } else { best });
    best.map_or(residence, |k| serving[k])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Replica;

    fn table() -> PlacementTable {
        // expert e on rank e; expert 1 also on 0 and 3
        let mut table = PlacementTable::linear(1, 4, 4);
        let copy = |rank| Replica { layer: LayerId(0), expert: ExpertId(1), rank: Rank(rank) };
        table.set_replicas(vec![copy(0), copy(3)]);
        table
    }

    fn route(residence: u16, experts: &[u16], weights: &[f32]) -> (Vec<u16>, u16) {
        let experts: Vec<_> = experts.iter().map(|&e| ExpertId(e)).collect();
        let route = table().route(Strategy::Coherent, LayerId(0), Rank(residence), &experts, weights);
        (route.serving.iter().map(|r| r.0).collect(), route.next.0)
    }

    #[test]
    fn prefers_the_residence_then_a_shared_rank_then_the_primary() {
        assert_eq!(route(0, &[1], &[1.0]), (vec![0], 0));
        assert_eq!(route(2, &[1], &[1.0]), (vec![1], 1));
        assert_eq!(route(2, &[1, 3], &[0.5, 0.5]), (vec![3, 3], 3));
    }

    #[test]
    fn a_token_that_two_ranks_serve_goes_from_one_to_the_other() {
        assert_eq!(route(2, &[2, 1], &[0.6, 0.4]), (vec![2, 1], 1), "row and partial travel at once");
        assert_eq!(route(2, &[2, 2], &[0.6, 0.4]), (vec![2, 2], 2));
        // Of three ranks none is without a way there and a way back; one with two experts saves a partial.
        assert_eq!(route(2, &[2, 1, 3], &[0.5, 0.3, 0.2]), (vec![2, 3, 3], 3));
        assert_eq!(route(2, &[0, 2, 3], &[0.5, 0.3, 0.2]).1, 2);
    }

    #[test]
    fn the_largest_weight_decides_and_ties_go_to_the_earlier() {
        assert_eq!(route(1, &[2, 3], &[0.4, 0.6]).1, 3);
        assert_eq!(route(1, &[2, 3], &[0.5, 0.5]).1, 2);
        let at_home = table().route(Strategy::Vanilla, LayerId(0), Rank(3), &[ExpertId(0)], &[1.0]);
        assert_eq!((at_home.serving, at_home.next), (vec![Rank(0)], Rank(3)));
    }

    #[test]
    fn strategies_are_words() {
        assert_eq!("coherent".parse(), Ok(Strategy::Coherent));
        assert!("auto".parse::<Strategy>().is_err());
        assert_eq!(serde_json::to_string(&Strategy::Vanilla).unwrap(), "\"vanilla\"");
    }
}
