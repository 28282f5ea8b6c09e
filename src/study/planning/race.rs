//! Candidates that may be the best by their predictions decode on trial by turns, until one is, or nearly.

use super::{Ranked, Trials};
use crate::study::{Candidate, StudyError};
use exflow_engine::Cluster;
use std::time::{Duration, Instant};

/// How far, as a logarithm, predictions of one world commonly are from the truth beside each other: the standard deviation
/// within 15 cells of 12 settings, 0.02 to 0.2 by cell, the most where ranks share their cores.
const PREDICTED: f64 = 0.1;
/// A candidate leaves the race once it is unlikely to be better than the first one by more than [`NEARLY`]: standard deviations
/// of what lies between the two.
const UNLIKELY: f64 = 2.0;
/// As a logarithm: less than this is not worth a turn.
const NEARLY: f64 = 0.03;
/// So many race at most.
const CONTENDERS: usize = 6;
/// No further turn begins once a race took so long, or had so many times the turns that ways have in trials to learn from.
const PATIENCE: Duration = Duration::from_secs(20);
const MOST_TURNS: usize = 4;

/// Has the cluster decode as each of those says that may be the best; `ranked` come best first, and those that were tried
/// are expected to make what prediction and trials come to. How many of the first ones were.
///
/// # Errors
/// What the engine refuses.
pub(super) fn run(
    ranked: &mut [Ranked],
    sequences: usize,
    turns: usize,
    cluster: &mut Cluster,
) -> Result<usize, StudyError> {
    let mut race = Race::among(ranked);
    let ways = race.racing.iter().map(|&which| ranked[which].candidate.clone()).collect();
    let (mut trials, began) = (Trials::new(ways, sequences, Candidate::apply), Instant::now());
    let contenders = race.racing.len();
    for _ in 0..MOST_TURNS * turns {
        if race.is_over() || began.elapsed() >= PATIENCE {
            break;
        }
        trials.whole_turn(cluster)?;
        let tried: Vec<f64> = trials.usual().iter().map(|(_, tried)| tried.tokens_per_s).collect();
        trials.retain(&race.judge(ranked, &tried, trials.variance()));
    }
    Ok(contenders)
}

/// Those that may still be the best, by their places.
struct Race {
    racing: Vec<usize>,
}

impl Race {
    fn among(ranked: &[Ranked]) -> Self {
        let mut all = Self { racing: (0..ranked.len()).collect() };
        all.leave(ranked, f64::INFINITY);
        all.racing.truncate(CONTENDERS);
        all
    }

    fn is_over(&self) -> bool {
        self.racing.len() < 2
    }

    /// Goes on with those that may still be the best after what each of them made on trial, in tokens per second of which the
    /// logarithm has this variance; who of them does.
    fn judge(&mut self, ranked: &mut [Ranked], tried: &[f64], variance: f64) -> Vec<bool> {
        for (&which, &tried) in self.racing.iter().zip(tried) {
            ranked[which].tried = Some(tried);
        }
        self.weigh(ranked, variance);
        let before = self.racing.clone();
        self.leave(ranked, variance);
        before.iter().map(|which| self.racing.contains(which)).collect()
    }

    /// What is expected of each: the mean of what the prediction and the trials say, each by the inverse of its variance. All
    /// together are expected to make what they were before, as what trials have in common is the mood of their minute.
    fn weigh(&self, ranked: &mut [Ranked], variance: f64) {
        let of_trials = certainty(variance) / (certainty(variance) + certainty(PREDICTED * PREDICTED));
        let mean = |logs: &[f64]| logs.iter().sum::<f64>() / logs.len().max(1) as f64;
        let log = |rate: f64| rate.max(1e-9).ln();
        let each = |of: &dyn Fn(&Ranked) -> f64| -> Vec<f64> {
            self.racing.iter().map(|&which| of(&ranked[which])).collect()
        };
        let before = mean(&each(&|one| log(one.expected)));
        let both = each(&|one| {
            let predicted = log(one.prediction.tokens_per_s);
            predicted + of_trials * (one.tried.map_or(predicted, log) - predicted)
        });
        let mood = mean(&both) - before;
        for (&which, both) in self.racing.iter().zip(both) {
            ranked[which].expected = (both - mood).exp();
        }
    }

    fn leave(&mut self, ranked: &[Ranked], variance: f64) {
        let of_one = (certainty(variance) + certainty(PREDICTED * PREDICTED)).recip();
        let behind = UNLIKELY * (2.0 * of_one).sqrt() - NEARLY;
        let best = self.racing.iter().map(|&which| ranked[which].expected).fold(0.0, f64::max);
        self.racing.retain(|&which| ranked[which].expected >= best * (-behind).exp().min(1.0));
    }
}

/// The inverse of a variance.
fn certainty(variance: f64) -> f64 {
    variance.max(1e-12).recip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::candidates;
    use exflow_engine::Schedule;
    use exflow_engine::plan::Prediction;
    use exflow_placement::{PlacementTable, Rng};

    fn predicted(rates: &[f64]) -> Vec<Ranked> {
        let table = PlacementTable::round_robin(2, 2, 2);
        let one = candidates(&[("t".into(), table)], &[Schedule::Rounds]).remove(0);
        let ranked = |&tokens_per_s: &f64| Ranked {
            candidate: one.clone(),
            prediction: Prediction { tokens_per_s, ..Prediction::default() },
            tried: None,
            expected: tokens_per_s,
        };
        rates.iter().map(ranked).collect()
    }

    #[test]
    fn a_trial_counts_by_how_sure_it_is() {
        let expected = |variance: f64| {
            let mut two = predicted(&[200.0, 190.0]);
            Race::among(&two).judge(&mut two, &[50.0, 60.0], variance);
            (two[0].expected, two[1].expected)
        };
        let (first, second) = expected(0.0);
        assert!((second / first - 1.2).abs() < 1e-6, "{first} and {second}: as they were tried");
        assert!((first * second - 200.0 * 190.0).abs() < 1e-3, "in the mood of the predictions");
        let (first, second) = expected(1e6);
        assert!((first - 200.0).abs() < 1e-3 && (second - 190.0).abs() < 1e-3, "as they were predicted");
        let (first, second) = expected(PREDICTED * PREDICTED);
        assert!((second / first - (1.2_f64 * 0.95).sqrt()).abs() < 1e-9, "between both");
    }

    #[test]
    fn what_may_be_the_best_is_tried() {
        let racing = |shares: &[f64]| Race::among(&predicted(shares)).racing.len();
        assert_eq!(racing(&[1.0, 0.75, 0.7]), 1, "nothing to try");
        assert!(Race::among(&predicted(&[1.0, 0.75, 0.7])).is_over());
        assert_eq!(racing(&[1.0, 0.95, 0.8, 0.7]), 3);
        assert_eq!(racing(&[1.0; 9]), CONTENDERS);
        assert_eq!(racing(&[]), 0);
    }

    #[test]
    fn who_is_surely_behind_leaves_and_stays_behind() {
        let mut three = predicted(&[100.0, 98.0, 97.0]);
        let mut race = Race::among(&three);
        assert_eq!(race.judge(&mut three, &[50.0, 51.0, 30.0], 0.0025), [true, true, false]);
        assert!(
            three[2].expected < 0.8 * three[0].expected,
            "{} and {}",
            three[2].expected,
            three[0].expected
        );
        let before = three[2].expected;
        assert_eq!(race.judge(&mut three, &[90.0, 91.0], 1e-9), [false, true], "nearly is not behind");
        assert!((three[0].expected * three[1].expected).sqrt() > before, "nobody's mood changed");
        assert!(race.is_over());
    }

    /// Races of candidates whose predictions and trials are as wrong as they commonly are.
    #[test]
    fn the_winner_is_seldom_far_from_the_best() {
        let mut dice = Rng::new(7);
        // Uniform ones added up: near enough to a normal distribution.
        let mut off = |deviation: f64| deviation * ((0..12).map(|_| dice.unit()).sum::<f64>() - 6.0);
        let (mut short, mut turns_taken) = (0, 0);
        const RACES: usize = 1000;
        for _ in 0..RACES {
            let truth: Vec<f64> = (0..4).map(|_| off(0.1)).collect();
            let mut rates: Vec<(f64, f64)> =
                truth.iter().map(|&log| (100.0 * (log + off(PREDICTED)).exp(), log)).collect();
            rates.sort_by(|a, b| b.0.total_cmp(&a.0));
            let mut ranked = predicted(&rates.iter().map(|one| one.0).collect::<Vec<_>>());
            let mut race = Race::among(&ranked);
            let mut sums = vec![0.0; rates.len()];
            for turn in 1..=12 {
                if race.is_over() {
                    break;
                }
                turns_taken += 1;
                race.racing.iter().for_each(|&which| sums[which] += rates[which].1 + off(0.1));
                let tried = race.racing.iter().map(|&which| (sums[which] / turn as f64).exp());
                race.judge(&mut ranked, &tried.collect::<Vec<_>>(), 0.01 / turn as f64);
            }
            let best = rates.iter().map(|one| one.1).fold(f64::MIN, f64::max);
            let picked = (0..ranked.len()).max_by(|&a, &b| ranked[a].expected.total_cmp(&ranked[b].expected));
            short += usize::from(best - rates[picked.expect("one")].1 > 0.05);
        }
        assert!(short <= RACES / 25, "{short} of {RACES} make less than 0.95 of the best");
        assert!(turns_taken < 7 * RACES, "{turns_taken} turns in {RACES} races");
    }
}
