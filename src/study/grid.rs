//! One cell of the grid of `exflow bench strategies`: all settings of one model, world size, link and number of
//! sequences, interleaved, that must all say the same.

use super::{Candidate, Planner, StudyError, ways};
use exflow_engine::plan::{Parts, Prediction};
use exflow_engine::{
    BytesByClass, Cluster, ClusterOptions, Linger, PlacementSource, Progress, Request, RoutingTrace,
    RunStats, Schedule, Strategy, TokenTime,
};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Tokens of the run that warms each cluster up; it is not measured.
const WARM_UP: usize = 6;
/// A run says the same again until it took so long: within tenths of a second it matters which core a thread woke on.
const SHORTEST_RUN: Duration = Duration::from_millis(600);

/// Bytes per decode token, by class.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct ClassBytes {
    /// Rows on their way to experts.
    pub dispatch: f64,
    /// Partials on their way back.
    pub combine: f64,
    /// Keys and values.
    pub kv: f64,
    /// Sampled ids and orders.
    pub ids: f64,
    /// Hello, heartbeats, goodbye.
    pub control: f64,
}

impl From<BytesByClass<f64>> for ClassBytes {
    fn from(b: BytesByClass<f64>) -> Self {
        Self { dispatch: b.dispatch, combine: b.combine, kv: b.kv, ids: b.ids, control: b.control }
    }
}

/// One line of the result; `docs/METHODOLOGY.md` defines the figures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GridRow {
    /// `bundled`, `synthetic-gqa` or a folder.
    pub model: String,
    /// Experts that a token takes.
    pub top_k: usize,
    /// World size.
    pub ranks: usize,
    /// Sequences that decode at once.
    pub sequences: usize,
    /// `local`, `lan`, `wifi` or `wan`.
    pub link: String,
    /// What this setting is called among ablations; none elsewhere.
    pub ablation: Option<String>,
    /// `vanilla`, `coherent`, or `auto` for what the planner picked before the run.
    pub strategy: String,
    /// `rounds` or `flow`; of `auto`, what it picked.
    pub schedule: String,
    /// `round_robin`, `affinity`, …; of `auto`, with the strategy that it picked, as in `coherent affinity`.
    pub table: String,
    /// Decode throughput over all sequences: median over the runs.
    pub tokens_per_s: f64,
    /// Lowest and highest of the runs.
    pub tokens_per_s_range: (f64, f64),
    /// What was predicted before the run; none where nothing was.
    pub predicted_tokens_per_s: Option<f64>,
    /// Where a token's time was predicted to go.
    pub predicted_parts: Option<Parts>,
    /// Mean milliseconds to a sequence's first token.
    pub ttft_ms: f64,
    /// Mean milliseconds from a sequence's first token to its second.
    pub second_token_ms: f64,
    /// Milliseconds between two tokens of a sequence, the median.
    pub tpot_p50_ms: f64,
    /// The same, of which one in a hundred is longer.
    pub tpot_p99_ms: f64,
    /// Exchanges (in flow: one-way latencies that a token waits for) per MoE layer.
    pub exchanges_per_layer: f64,
    /// Rows and partials over a link per token.
    pub crossings_per_token: f64,
    /// Share of layer transitions without a crossing.
    pub stay_rate: f64,
    /// Bytes per token by class.
    pub bytes_per_token: ClassBytes,
    /// The most bytes of KV cache in use at once on a rank.
    pub kv_peak_bytes: u64,
    /// Tokens of the longest text that fits into a rank's cache.
    pub longest_context: usize,
    /// Where a token's time went.
    pub token_time: TokenTime,
    /// What the same tokens would take at least: two one-way latencies a layer and what the ranks computed; for
    /// vanilla in rounds over a shaped link alone.
    pub floor_tokens_per_s: Option<f64>,
    /// Milliseconds that the busiest rank computed per step; in flow: per hop.
    pub hop_ms: f64,
    /// In flow: rows in one hop, mean.
    pub rows_per_hop: f64,
    /// In flow: share of the time that ranks worked.
    pub busy_share: f64,
    /// How long rows were held back: `off`, `auto`, or a time; `off` in rounds.
    pub linger: String,
    /// In flow: share of the time that ranks had rows and held them back.
    pub linger_share: f64,
}

/// What a cell is about.
#[derive(Debug, Clone)]
pub struct Cell {
    /// The model's name in the result.
    pub model: String,
    /// The link's name in the result.
    pub link: String,
    /// Sequences at once; 1: the prompts one after the other.
    pub sequences: usize,
    /// Tokens to make of each prompt.
    pub tokens: usize,
    /// Measured runs of each setting.
    pub repeats: usize,
}

/// When each sequence's tokens appeared, seconds from the call.
type Times = Vec<Vec<f64>>;

#[derive(Default)]
struct Runs {
    rates: Vec<f64>,
    gaps: Vec<f64>,
    seconds: Vec<f64>,
    stats: Option<RunStats>,
    ttft: Vec<f64>,
}

/// The clusters of a cell's settings, which serve every number of sequences.
pub struct Grid {
    clusters: Vec<(Candidate, Cluster)>,
    planner: Option<Auto>,
}

/// The planner with a cluster of its own, which runs as it picks.
struct Auto {
    planner: Planner,
    cluster: Cluster,
}

impl Grid {
    /// Starts a cluster per setting and warms it up; with `routes` also one that measures the world, from which every
    /// setting is predicted, and that then runs as the best of them.
    ///
    /// # Errors
    /// What [`Cluster::start`] refuses.
    pub fn start(
        options: &ClusterOptions,
        settings: Vec<Candidate>,
        routes: Option<RoutingTrace>,
        prompts: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<Self, StudyError> {
        let planner = match routes {
            Some(routes) if options.ranks > 1 => {
                let mut options = options.clone();
                (options.strategy, options.schedule) = (Strategy::Coherent, Schedule::Rounds);
                let mut cluster = Cluster::start(options, progress)?;
                cluster.generate(&requests(prompts, WARM_UP), &mut |_| {})?;
                Some(Auto { planner: Planner::measure(&mut cluster, routes)?, cluster })
            }
            _ => None,
        };
        let mut clusters = Vec::new();
        for setting in settings {
            let mut options = options.clone();
            options.strategy = setting.strategy;
            (options.schedule, options.overlap) = (setting.schedule, setting.overlap);
            options.linger = setting.linger;
            options.placement = PlacementSource::Table(setting.placement.clone());
            let mut cluster = Cluster::start(options, progress)?;
            cluster.generate(&requests(prompts, WARM_UP), &mut |_| {})?;
            clusters.push((setting, cluster));
        }
        Ok(Self { clusters, planner })
    }

    /// Measures all settings in turn, again and again.
    ///
    /// # Errors
    /// [`StudyError::Differ`] where a run says something else than the first one.
    pub fn measure(&mut self, cell: &Cell, prompts: &[Vec<u32>]) -> Result<Vec<GridRow>, StudyError> {
        let settings: Vec<Candidate> = self.clusters.iter().map(|(setting, _)| setting.clone()).collect();
        if let Some(auto) = &mut self.planner {
            auto.planner.try_out(&mut auto.cluster, &ways(&settings), cell.sequences)?;
        }
        let predict = |auto: &Auto, setting: &Candidate| auto.planner.predict(setting, cell.sequences);
        let predicted: Vec<Option<Prediction>> =
            settings.iter().map(|s| self.planner.as_ref().map(|auto| predict(auto, s))).collect();
        let mut entries: Vec<Entry<'_>> = Vec::new();
        for ((setting, cluster), predicted) in self.clusters.iter_mut().zip(predicted) {
            entries.push(Entry { setting: setting.clone(), auto: false, cluster, predicted });
        }
        if let Some(auto) = &mut self.planner
            && let Some((setting, prediction)) =
                auto.planner.rank(&settings, cell.sequences).into_iter().next()
        {
            let table = Some(setting.placement.clone());
            auto.cluster.change(setting.strategy, setting.schedule, table)?;
            auto.cluster.generate(&requests(prompts, WARM_UP), &mut |_| {})?;
            let cluster = &mut auto.cluster;
            entries.push(Entry { setting, auto: true, cluster, predicted: Some(prediction) });
        }
        let mut runs: Vec<Runs> = entries.iter().map(|_| Runs::default()).collect();
        let mut said: Option<Vec<Vec<u32>>> = None;
        let groups: Vec<Vec<Request>> = match cell.sequences {
            1 => prompts.iter().map(|p| requests(std::slice::from_ref(p), cell.tokens)).collect(),
            n => vec![requests(&prompts.iter().cycle().take(n).cloned().collect::<Vec<_>>(), cell.tokens)],
        };
        for repeat in 0..cell.repeats.max(1) {
            for (Entry { setting, cluster, .. }, runs) in entries.iter_mut().zip(&mut runs) {
                let (began, mut rates) = (Instant::now(), Vec::new());
                while rates.is_empty() || began.elapsed() < SHORTEST_RUN {
                    let mut spoken = Vec::new();
                    for group in &groups {
                        let (times, stats, outputs) = run(cluster, group)?;
                        rates.push(rate(&times));
                        runs.take(&times, stats);
                        spoken.extend(outputs);
                    }
                    match &said {
                        None => said = Some(spoken),
                        Some(first) => agree(first, &spoken, setting, repeat)?,
                    }
                }
                runs.rates.push(of_mean_time(&rates));
            }
        }
        Ok(entries.iter().zip(runs).map(|(entry, runs)| runs.row(cell, entry)).collect())
    }
}

/// One setting of a cell while it is measured.
struct Entry<'a> {
    setting: Candidate,
    auto: bool,
    cluster: &'a mut Cluster,
    predicted: Option<Prediction>,
}

impl Entry<'_> {
    /// Of vanilla in rounds over a shaped link: two one-way latencies per MoE layer and what the busiest rank computed.
    fn floor(&self, cell: &Cell, stats: &RunStats) -> Option<f64> {
        let latency = self.cluster.options().link?.latency.as_secs_f64();
        let vanilla = self.setting.strategy == Strategy::Vanilla && self.setting.schedule == Schedule::Rounds;
        (vanilla && latency > 0.0).then(|| {
            let layers = self.cluster.spec().moe_layers() as f64;
            cell.sequences as f64 / (2.0 * layers * latency + stats.compute_ms_per_step / 1e3)
        })
    }
}

fn requests(prompts: &[Vec<u32>], max_tokens: usize) -> Vec<Request> {
    let request = |ids: &Vec<u32>| Request {
        prompt_ids: ids.clone(),
        max_tokens,
        ignore_eos: true,
        ..Request::default()
    };
    prompts.iter().map(request).collect()
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
    run(cluster, requests).map(|(times, ..)| rate(&times))
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
pub(super) fn of_mean_time(rates: &[f64]) -> f64 {
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

/// The value that `share` of them are not above; 0 of none. Sorts them.
pub(super) fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * share).ceil() as usize;
    values.get(at.saturating_sub(1)).or(values.last()).copied().unwrap_or(0.0)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

impl Runs {
    fn take(&mut self, times: &Times, stats: RunStats) {
        for sequence in times {
            self.ttft.extend(sequence.first());
            self.seconds.extend(sequence.get(1).map(|second| second - sequence[0]));
            self.gaps.extend(sequence.windows(2).map(|w| w[1] - w[0]));
        }
        self.stats = Some(stats);
    }

    fn row(mut self, cell: &Cell, entry: &Entry<'_>) -> GridRow {
        let (setting, ranks) = (&entry.setting, entry.cluster.options().ranks);
        let range = self.rates.iter().fold((f64::INFINITY, 0.0_f64), |(a, b), r| (a.min(*r), b.max(*r)));
        let stats = self.stats.as_ref();
        let of = |figure: fn(&RunStats) -> f64| stats.map_or(0.0, figure);
        GridRow {
            model: cell.model.clone(),
            top_k: entry.cluster.spec().top_k,
            ranks,
            sequences: cell.sequences,
            link: cell.link.clone(),
            ablation: setting.ablation.filter(|_| !entry.auto).map(str::to_owned),
            strategy: if entry.auto { "auto".into() } else { setting.strategy.to_string() },
            schedule: setting.schedule.to_string(),
            table: match entry.auto {
                true => format!("{} {}", setting.strategy, setting.table),
                false => setting.table.clone(),
            },
            predicted_tokens_per_s: entry.predicted.map(|p| p.tokens_per_s),
            predicted_parts: entry.predicted.map(|p| p.parts),
            ttft_ms: 1e3 * mean(&self.ttft),
            second_token_ms: 1e3 * mean(&self.seconds),
            exchanges_per_layer: of(|s| s.exchanges_per_layer),
            crossings_per_token: of(|s| s.crossings_per_token),
            stay_rate: of(|s| s.stay_rate),
            bytes_per_token: stats.map_or_else(ClassBytes::default, |s| s.decode_bytes_per_token.into()),
            kv_peak_bytes: stats.and_then(|s| s.kv_peak_bytes.iter().copied().max()).unwrap_or(0),
            longest_context: stats.map_or(0, |s| s.longest_context),
            token_time: stats.map_or_else(TokenTime::default, |s| s.token_time),
            floor_tokens_per_s: stats.and_then(|stats| entry.floor(cell, stats)),
            hop_ms: of(|s| s.compute_ms_per_step),
            rows_per_hop: of(|s| s.rows_per_hop),
            busy_share: of(|s| s.busy_share),
            linger: match setting.schedule {
                Schedule::Flow => entry.cluster.options().linger.to_string(),
                Schedule::Rounds => Linger::Off.to_string(),
            },
            linger_share: of(|s| s.linger_share),
            tokens_per_s: quantile(&mut self.rates, 0.5),
            tokens_per_s_range: range,
            tpot_p50_ms: 1e3 * quantile(&mut self.gaps, 0.5),
            tpot_p99_ms: 1e3 * quantile(&mut self.gaps, 0.99),
        }
    }
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
    fn quantiles_are_values_that_occurred() {
        let mut values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!((quantile(&mut values, 0.5), quantile(&mut values, 0.99)), (100.0, 198.0));
        assert_eq!(quantile(&mut [7.0], 0.99), 7.0);
    }
}
