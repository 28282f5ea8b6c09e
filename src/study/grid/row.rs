//! What a setting of the grid did: one line of the result.

use super::Cell;
use super::turns::{Entry, Runs, median, middle, quantile};
use exflow_engine::plan::Parts;
use exflow_engine::{BytesByClass, Cluster, Linger, RunStats, Schedule, TokenTime};
use serde::{Deserialize, Serialize};

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
    /// What was predicted before the runs, the median; none where nothing was.
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
    /// Of `auto` alone: how it did beside the best fixed setting.
    pub beside_best: Option<BesideBest>,
}

/// The planner's pick and the best fixed setting, measured in turns of their own. The best median of many settings is
/// partly luck, which a second measurement does not share.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BesideBest {
    /// The fixed setting whose median over the runs was the highest, of those that `auto` may pick.
    pub setting: String,
    /// Whether that is what `auto` picked: then the ratio is 1 but for the machine's moods.
    pub same: bool,
    /// `auto`'s tokens per second over that setting's: the median over the pairs of runs in which each had its own cluster,
    /// and over those in which each had the other's; of both the geometric mean.
    pub ratio: f64,
    /// The quartiles of all pairs' ratios: how far single pairs lie apart.
    pub quartiles: (f64, f64),
    /// Pairs of runs, of which each began with the other of the two than the pair before.
    pub pairs: usize,
}

impl Runs {
    /// The line of the result.
    pub(super) fn row(mut self, cell: &Cell, entry: &Entry, cluster: &Cluster) -> GridRow {
        let (setting, ranks) = (&entry.setting, cluster.options().ranks);
        let predicted = middle(&entry.predicted);
        let range = self.rates.iter().fold((f64::INFINITY, 0.0_f64), |(a, b), r| (a.min(*r), b.max(*r)));
        let stats = self.stats.as_ref();
        let of = |figure: fn(&RunStats) -> f64| stats.map_or(0.0, figure);
        GridRow {
            model: cell.model.clone(),
            top_k: cluster.spec().top_k,
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
            predicted_tokens_per_s: predicted.map(|p| p.tokens_per_s),
            predicted_parts: predicted.map(|p| p.parts),
            ttft_ms: 1e3 * mean(&self.ttft),
            second_token_ms: 1e3 * mean(&self.seconds),
            exchanges_per_layer: of(|s| s.exchanges_per_layer),
            crossings_per_token: of(|s| s.crossings_per_token),
            stay_rate: of(|s| s.stay_rate),
            bytes_per_token: stats.map_or_else(ClassBytes::default, |s| s.decode_bytes_per_token.into()),
            kv_peak_bytes: stats.and_then(|s| s.kv_peak_bytes.iter().copied().max()).unwrap_or(0),
            longest_context: stats.map_or(0, |s| s.longest_context),
            token_time: stats.map_or_else(TokenTime::default, |s| s.token_time),
            floor_tokens_per_s: stats.and_then(|stats| entry.floor(cell, cluster, stats)),
            hop_ms: of(|s| s.compute_ms_per_step),
            rows_per_hop: of(|s| s.rows_per_hop),
            busy_share: of(|s| s.busy_share),
            linger: match setting.schedule {
                Schedule::Flow => setting.linger.to_string(),
                Schedule::Rounds => Linger::Off.to_string(),
            },
            linger_share: of(|s| s.linger_share),
            beside_best: None,
            tokens_per_s: median(&mut self.rates),
            tokens_per_s_range: range,
            tpot_p50_ms: 1e3 * quantile(&mut self.gaps, 0.5),
            tpot_p99_ms: 1e3 * quantile(&mut self.gaps, 0.99),
        }
    }
}

/// The place of the row of the most tokens per second among those that `eligible` says.
pub(super) fn best_of(rows: &[GridRow], eligible: impl Fn(usize) -> bool) -> Option<usize> {
    let of = (0..rows.len()).filter(|&row| eligible(row));
    of.max_by(|&a, &b| rows[a].tokens_per_s.total_cmp(&rows[b].tokens_per_s))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
