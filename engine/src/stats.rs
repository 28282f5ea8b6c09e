//! The figures of a run, made from every rank's counts.

use crate::Cluster;
use crate::options::{PlacementSource, Schedule, TransportKind};
use crate::runtime::{BLOCK, RankStats, Waited, class_bytes, row_exchanges};
use exflow_placement::Rank;
use exflow_transport::{ByteClass, WireStats};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Bytes (or bytes per token) by what they carry.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct BytesByClass<T> {
    /// Rows on their way to experts.
    pub dispatch: T,
    /// Partials on their way to a token's next residence.
    pub combine: T,
    /// Keys and values that keep contexts coherent.
    pub kv: T,
    /// Sampled ids and what rank 0 decides.
    pub ids: T,
    /// Hello, heartbeats, goodbye.
    pub control: T,
}

impl<T> BytesByClass<T> {
    /// By class, from a function of the class.
    pub(crate) fn from_fn(mut of: impl FnMut(ByteClass) -> T) -> Self {
        Self {
            dispatch: of(ByteClass::Dispatch),
            combine: of(ByteClass::Combine),
            kv: of(ByteClass::Kv),
            ids: of(ByteClass::Ids),
            control: of(ByteClass::Control),
        }
    }
}

/// Milliseconds of a decoded token, mean, by what they went into. In rounds those of a step, mean over the ranks; there
/// waiting for the slowest rank is part of waiting for what it sends.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct TokenTime {
    /// Being worked on; in flow: with the other tokens of the hop.
    pub compute_ms: f64,
    /// In rounds: waiting for rows. In flow: on the way to another rank.
    pub dispatch_ms: f64,
    /// Waiting for partials.
    pub combine_ms: f64,
    /// Waiting for keys and values.
    pub context_ms: f64,
    /// Waiting for sampled ids, or in flow for cache blocks.
    pub ids_ms: f64,
    /// In flow: waiting for a rank that works on others.
    pub queue_ms: f64,
    /// In flow: held back, so that others might share the launch.
    #[serde(default)]
    pub linger_ms: f64,
}

impl TokenTime {
    /// All of it.
    pub fn total_ms(&self) -> f64 {
        let away = self.dispatch_ms + self.combine_ms + self.context_ms + self.ids_ms;
        self.compute_ms + away + self.queue_ms + self.linger_ms
    }

    fn of(reports: &[RankStats], flow: bool, tpot_ms: f64) -> Self {
        let mut sum = Waited::default();
        reports.iter().for_each(|report| sum.add(&report.waited));
        let of = |count: fn(&RankStats) -> u64| reports.iter().map(count).sum::<u64>() as f64;
        let parts = if flow { of(|r| r.decode_tokens) } else { of(|r| r.decode_steps) };
        let ms = |seconds: f64| 1e3 * ratio(seconds, parts);
        let mut time = Self {
            compute_ms: ms(sum.compute),
            dispatch_ms: ms(sum.dispatch),
            combine_ms: ms(sum.combine),
            context_ms: ms(sum.context),
            ids_ms: ms(sum.ids),
            queue_ms: ms(sum.queue),
            linger_ms: ms(sum.linger),
        };
        if flow {
            // No clock is common to two ranks: what is not spent on one is spent between them.
            time.dispatch_ms = (tpot_ms - time.total_ms()).max(0.0);
        }
        time
    }
}

/// Figures of one run of [`Cluster::generate`].
#[derive(Debug, Clone, Serialize)]
pub struct RunStats {
    /// `vanilla` or `coherent`.
    pub strategy: String,
    /// `rounds` or `flow`.
    pub schedule: String,
    /// `round_robin`, `linear`, a path, or `table`.
    pub placement: String,
    /// `local` or `quic`.
    pub transport: String,
    /// `exact` or `sum`.
    pub combine: String,
    /// `exact` or `fast`: what ran, which is `exact` where matrix units failed their trial and nothing else is fast.
    pub numerics: String,
    /// `[R]` rows and columns of the matrices of f16 that a rank's matrix units make products of; 0: it uses none.
    pub matrix_units: Vec<u64>,
    /// World size.
    pub ranks: usize,
    /// `home` or `replicated`.
    pub prefill: String,
    /// `host`, `pair` or `world`.
    pub domain: String,
    /// `[R]` the most bytes of KV cache that each rank had in use at once.
    pub kv_peak_bytes: Vec<u64>,
    /// Bytes of KV cache on every rank for a token of text.
    pub kv_bytes_per_token: f64,
    /// The longest text that the cache of a rank holds, or the model's context where that is shorter; tokens.
    pub longest_context: usize,
    /// What lies between the ranks: `local` (memory), `loopback`, `network`, or what this process shapes its link to.
    pub link: String,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens made.
    pub output_tokens: u64,
    /// From the call to the last token.
    pub seconds: f64,
    /// Tokens after each sequence's first, per second spent in decode steps; in flow, per second from the first of all
    /// tokens to the last.
    pub tokens_per_s: f64,
    /// Mean milliseconds from the call to a sequence's first token.
    pub ttft_ms: f64,
    /// Mean milliseconds per token after the first.
    pub tpot_ms: f64,
    /// All-to-all rounds (dispatch and combine) per MoE layer and decode step, counted by the transport; each half of a
    /// step that runs in halves has its own. In flow there
    /// are none: one-way latencies that a decode token waits for, per MoE layer.
    pub exchanges_per_layer: f64,
    /// The same for prefill steps.
    pub prefill_exchanges_per_layer: f64,
    /// Share of decode tokens' layer transitions whose two main experts lie on one rank.
    pub stay_rate: f64,
    /// Rows and partials over a link per decode token.
    pub crossings_per_token: f64,
    /// Bytes of the whole run, all ranks, headers included.
    pub bytes: BytesByClass<u64>,
    /// Bytes of decode steps per decode token; ids per decode step's share of the run.
    pub decode_bytes_per_token: BytesByClass<f64>,
    /// `[R][R]` bytes from row rank to column rank.
    pub traffic: Vec<Vec<u64>>,
    /// Milliseconds that the busiest rank computed per decode step; in flow: per submission, mean over the ranks.
    pub compute_ms_per_step: f64,
    /// Where a decoded token's time goes.
    pub token_time: TokenTime,
    /// In rounds: launches of rows of some peers that did not wait for those of the others, all ranks together.
    pub peer_starts: u64,
    /// In rounds: share of decode steps that ran in two halves.
    pub halved_steps: f64,
    /// In rounds: share of decode steps that a single rank submitted with the one before them.
    pub joined_steps: f64,
    /// In flow: rows in one submission, mean; 0 in rounds.
    pub rows_per_hop: f64,
    /// In flow: share of the time that ranks worked, mean; 0 in rounds.
    pub busy_share: f64,
    /// In flow: share of the time that ranks had rows and held them back, mean; 0 in rounds.
    pub linger_share: f64,
    /// In flow: frames that were dropped because their sequence had ended.
    pub dropped_frames: u64,
    /// `[R]` kernels that a rank's driver made during the run, each when it was first launched: steps of 5 to 60 ms more on lavapipe.
    pub kernels_made: Vec<u64>,
    /// `[R]` (token, expert) pairs worked on by each rank.
    pub expert_load: Vec<u64>,
}

pub(crate) fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// Adds the ranks' counts up. `times` per sequence: seconds to its first and last token, and its tokens.
pub(crate) fn summarise(
    cluster: &Cluster,
    reports: &[RankStats],
    times: &[(f64, f64, usize)],
    prompt_tokens: u64,
    seconds: f64,
) -> RunStats {
    let options = cluster.options();
    let layers = cluster.spec().moe_layers() as f64;
    let sum = |of: fn(&RankStats) -> u64| reports.iter().map(of).sum::<u64>() as f64;
    let merged = |of: fn(&RankStats) -> &WireStats| {
        let mut all = WireStats::default();
        reports.iter().for_each(|r| all.merge(of(r)));
        all
    };
    let (wire, decode_wire) = (merged(|r| &r.wire), merged(|r| &r.decode_wire));
    let prefill_wire = merged(|r| &r.prefill_wire);
    let decode_tokens = sum(|r| r.decode_tokens);
    let steps = |of: fn(&RankStats) -> u64| reports.first().map_or(0.0, |r| of(r) as f64);
    let decode_seconds = match options.schedule {
        // There are no steps to add up: from the first of all tokens to the last.
        Schedule::Flow if options.ranks > 1 => {
            let first = times.iter().map(|t| t.0).fold(f64::INFINITY, f64::min);
            times.iter().map(|t| t.1).fold(0.0, f64::max) - first
        }
        _ => reports.first().map_or(0.0, |r| r.decode_seconds),
    };
    let later: Vec<_> = times.iter().filter(|(_, _, n)| *n > 1).collect();
    let tpot = |(first, last, n): &&(f64, f64, usize)| 1e3 * (last - first) / (*n as f64 - 1.0);
    let flow = options.schedule == Schedule::Flow && options.ranks > 1;
    let tpot_ms = ratio(later.iter().map(tpot).sum(), later.len() as f64);
    RunStats {
        strategy: options.strategy.to_string(),
        schedule: options.schedule.to_string(),
        placement: match &options.placement {
            PlacementSource::Table(_) => cluster.placement().source.clone().unwrap_or_else(|| "table".into()),
            other => other.to_string(),
        },
        transport: options.transport.to_string(),
        combine: options.combine.to_string(),
        numerics: options.numerics.to_string(),
        matrix_units: reports.iter().map(|r| r.matrix_side).collect(),
        ranks: options.ranks,
        prefill: options.prefill.to_string(),
        domain: options.domain.to_string(),
        kv_peak_bytes: reports.iter().map(|r| r.kv_peak_blocks * cluster.block_bytes()).collect(),
        kv_bytes_per_token: ratio(cluster.block_bytes() as f64, BLOCK as f64),
        longest_context: cluster.cache_positions().min(cluster.spec().max_positions),
        link: match (options.link, &options.group, options.transport) {
            (_, None, TransportKind::Local) => "local".into(),
            (Some(link), ..) => link.to_string(),
            (None, Some(_), _) => "network".into(),
            (None, None, TransportKind::Quic) => "loopback".into(),
        },
        prompt_tokens,
        output_tokens: times.iter().map(|(_, _, n)| *n as u64).sum(),
        seconds,
        tokens_per_s: ratio(decode_tokens, decode_seconds),
        ttft_ms: 1e3 * ratio(times.iter().map(|(first, _, _)| first).sum(), times.len() as f64),
        tpot_ms,
        exchanges_per_layer: match options.schedule {
            Schedule::Flow if options.ranks > 1 => ratio(sum(|r| r.latencies), decode_tokens * layers),
            _ => ratio(row_exchanges(&decode_wire) as f64, steps(|r| r.decode_parts) * layers),
        },
        prefill_exchanges_per_layer: ratio(
            row_exchanges(&prefill_wire) as f64,
            steps(|r| r.prefill_steps) * layers,
        ),
        stay_rate: match reports.len() {
            1 => 1.0,
            _ => ratio(sum(|r| r.stays), sum(|r| r.transitions)),
        },
        crossings_per_token: ratio(sum(|r| r.crossings), decode_tokens),
        bytes: BytesByClass::from_fn(|class| class_bytes(&wire, class)),
        decode_bytes_per_token: BytesByClass::from_fn(|class| {
            let (bytes, tokens) = match class {
                // Ids travel between steps: of the whole run, over all tokens made.
                ByteClass::Ids | ByteClass::Control => {
                    (class_bytes(&wire, class), times.iter().map(|(_, _, n)| *n as f64).sum())
                }
                _ => (class_bytes(&decode_wire, class), decode_tokens),
            };
            ratio(bytes as f64, tokens)
        }),
        traffic: traffic(&wire, options.ranks),
        compute_ms_per_step: compute_ms(reports, flow),
        token_time: TokenTime::of(reports, flow, tpot_ms),
        peer_starts: reports.iter().map(|r| r.peer_starts).sum(),
        halved_steps: ratio(
            steps(|r| r.decode_parts.saturating_sub(r.decode_steps)),
            steps(|r| r.decode_steps),
        ),
        joined_steps: ratio(steps(|r| r.joined_steps), steps(|r| r.decode_steps)),
        rows_per_hop: ratio(sum(|r| r.hop_rows), sum(|r| r.hops)),
        busy_share: {
            let (busy, idle) =
                reports.iter().fold((0.0, 0.0), |t, r| (t.0 + r.busy_seconds, t.1 + r.idle_seconds));
            ratio(busy, busy + idle)
        },
        linger_share: {
            let sum = |of: fn(&RankStats) -> f64| reports.iter().map(of).sum::<f64>();
            ratio(sum(|r| r.linger_seconds), sum(|r| r.busy_seconds) + sum(|r| r.idle_seconds))
        },
        dropped_frames: reports.iter().map(|r| r.dropped).sum(),
        kernels_made: reports.iter().map(|r| r.kernels_made).collect(),
        expert_load: reports.iter().map(|r| r.pairs).collect(),
    }
}

fn compute_ms(reports: &[RankStats], flow: bool) -> f64 {
    if flow {
        let (busy, hops) = reports.iter().fold((0.0, 0), |t, r| (t.0 + r.busy_seconds, t.1 + r.hops));
        return 1e3 * ratio(busy, hops as f64);
    }
    let of = |r: &RankStats| {
        let waits = [ByteClass::Dispatch, ByteClass::Combine, ByteClass::Ids];
        let wait: Duration = waits.into_iter().map(|class| r.decode_wire.wait(class)).sum();
        ratio((r.decode_seconds - wait.as_secs_f64()).max(0.0), r.decode_steps as f64)
    };
    1e3 * reports.iter().map(of).fold(0.0, f64::max)
}

pub(crate) fn traffic(wire: &WireStats, ranks: usize) -> Vec<Vec<u64>> {
    let between = |from: usize, to: usize| {
        let classes =
            [ByteClass::Dispatch, ByteClass::Combine, ByteClass::Kv, ByteClass::Ids, ByteClass::Control];
        let of = |class| {
            let sum = wire.between(Rank::from(from), Rank::from(to), class);
            sum.wire_bytes_sent.max(sum.payload_bytes_sent)
        };
        classes.into_iter().map(of).sum()
    };
    (0..ranks).map(|from| (0..ranks).map(|to| between(from, to)).collect()).collect()
}

/// Bytes as people read them.
pub(crate) fn gib(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}
