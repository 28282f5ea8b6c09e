//! The runs of a cell: its settings take turns, and all must say the same.

use super::clusters::Clusters;
use super::{BesideBest, Cell, requests};
use crate::study::{Candidate, StudyError};
use exflow_engine::plan::Prediction;
use exflow_engine::{Cluster, Request, RunStats, Schedule, Strategy};
use std::time::{Duration, Instant};

/// A run says the same again until it took so long: within tenths of a second it matters which core a thread woke on.
const SHORTEST_RUN: Duration = Duration::from_millis(600);
/// Where two runs or more of a setting took so long together none has a further one: they wait for links, whose latency has
/// no moods, and all settings are to have the same texts.
const LONG_RUNS: Duration = Duration::from_secs(6);
/// Prompts that a lone sequence is measured with, one after the other.
pub const ALONE: usize = 8;
/// The planner's pick and the best fixed setting take turns for this share of the time that they would have where both are one
/// setting: what comes out is the machine's mood.
const OF_ONE: f64 = 0.2;
/// Two pairs at least: each of the two is the first of one.
const FEWEST_PAIRS: usize = 2;

/// One setting of a cell while it is measured.
pub(super) struct Entry {
    pub(super) setting: Candidate,
    pub(super) auto: bool,
    /// The place of its cluster.
    pub(super) cluster: usize,
    /// Before each of its runs.
    pub(super) predicted: Vec<Prediction>,
}

impl Entry {
    pub(super) fn new(setting: Candidate, auto: bool, cluster: usize) -> Self {
        Self { setting, auto, cluster, predicted: Vec::new() }
    }

    /// Of vanilla in rounds over a shaped link: two one-way latencies per MoE layer and what the busiest rank computed.
    pub(super) fn floor(&self, cell: &Cell, cluster: &Cluster, stats: &RunStats) -> Option<f64> {
        let latency = cluster.options().link?.latency.as_secs_f64();
        let vanilla = self.setting.strategy == Strategy::Vanilla && self.setting.schedule == Schedule::Rounds;
        (vanilla && latency > 0.0).then(|| {
            let layers = cluster.spec().moe_layers() as f64;
            cell.sequences as f64 / (2.0 * layers * latency + stats.compute_ms_per_step / 1e3)
        })
    }
}

/// What the predictions before a setting's runs come to: tokens per second are their median, as the rate is that of the
/// runs, and the rest is of the one in the middle.
pub(super) fn middle(predicted: &[Prediction]) -> Option<Prediction> {
    let mut all = predicted.to_vec();
    all.sort_by(|a, b| a.tokens_per_s.total_cmp(&b.tokens_per_s));
    let mut rates: Vec<f64> = all.iter().map(|one| one.tokens_per_s).collect();
    let of_middle = all.get(all.len().saturating_sub(1) / 2)?;
    Some(Prediction { tokens_per_s: median(&mut rates), ..*of_middle })
}

/// When each sequence's tokens appeared, seconds from the call.
type Times = Vec<Vec<f64>>;

/// What the runs of a setting came to.
#[derive(Default)]
pub(super) struct Runs {
    pub(super) rates: Vec<f64>,
    took: Duration,
    pub(super) gaps: Vec<f64>,
    pub(super) seconds: Vec<f64>,
    /// Of the latest run of the first text, which every setting has.
    pub(super) stats: Option<RunStats>,
    pub(super) ttft: Vec<f64>,
}

impl Runs {
    /// Whether further runs would say little new.
    pub(super) fn suffice(&self) -> bool {
        self.rates.len() > 1 && self.took >= LONG_RUNS
    }

    fn take(&mut self, times: &Times) {
        for sequence in times {
            self.ttft.extend(sequence.first());
            self.seconds.extend(sequence.get(1).map(|second| second - sequence[0]));
            self.gaps.extend(sequence.windows(2).map(|w| w[1] - w[0]));
        }
    }
}

/// Which of `entries` takes its turn at `place` of a repeat: each begins elsewhere, so that
/// nobody always runs last.
pub(super) fn turn(place: usize, repeat: usize, repeats: usize, entries: usize) -> usize {
    (place + repeat * entries.div_ceil(repeats)) % entries
}

/// What is said at once, or by a lone sequence one after the other.
struct Text {
    /// Requests that are made at once, in their order.
    groups: Vec<Vec<Request>>,
    said: Option<Vec<Vec<u32>>>,
}

/// The runs of a cell, one after the other, which must all say the same of each text.
pub(super) struct Turns<'c, 'p> {
    pub(super) clusters: &'c mut Clusters<'p>,
    /// So many at once.
    sequences: usize,
    texts: Vec<Text>,
    taken: usize,
}

impl<'c, 'p> Turns<'c, 'p> {
    /// With so many texts, each of other prompts: how often a setting's tokens leave their rank goes by what they are about.
    /// Of a lone sequence all prompts are one.
    pub(super) fn new(cell: &Cell, texts: usize, clusters: &'c mut Clusters<'p>) -> Self {
        let prompts = clusters.prompts;
        let text = |groups| Text { groups, said: None };
        let texts = match cell.sequences {
            1 => {
                let alone = prompts.iter().take(ALONE);
                vec![text(alone.map(|p| requests(std::slice::from_ref(p), cell.tokens)).collect())]
            }
            n => {
                let nth = |i: usize| prompts.iter().cycle().skip(i * n).take(n).cloned().collect::<Vec<_>>();
                (0..texts.max(1)).map(|i| text(vec![requests(&nth(i), cell.tokens)])).collect()
            }
        };
        Self { clusters, sequences: cell.sequences, texts, taken: 0 }
    }

    /// One turn of a setting, which may say the same several times; its tokens per second. Turns go through all texts.
    pub(super) fn take(&mut self, entry: &Entry, turn: usize, runs: &mut Runs) -> Result<f64, StudyError> {
        let which = turn % self.texts.len();
        let text = &mut self.texts[which];
        let cluster = self.clusters.ready(entry.cluster, &entry.setting, self.sequences)?;
        let (began, mut rates) = (Instant::now(), Vec::new());
        while rates.is_empty() || began.elapsed() < SHORTEST_RUN {
            let mut spoken = Vec::new();
            for group in &text.groups {
                let (times, stats, outputs) = run(cluster, group)?;
                rates.push(rate(&times));
                runs.take(&times);
                if which == 0 {
                    runs.stats = Some(stats);
                }
                spoken.extend(outputs);
            }
            match &text.said {
                None => text.said = Some(spoken),
                Some(first) => agree(first, &spoken, &entry.setting, self.taken)?,
            }
        }
        self.taken += 1;
        runs.took += began.elapsed();
        Ok(of_mean_time(&rates))
    }

    /// The planner's pick and a fixed setting by turns: half of the time each in its own cluster, then each in the other's,
    /// unless they share one. Clusters that run the same setting differ by several percent as their memory happens to lie; the
    /// mean of both halves is free of it.
    pub(super) fn beside(
        &mut self,
        auto: &mut Entry,
        fixed: &mut Entry,
        pairs: Duration,
    ) -> Result<BesideBest, StudyError> {
        let (setting, same) = (fixed.setting.to_string(), fixed.setting.runs_as(&auto.setting));
        let pairs = if same { pairs.mul_f64(OF_ONE) } else { pairs };
        let shared = auto.cluster == fixed.cluster;
        let mut ratios = self.ratios(auto, fixed, if shared { pairs } else { pairs / 2 })?;
        let mut ratio = median(&mut ratios);
        if !shared {
            std::mem::swap(&mut auto.cluster, &mut fixed.cluster);
            for entry in [&*auto, &*fixed] {
                // The first turn after a change is not counted.
                self.take(entry, 0, &mut Runs::default())?;
            }
            let mut swapped = self.ratios(auto, fixed, pairs / 2)?;
            ratio = (ratio * median(&mut swapped)).sqrt();
            ratios.append(&mut swapped);
        }
        let quartiles = (quantile(&mut ratios, 0.25), quantile(&mut ratios, 0.75));
        Ok(BesideBest { setting, same, ratio, quartiles, pairs: ratios.len() })
    }

    /// The rate of one over that of another in each pair of turns.
    fn ratios(&mut self, one: &Entry, other: &Entry, least: Duration) -> Result<Vec<f64>, StudyError> {
        let (began, mut ratios) = (Instant::now(), Vec::new());
        // An even number: each is the first of a pair as often as the other.
        while ratios.len() < FEWEST_PAIRS || began.elapsed() < least || ratios.len() % 2 == 1 {
            let mut rates = [0.0; 2];
            let (first, turn) = (ratios.len() % 2, ratios.len() / 2);
            for which in [first, 1 - first] {
                rates[which] = self.take(if which == 0 { one } else { other }, turn, &mut Runs::default())?;
            }
            ratios.push(rates[0] / rates[1].max(1e-9));
        }
        Ok(ratios)
    }
}

fn run(cluster: &mut Cluster, requests: &[Request]) -> Result<(Times, RunStats, Vec<Vec<u32>>), StudyError> {
    let mut times = vec![Vec::new(); requests.len()];
    let started = Instant::now();
    let run = cluster.generate(requests, &mut |event| {
        times[event.sequence].push(started.elapsed().as_secs_f64());
    })?;
    let outputs = run.sequences.into_iter().map(|done| done.output_ids).collect();
    Ok((times, run.stats, outputs))
}

/// Runs the requests; tokens per second while all of them decode.
///
/// # Errors
/// What [`Cluster::generate`] refuses.
pub fn decode_rate(cluster: &mut Cluster, requests: &[Request]) -> Result<f64, StudyError> {
    decode(cluster, requests).map(|(rate, _)| rate)
}

/// The same with the run's figures.
pub(in crate::study) fn decode(
    cluster: &mut Cluster,
    requests: &[Request],
) -> Result<(f64, RunStats), StudyError> {
    run(cluster, requests).map(|(times, stats, _)| (rate(&times), stats))
}

/// Tokens per second while all sequences decode: from the last first token to the first last one. Where sequences had
/// to wait for each other, over all of the decoding.
fn rate(times: &Times) -> f64 {
    let firsts = times.iter().filter_map(|t| t.first().copied());
    let lasts = times.iter().filter_map(|t| t.last().copied());
    let (begin, end) = (firsts.clone().fold(0.0, f64::max), lasts.clone().fold(f64::INFINITY, f64::min));
    let within =
        |begin: f64, end: f64| times.iter().flatten().filter(|t| **t > begin && **t <= end).count() as f64;
    if end > begin && within(begin, end) > 0.0 {
        return within(begin, end) / (end - begin);
    }
    let (begin, end) = (firsts.fold(f64::INFINITY, f64::min), lasts.fold(0.0, f64::max));
    within(begin, end) / (end - begin).max(1e-9)
}

/// What rates come to for the same work one after the other.
fn of_mean_time(rates: &[f64]) -> f64 {
    rates.len() as f64 / rates.iter().map(|rate| 1.0 / rate.max(1e-9)).sum::<f64>().max(1e-9)
}

fn agree(
    first: &[Vec<u32>],
    said: &[Vec<u32>],
    setting: &Candidate,
    repeat: usize,
) -> Result<(), StudyError> {
    for (sequence, (a, b)) in first.iter().zip(said).enumerate() {
        if a != b {
            let token = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
            let setting = setting.to_string();
            return Err(StudyError::Differ { setting, run: repeat, sequence, token });
        }
    }
    Ok(())
}

/// Of rates or ratios, the geometric mean of the two in the middle; 0 of none. Sorts them.
pub(in crate::study) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |place: usize| values.get(place).copied().unwrap_or(0.0);
    (at(values.len().saturating_sub(1) / 2) * at(values.len() / 2)).sqrt()
}

/// The value that `share` of them are not above; 0 of none. Sorts them.
pub(in crate::study) fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * share).ceil() as usize;
    values.get(at.saturating_sub(1)).or(values.last()).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_time_in_which_all_decode() {
        // The second begins late and ends late: what counts lies between 1 s and 3 s.
        let times = vec![vec![0.0, 1.0, 2.0, 3.0], vec![1.0, 1.5, 2.0, 2.5, 3.0, 3.5]];
        assert!((rate(&times) - 6.0 / 2.0).abs() < 1e-9);
        // One after the other: over everything.
        let times = vec![vec![0.0, 1.0, 2.0], vec![3.0, 4.0]];
        assert!((rate(&times) - 4.0 / 4.0).abs() < 1e-9);
    }

    #[test]
    fn every_repeat_runs_all_settings_once_and_begins_elsewhere() {
        for (entries, repeats) in [(13, 3), (13, 5), (2, 5), (1, 2), (7, 1)] {
            let orders: Vec<Vec<usize>> = (0..repeats)
                .map(|repeat| (0..entries).map(|place| turn(place, repeat, repeats, entries)).collect())
                .collect();
            for order in &orders {
                let mut sorted = order.clone();
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..entries), "{order:?}");
            }
            let lasts: std::collections::BTreeSet<_> = orders.iter().map(|o| o[entries - 1]).collect();
            assert!(lasts.len() >= entries.min(repeats).min(2), "{orders:?}");
        }
    }

    #[test]
    fn predictions_come_to_their_median_as_rates_do() {
        let of = |rates: &[f64]| {
            let each = rates.iter().map(|&rate| Prediction {
                tokens_per_s: rate,
                ms_per_token: 1e3 / rate,
                ..Prediction::default()
            });
            middle(&each.collect::<Vec<_>>())
        };
        assert_eq!(of(&[]), None);
        let three = of(&[50.0, 20.0, 40.0]).expect("some");
        assert_eq!((three.tokens_per_s, three.ms_per_token), (40.0, 25.0));
        assert_eq!(of(&[80.0, 20.0]).expect("some").tokens_per_s, 40.0, "between both");
    }

    #[test]
    fn quantiles_are_values_that_occurred() {
        let mut values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!((quantile(&mut values, 0.5), quantile(&mut values, 0.99)), (100.0, 198.0));
        assert_eq!(quantile(&mut [7.0], 0.99), 7.0);
        assert_eq!(median(&mut [8.0, 0.1, 2.0, 9.0]), 4.0, "between the two in the middle");
        assert_eq!(median(&mut [3.0, 5.0, 1.0]), 3.0);
    }
}
