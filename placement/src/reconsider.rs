//! Whether experts should move, by what has been counted lately.

use crate::affinity::Affinity;
use crate::assign::{Assigner, Bounds};
use crate::ids::Rank;
use crate::score::score_affinity;
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
    /// Experts that change their rank, over all layers.
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
/// the other, so that a gain that is none does not look like one. Links count as equal.
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
    let topology = Topology::uniform(now.ranks);
    let (learnt, apart) = counts.split(0.5, options.seed);
    let options = SolveOptions { replicas: false, ..options.clone() };
    let mut table = solve(&learnt, &topology, &options, &mut |_| {})?;
    table.keep_numbers(now);
    table.model_digest.clone_from(&now.model_digest);
    table.source = Some("counted while it ran".into());
    let crossings = |table: &PlacementTable| score_affinity(table, &apart, &topology).crossings_per_token;
    let holders = now.assignment.iter().flatten().zip(table.assignment.iter().flatten());
    let moved = holders.filter(|(before, after)| before != after).count();
    Ok(Reconsidered { crossings_now: crossings(now), crossings_then: crossings(&table), moved, table })
}

impl PlacementTable {
    /// Numbers the ranks so that as many experts as can be are where `other` has them: a table is as good with any.
    fn keep_numbers(&mut self, other: &Self) {
        let ranks = self.ranks;
        let mut cost = vec![0.0; ranks * ranks];
        for (here, there) in self.assignment.iter().flatten().zip(other.assignment.iter().flatten()) {
            cost[there.index() * ranks + here.index()] -= 1.0;
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
        turned.keep_numbers(&table);
        assert_eq!(turned.assignment, table.assignment);
    }

    #[test]
    fn counts_of_another_model_are_refused() {
        let other = Affinity::zeros(4, 16);
        assert!(reconsider(&PlacementTable::round_robin(5, 16, 4), &other, &quick()).is_err());
    }
}
