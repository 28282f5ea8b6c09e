//! Trials: a cluster decodes a few tokens of the model's own text in each of several ways, which take turns.

use crate::study::StudyError;
use crate::study::grid::{self, TRIAL_PROMPTS, median};
use exflow_engine::plan::Tried;
use exflow_engine::{Cluster, EngineError};
use std::time::{Duration, Instant};

/// Least and most tokens of each sequence in a trial: one for each that decodes beside it, as it takes the longer from the
/// first that begins to the last the more there are, and more where the model is quick.
const TOKENS: (usize, usize) = (12, 32);
/// The ways take turns so often, of which the median counts: a machine is slower in some seconds than in others, and so are
/// the first ones of a world.
pub(in crate::study) const TURNS: usize = 3;
/// By so many prompts each turn's text begins later than that of the turn before; no divisor of how many there are, so that no
/// turn soon has the text of another.
const OTHER_TEXT: usize = 21;
/// In a turn a trial is made longer and repeated until so much time has passed: a short one is over in less than a
/// scheduler's moods last, and mostly beginning and end, while not all sequences decode.
const TIME: Duration = Duration::from_millis(500);
/// A trial that takes longer by itself has no further turns: it waits for links, whose latency has no moods.
const LONG: Duration = Duration::from_secs(2);
/// How far, as a logarithm, a single trial commonly lies from what its way makes beside the others, and as how many trials
/// that counts.
const COMMON: (f64, f64) = (2.0, 0.1);

/// The ways to try with so many sequences, and the turns that they have had.
pub(in crate::study) struct Trials<W> {
    ways: Vec<W>,
    sequences: usize,
    /// Brings the cluster to a way.
    change: Change<W>,
    taken: Vec<Vec<Trial>>,
    /// Asked for, whoever took them.
    turns: usize,
}

type Change<W> = fn(&W, &mut Cluster) -> Result<(), EngineError>;

impl<W: Clone> Trials<W> {
    pub(in crate::study) fn new(ways: Vec<W>, sequences: usize, change: Change<W>) -> Self {
        let taken = ways.iter().map(|_| Vec::new()).collect();
        Self { ways, sequences, change, taken, turns: 0 }
    }

    pub(in crate::study) fn sequences(&self) -> usize {
        self.sequences
    }

    /// A turn of each way, all on the same text, and each turn on other text. The further apart turns are, the fewer of them
    /// fall into one mood of the machine. The cluster is left in any of the ways.
    pub(in crate::study) fn turn(&mut self, cluster: &mut Cluster) -> Result<(), StudyError> {
        self.turn_of(cluster, |taken| taken.iter().all(|trial| trial.longest < LONG))
    }

    /// The same of each way however long it takes.
    pub(in crate::study) fn whole_turn(&mut self, cluster: &mut Cluster) -> Result<(), StudyError> {
        self.turn_of(cluster, |_| true)
    }

    fn turn_of(&mut self, cluster: &mut Cluster, has_one: fn(&[Trial]) -> bool) -> Result<(), StudyError> {
        let mut prompts = grid::trial_prompts(cluster, TRIAL_PROMPTS.max(self.sequences))?;
        let other = (self.turns * OTHER_TEXT) % prompts.len();
        prompts.rotate_left(other);
        for place in 0..self.ways.len() {
            let which = (place + self.turns) % self.ways.len();
            if has_one(&self.taken[which]) {
                (self.change)(&self.ways[which], cluster)?;
                let first = &prompts[..self.sequences.min(prompts.len())];
                let step = match self.taken[which].is_empty() {
                    true => grid::settle(cluster, first)?,
                    false => grid::warm_up(cluster, first)?,
                };
                self.taken[which].push(Trial::run(cluster, &prompts, self.sequences, step)?);
            }
        }
        self.turns += 1;
        Ok(())
    }

    /// Goes on with some of the ways.
    pub(in crate::study) fn retain(&mut self, kept: &[bool]) {
        let mut kept_ways = kept.iter();
        self.ways.retain(|_| kept_ways.next().is_some_and(|&kept| kept));
        let mut kept_trials = kept.iter();
        self.taken.retain(|_| kept_trials.next().is_some_and(|&kept| kept));
    }

    /// Takes those of so many turns that are left.
    pub(in crate::study) fn finish(&mut self, cluster: &mut Cluster, turns: usize) -> Result<(), StudyError> {
        while self.turns < turns {
            self.turn(cluster)?;
        }
        Ok(())
    }

    /// Each way with what it makes in the mood of the middle turn.
    pub(in crate::study) fn usual(&self) -> Vec<(W, Tried)> {
        self.in_mood_of(Rates::of(&self.taken).middle_turn())
    }

    /// Each way with what it makes in the mood of the latest turn.
    pub(in crate::study) fn latest(&self) -> Vec<(W, Tried)> {
        self.in_mood_of(Rates::of(&self.taken).turns().saturating_sub(1))
    }

    /// The variance of a way's logarithm in [`Trials::usual`], beside those of the others.
    pub(in crate::study) fn variance(&self) -> f64 {
        Rates::of(&self.taken).variance()
    }

    fn in_mood_of(&self, turn: usize) -> Vec<(W, Tried)> {
        let rates = Rates::of(&self.taken);
        let of = |way: usize| {
            let trials = &self.taken[way];
            let tried = trials.get(turn).or(trials.last()).map_or(Tried::default(), |trial| trial.tried);
            (self.ways[way].clone(), Tried { tokens_per_s: rates.in_mood_of(way, turn), ..tried })
        };
        (0..self.ways.len()).map(of).collect()
    }
}

/// Tokens per second, `[way][turn]`. A short trial says more of the second that it ran in than of its way: what a way makes is
/// held against what all ways made in the same turn. A way that had fewer turns, as it waits for links, is not among them.
struct Rates(Vec<Vec<f64>>);

impl Rates {
    fn of(taken: &[Vec<Trial>]) -> Self {
        let rates = |trials: &Vec<Trial>| trials.iter().map(|trial| trial.tried.tokens_per_s).collect();
        Self(taken.iter().map(rates).collect())
    }

    fn turns(&self) -> usize {
        self.0.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Those of the ways that had all turns.
    fn whole(&self) -> impl Iterator<Item = &Vec<f64>> + Clone {
        let turns = self.turns();
        self.0.iter().filter(move |rates| rates.len() == turns)
    }

    /// What all ways made in a turn: the geometric mean.
    fn together(&self, turn: usize) -> f64 {
        let logs = self.whole().map(|rates| rates[turn].max(1e-9).ln());
        (logs.sum::<f64>() / self.whole().count().max(1) as f64).exp()
    }

    /// The turn in which all ways together made neither most nor least; of two, the slower one.
    fn middle_turn(&self) -> usize {
        let mut turns: Vec<usize> = (0..self.turns()).collect();
        turns.sort_by(|&a, &b| self.together(a).total_cmp(&self.together(b)));
        turns.get(turns.len().saturating_sub(1) / 2).copied().unwrap_or(0)
    }

    /// What a way makes in the middle of all turns, each held against what the ways made in it together, times what they made
    /// together in this one.
    fn in_mood_of(&self, way: usize, turn: usize) -> f64 {
        let rates = &self.0[way];
        if rates.is_empty() || rates.len() < self.turns() {
            return rates.last().copied().unwrap_or(0.0);
        }
        let held = |(turn, rate): (usize, &f64)| rate / self.together(turn).max(1e-9);
        median(&mut rates.iter().enumerate().map(held).collect::<Vec<f64>>()) * self.together(turn)
    }

    /// Of a way's logarithm beside those of the others, by how they changed places from turn to turn; how far single trials
    /// commonly lie apart where that says little.
    fn variance(&self) -> f64 {
        let (turns, ways) = (self.turns(), self.whole().count());
        let (mut squares, mut free) = (COMMON.0 * COMMON.1 * COMMON.1, COMMON.0);
        for rates in self.whole() {
            let held =
                rates.iter().enumerate().map(|(turn, rate)| (rate.max(1e-9) / self.together(turn)).ln());
            let mean = held.clone().sum::<f64>() / turns.max(1) as f64;
            squares += held.map(|log| (log - mean).powi(2)).sum::<f64>();
        }
        free += (turns.saturating_sub(1) * ways.saturating_sub(1)) as f64;
        squares / free / turns.max(1) as f64
    }
}

/// One turn of a way.
struct Trial {
    tried: Tried,
    /// What the longest run took.
    longest: Duration,
}

impl Trial {
    /// Decodes so many sequences for a while, each time after other prompts; a step takes so long at most.
    fn run(
        cluster: &mut Cluster,
        prompts: &[Vec<u32>],
        sequences: usize,
        step: Duration,
    ) -> Result<Self, StudyError> {
        let least = sequences.clamp(TOKENS.0, TOKENS.1);
        let tokens = ((TIME.as_secs_f64() / step.as_secs_f64().max(1e-9)) as usize).clamp(least, TOKENS.1);
        let (began, mut all, mut longest) = (Instant::now(), Vec::new(), Duration::ZERO);
        while all.is_empty() || began.elapsed() < TIME {
            // The first ones were those to warm up with.
            let from = (all.len() + 1) * sequences;
            let prompts: Vec<_> = prompts.iter().cycle().skip(from).take(sequences).cloned().collect();
            let (began, schedule) = (Instant::now(), cluster.options().schedule);
            let (rate, stats) = grid::decode(cluster, &grid::requests(&prompts, tokens))?;
            all.push(Tried::of(rate, &stats, schedule, cluster.spec().moe_layers()));
            longest = longest.max(began.elapsed());
        }
        Ok(Self { tried: Tried::mean(&all), longest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turns_mood_is_all_ways_and_a_ways_own_speed_all_turns() {
        // The machine is half as fast in the last turn, and the second way had a bad moment of its own in it.
        let rates = Rates(vec![vec![100.0, 110.0, 90.0, 50.0], vec![200.0, 220.0, 180.0, 64.0], vec![7.0]]);
        let latest = |way: usize| rates.in_mood_of(way, 3);
        assert!(
            (latest(1) / latest(0) - 2.0).abs() < 1e-9,
            "{} is twice {} in all other turns",
            latest(1),
            latest(0)
        );
        assert!((latest(0) * latest(1) - 50.0 * 64.0).abs() < 1e-6, "together what they made");
        assert_eq!(latest(2), 7.0, "one turn, as it took long");
        assert_eq!(rates.middle_turn(), 2, "90 and 180: the slower of the two in the middle");
        assert!((rates.in_mood_of(0, 2) - 90.0).abs() < 1e-9);
        assert!(
            (Rates(vec![vec![3.0, 5.0]]).in_mood_of(0, 1) - 5.0).abs() < 1e-9,
            "alone, its mood is its own"
        );
        let none = Rates(vec![vec![], vec![]]);
        assert_eq!((none.in_mood_of(1, 0), none.middle_turn()), (0.0, 0));
    }

    #[test]
    fn who_waits_long_for_links_stays_with_the_turns_it_took() {
        let trial = |tokens_per_s| Trial { tried: Tried { tokens_per_s, waits: None }, longest: LONG };
        let trials =
            |taken| Trials { taken, turns: 4, ..Trials::new(vec!["slow", "slower"], 8, |_, _| Ok(())) };
        for taken in
            [trials(vec![vec![trial(9.0)], vec![trial(4.0)]]), trials(vec![vec![], vec![trial(4.0)]])]
        {
            let (usual, latest) = (taken.usual(), taken.latest());
            assert_eq!(usual, latest);
            assert_eq!((latest[1].0, latest[1].1.tokens_per_s), ("slower", 4.0));
            assert!(taken.variance().is_finite());
        }
    }

    #[test]
    fn trials_that_change_places_say_less() {
        let (common, one) = (COMMON.1 * COMMON.1, |turn: f64| vec![vec![turn * 100.0], vec![turn * 120.0]]);
        assert!((Rates(one(1.0)).variance() - common).abs() < 1e-12, "one turn tells nothing of it");
        let steady = Rates(vec![vec![100.0, 80.0, 120.0], vec![120.0, 96.0, 144.0]]).variance();
        assert!((steady - common / 2.0 / 3.0).abs() < 1e-12, "moods of all are none of a way: {steady}");
        let wild = Rates(vec![vec![100.0, 150.0, 90.0], vec![120.0, 90.0, 144.0]]).variance();
        assert!(wild > 5.0 * steady, "{wild} of {steady}");
    }
}
