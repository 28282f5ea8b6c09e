//! Trials: a cluster decodes a few tokens of the model's own text in each of several ways, which take turns.

use crate::study::StudyError;
use crate::study::grid::{self, median};
use exflow_engine::plan::Tried;
use exflow_engine::{Cluster, EngineError};
use std::time::{Duration, Instant};

/// Least and most tokens of each sequence in a trial: one for each that decodes beside it, as it takes the longer from the
/// first that begins to the last the more there are, and more where the model is quick.
const TOKENS: (usize, usize) = (12, 32);
/// The same before it, while everything is still to be made for the first time.
const WARM_UP: usize = 3;
/// The ways take turns so often, of which the median counts: a machine is slower in some seconds than in others, and so are
/// the first ones of a world.
pub(in crate::study) const TURNS: usize = 3;
/// In a turn a trial is made longer and repeated until so much time has passed: a short one is over in less than a
/// scheduler's moods last, and mostly beginning and end, while not all sequences decode.
const TIME: Duration = Duration::from_millis(500);
/// A trial that takes longer by itself has no further turns: it waits for links, whose latency has no moods.
const LONG: Duration = Duration::from_secs(2);

/// The ways to try with so many sequences, and the turns that they have had.
pub(in crate::study) struct Trials<W> {
    ways: Vec<W>,
    sequences: usize,
    /// Brings the cluster to a way.
    change: Change<W>,
    taken: Vec<Vec<Trial>>,
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

    /// A turn of each way. The further apart turns are, the fewer of them fall into one mood of the machine. The cluster is
    /// left in any of the ways.
    pub(in crate::study) fn turn(&mut self, cluster: &mut Cluster) -> Result<(), StudyError> {
        let prompts = grid::trial_prompts(cluster, self.sequences.max(2))?;
        for place in 0..self.ways.len() {
            let which = (place + self.turns) % self.ways.len();
            if self.taken[which].iter().all(|trial| trial.longest < LONG) {
                (self.change)(&self.ways[which], cluster)?;
                self.taken[which].push(Trial::run(cluster, &prompts, self.sequences)?);
            }
        }
        self.turns += 1;
        Ok(())
    }

    /// Takes those of so many turns that are left; each way with what it came to.
    pub(in crate::study) fn rates(
        &mut self,
        cluster: &mut Cluster,
        turns: usize,
    ) -> Result<Vec<(W, Tried)>, StudyError> {
        while self.turns < turns {
            self.turn(cluster)?;
        }
        let of_turns = |trials: &[Trial]| {
            let mut tried: Vec<Tried> = trials.iter().map(|trial| trial.tried).collect();
            let mut rates: Vec<f64> = tried.iter().map(|tried| tried.tokens_per_s).collect();
            let tokens_per_s = median(&mut rates);
            // What was waited for in the turns about the middle one: the others were of another mood.
            let off = |tried: &Tried| (tried.tokens_per_s / tokens_per_s.max(1e-9)).ln().abs();
            tried.sort_by(|a, b| off(a).total_cmp(&off(b)));
            Tried { tokens_per_s, ..tried.first().copied().unwrap_or_default() }
        };
        Ok(self.each(of_turns))
    }

    /// Each way with what it came to in its latest turn, as far as all turns say that it was that turn's mood.
    pub(in crate::study) fn latest(&self) -> Vec<(W, Tried)> {
        let rates = |trials: &Vec<Trial>| trials.iter().map(|trial| trial.tried.tokens_per_s).collect();
        let steady = latest(&self.taken.iter().map(rates).collect::<Vec<Vec<f64>>>());
        let last = self.each(|trials| trials.last().map_or(Tried::default(), |trial| trial.tried));
        let steadied = |((way, tried), tokens_per_s)| (way, Tried { tokens_per_s, ..tried });
        last.into_iter().zip(steady).map(steadied).collect()
    }

    fn each(&self, tried: impl Fn(&[Trial]) -> Tried) -> Vec<(W, Tried)> {
        self.ways.iter().cloned().zip(self.taken.iter().map(|trials| tried(trials))).collect()
    }
}

/// Of rates `[way][turn]`, each way's in the last turn: what it makes in the middle of all turns, each held against what the
/// ways made in it together, times what they made together in the last. A short trial says more of the second that it ran in
/// than of its way. A way that had fewer turns, as it waits for links, keeps its last rate.
fn latest(rates: &[Vec<f64>]) -> Vec<f64> {
    let turns = rates.iter().map(Vec::len).max().unwrap_or(0);
    let all: Vec<&Vec<f64>> = rates.iter().filter(|rates| rates.len() == turns).collect();
    let together = |turn: usize| {
        let logs = all.iter().map(|rates| rates[turn].max(1e-9).ln());
        (logs.sum::<f64>() / all.len().max(1) as f64).exp()
    };
    let of = |rates: &Vec<f64>| match rates.last() {
        Some(_) if rates.len() == turns => {
            let mut own: Vec<f64> = (0..turns).map(|turn| rates[turn] / together(turn)).collect();
            median(&mut own) * together(turns - 1)
        }
        last => last.copied().unwrap_or(0.0),
    };
    rates.iter().map(of).collect()
}

/// One turn of a way.
struct Trial {
    tried: Tried,
    /// What the longest run took.
    longest: Duration,
}

impl Trial {
    /// Decodes so many sequences for a while, each time after other prompts.
    fn run(cluster: &mut Cluster, prompts: &[Vec<u32>], sequences: usize) -> Result<Self, StudyError> {
        let mut turned = 0;
        let mut timed = |max_tokens: usize| {
            let prompts: Vec<_> = prompts.iter().cycle().skip(turned).take(sequences).cloned().collect();
            turned += 1;
            let (began, schedule) = (Instant::now(), cluster.options().schedule);
            let (rate, stats) = grid::decode(cluster, &grid::requests(&prompts, max_tokens))?;
            let tried = Tried::of(rate, &stats, schedule, cluster.spec().moe_layers());
            Ok::<_, StudyError>((tried, began.elapsed()))
        };
        timed(WARM_UP)?;
        let least = sequences.clamp(TOKENS.0, TOKENS.1);
        let (tried, took) = timed(least)?;
        if took >= TIME {
            return Ok(Self { tried, longest: took });
        }
        let as_long = least as f64 * TIME.as_secs_f64() / took.as_secs_f64().max(1e-9);
        let tokens = (as_long.ceil() as usize).clamp(least, TOKENS.1);
        let (began, mut all, mut longest) = (Instant::now(), Vec::new(), took);
        while all.is_empty() || began.elapsed() < TIME {
            let (tried, took) = timed(tokens)?;
            all.push(tried);
            longest = longest.max(took);
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
        let rates = [vec![100.0, 110.0, 90.0, 50.0], vec![200.0, 220.0, 180.0, 64.0], vec![7.0]];
        let [first, second, third] = latest(&rates)[..] else { panic!("one for each way") };
        assert!((second / first - 2.0).abs() < 1e-9, "{second} is twice {first} in all other turns");
        assert!((first * second - 50.0 * 64.0).abs() < 1e-6, "together what they made");
        assert_eq!(third, 7.0, "one turn, as it took long");
        assert!((latest(&[vec![3.0, 5.0]])[0] - 5.0).abs() < 1e-9, "alone, its mood is its own");
        assert!(latest(&[vec![], vec![]]).iter().all(|rate| *rate == 0.0));
    }
}
