//! Whether experts should move, by what has been counted lately.

use crate::affinity::Affinity;
use crate::assign::{Assigner, Bounds};
use crate::capacity::Balance;
use crate::cost::Weights;
use crate::ids::{ExpertId, LayerId, Rank};
use crate::replicas::predicted_cost;
use crate::solve::{SolveError, SolveOptions, solve};
use crate::table::PlacementTable;
use crate::topology::Topology;

/// Another table, and what it is worth.
#[derive(Debug, Clone, PartialEq)]
pub struct Reconsidered {
    /// The table to move to. Ranks have the numbers by which the fewest experts move.
    pub table: PlacementTable,
    /// Crossings per token under the table that is in use, by counts that the other one was not solved on.
    pub crossings_now: f64,
    /// The same under the other one.
    pub crossings_then: f64,
    /// Experts that ranks hold there and not here, over all layers, copies included.
    pub moved: usize,
}

/// What a move costs and what it can bring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoveTerms {
    /// Seconds that a crossing takes, all that a token waits for included.
    pub seconds_per_crossing: f64,
    /// Seconds that it takes to move an expert.
    pub seconds_per_expert: f64,
    /// Tokens that are expected to be like those that were counted.
    pub tokens: f64,
    /// The share of crossings that must be saved in any case: less may be chance, or gone tomorrow.
    pub least_share: f64,
}

impl Reconsidered {
    /// Seconds that the move saves over the tokens that are expected.
    pub fn saved_seconds(&self, terms: &MoveTerms) -> f64 {
        (self.crossings_now - self.crossings_then) * terms.seconds_per_crossing * terms.tokens
    }

    /// Whether that is more than what moving costs, and no small share of what there is.
    pub fn pays(&self, terms: &MoveTerms) -> bool {
        let saved = self.crossings_now - self.crossings_then;
        let costs = self.moved as f64 * terms.seconds_per_expert;
        saved > terms.least_share * self.crossings_now && self.saved_seconds(terms) > costs
    }
}

/// Solves anew for `counts` and compares with the table `now`: what is learnt on one half of the counts is scored on
/// the other, so that a gain that is none does not look like one. Links count as equal. Where `now` has copies the other
/// table has, too: a rank has as many slots of each layer as it holds experts in the mean.
///
/// # Errors
/// Counts that make no sense, or are of another model.
pub fn reconsider(
    now: &PlacementTable,
    counts: &Affinity,
    options: &SolveOptions,
) -> Result<Reconsidered, SolveError> {
    counts.check()?;
    now.check_fits(counts.layers, counts.experts, now.ranks, None)?;
    let (learnt, apart) = counts.split(0.5, options.seed);
    let (mut topology, mut options) = (Topology::uniform(now.ranks), options.clone());
    let slots: Vec<usize> = now.experts_per_rank().iter().map(|held| held.div_ceil(now.layers)).collect();
    options.replicas = !now.replicas.is_empty();
    if options.replicas {
        options.balance = Balance::Layer;
        topology.ranks.iter_mut().zip(&slots).for_each(|(rank, &slots)| rank.slots = Some(slots));
    }
    let mut table = solve(&learnt, &topology, &options, &mut |_| {})?;
    table.keep_numbers(now, &slots);
    table.look_ahead(&learnt);
    table.model_digest.clone_from(&now.model_digest);
    table.source = Some("counted while it ran".into());
    let tokens = apart.transitions.iter().sum::<f64>() / apart.layers.saturating_sub(1).max(1) as f64;
    let crossings = |table: &PlacementTable| {
        predicted_cost(table, &apart, &topology, &Weights::default()) / tokens.max(1.0)
    };
    let moved = table.held_anew(now);
    Ok(Reconsidered { crossings_now: crossings(now), crossings_then: crossings(&table), moved, table })
}

impl PlacementTable {
    /// Every expert of every layer.
    fn all_experts(&self) -> impl Iterator<Item = (LayerId, ExpertId)> {
        let (layers, experts) = (self.layers, self.experts);
        (0..layers).flat_map(move |l| (0..experts).map(move |e| (LayerId::from(l), ExpertId::from(e))))
    }

    /// Experts that ranks hold and do not hold by `other`.
    fn held_anew(&self, other: &Self) -> usize {
        let of = |(layer, expert)| {
            let before: Vec<Rank> = other.holders(layer, expert).collect();
            self.holders(layer, expert).filter(|rank| !before.contains(rank)).count()
        };
        self.all_experts().map(of).sum()
    }

    /// Numbers the ranks so that as many experts as can be are where `other` has them: a table is as good with any, but
    /// that a rank takes the number of one with as many `slots` (`[R]`).
    fn keep_numbers(&mut self, other: &Self, slots: &[usize]) {
        /// More than all experts that may stay are worth.
        const NEVER: f64 = 1e12;
        let ranks = self.ranks;
        let mut cost = vec![0.0; ranks * ranks];
        let copies = !self.replicas.is_empty();
        for (to, here) in (0..ranks).flat_map(|to| (0..ranks).map(move |here| (to, here))) {
            cost[to * ranks + here] = if copies && slots[to] != slots[here] { NEVER } else { 0.0 };
        }
        for (layer, expert) in self.all_experts() {
            for here in self.holders(layer, expert) {
                for there in other.holders(layer, expert) {
                    cost[there.index() * ranks + here.index()] -= 1.0;
                }
            }
        }
        let mut numbers: Vec<u16> = (0..ranks as u16).collect();
        let one = vec![1; ranks];
        let bounds = Bounds { least: &one, most: &one };
        Assigner::new(ranks).solve(&cost, &mut numbers, bounds, 1e-9, &mut Vec::new());
        self.assignment.iter_mut().flatten().for_each(|rank| *rank = Rank(numbers[rank.index()]));
        let mut copies = std::mem::take(&mut self.replicas);
        copies.iter_mut().for_each(|copy| copy.rank = Rank(numbers[copy.rank.index()]));
        self.set_replicas(copies);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::Generator;
    use std::time::Duration;

    fn quick() -> SolveOptions {
        SolveOptions { max_rounds: Some(40), time_limit: Duration::from_secs(60), ..SolveOptions::default() }
    }

    fn counts(seed: u64) -> Affinity {
        Affinity::from_trace(&Generator::new(5, 16, 1).trace(4000, seed, seed), 16).unwrap()
    }

    #[test]
    fn other_text_calls_for_another_table_and_the_same_does_not() {
        let (one, other) = (counts(1), counts(2));
        let first = reconsider(&PlacementTable::round_robin(5, 16, 4), &one, &quick()).unwrap();
        let terms = MoveTerms {
            seconds_per_crossing: 1e-3,
            seconds_per_expert: 0.01,
            tokens: 4000.0,
            least_share: 0.05,
        };
        assert!(first.pays(&terms), "{} to {}", first.crossings_now, first.crossings_then);
        let same = reconsider(&first.table, &one, &quick()).unwrap();
        assert!(!same.pays(&terms), "{} to {}", same.crossings_now, same.crossings_then);
        let shifted = reconsider(&first.table, &other, &quick()).unwrap();
        assert!(shifted.pays(&terms), "{} to {}", shifted.crossings_now, shifted.crossings_then);
        // Links that cost nothing, experts that take for ever to move, or little text: not worth it.
        assert!(!shifted.pays(&MoveTerms { seconds_per_crossing: 0.0, ..terms }));
        assert!(!shifted.pays(&MoveTerms { seconds_per_expert: 10.0, ..terms }));
        assert!(!shifted.pays(&MoveTerms { tokens: 1.0, ..terms }));
    }

    #[test]
    fn ranks_keep_their_numbers_as_far_as_they_can() {
        let table = PlacementTable::round_robin(3, 8, 4);
        let mut turned = table.clone();
        turned.assignment.iter_mut().flatten().for_each(|rank| *rank = Rank((rank.0 + 1) % 4));
        turned.keep_numbers(&table, &[6; 4]);
        assert_eq!(turned.assignment, table.assignment);
    }

    #[test]
    fn a_table_with_copies_is_followed_by_one_with_no_more_of_them() {
        let (layers, experts, ranks) = (5, 16, 4);
        let slots = [7, 5, 7, 5];
        let mut topology = Topology::uniform(ranks);
        topology.ranks.iter_mut().zip(slots).for_each(|(rank, slots)| rank.slots = Some(slots));
        let options = SolveOptions { balance: Balance::Layer, ..quick() };
        let now = solve(&counts(1), &topology, &options, &mut |_| {}).unwrap();
        assert!(now.replicas.len() > layers);
        let next = reconsider(&now, &counts(2), &quick()).unwrap();
        let held = next.table.experts_per_rank();
        assert!(!next.table.replicas.is_empty() && next.table.check().is_ok());
        assert!(held.iter().zip(slots).all(|(&held, slots)| held <= layers * slots), "{held:?}");
        assert!(next.crossings_then < 0.9 * next.crossings_now, "{next:?}");
        // Copies save more than the best table without any.
        let alone =
            reconsider(&PlacementTable::round_robin(layers, experts, ranks), &counts(2), &quick()).unwrap();
        assert!(next.crossings_then < alone.crossings_then);
        // What is read is what is not there: a copy that stays, whoever was the first to hold it, is not.
        assert_eq!(next.table.held_anew(&next.table), 0);
        assert!(next.moved > 0 && next.moved <= held.iter().sum());
        let same = reconsider(&next.table, &counts(2), &quick()).unwrap();
        assert!(
            same.crossings_then > 0.95 * same.crossings_now,
            "{} {}",
            same.crossings_now,
            same.crossings_then
        );
    }

    #[test]
    fn what_lies_ahead_goes_by_the_numbers_that_ranks_keep() {
        let counts = Affinity::from_trace(&Generator::new(4, 8, 2).trace(3000, 3, 3), 8).unwrap();
        let now = PlacementTable::round_robin(4, 8, 4);
        let next = reconsider(&now, &counts, &quick()).unwrap();
        let mut anew = next.table.clone();
        anew.look_ahead(&counts.split(0.5, quick().seed).0);
        assert!(next.table.outlook.is_some());
        assert_eq!(next.table.outlook, anew.outlook);
    }

    #[test]
    fn counts_of_another_model_are_refused() {
        let other = Affinity::zeros(4, 16);
        assert!(reconsider(&PlacementTable::round_robin(5, 16, 4), &other, &quick()).is_err());
    }
}
