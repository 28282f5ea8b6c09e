//! What an engine does right now: counts since its start, and rates over the last half second.

use crate::runtime::{RankStats, class_bytes, row_exchanges};
use crate::stats::{BytesByClass, ratio, traffic};
use exflow_placement::Rank;
use exflow_transport::WireStats;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Requests by what became of them, since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct RequestCounts {
    /// Taken.
    pub submitted: u64,
    /// Came to their end.
    pub finished: u64,
    /// Given up by whoever asked.
    pub cancelled: u64,
    /// Not taken, because too many waited.
    pub refused: u64,
    /// Taken, but could not be run.
    pub failed: u64,
}

/// One rank.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LiveRank {
    /// (token, expert) pairs worked on since the start.
    pub pairs: u64,
    /// Decode tokens that it began, since the start.
    pub decode_tokens: u64,
    /// KV cache blocks in use.
    pub kv_blocks_used: u64,
    /// KV cache blocks that there are.
    pub kv_blocks: u64,
    /// Nothing was heard from its process for a second.
    pub suspect: bool,
    /// Bytes that the rank's device has allocated, where its driver's interface tells.
    pub memory_bytes: Option<u64>,
}

/// Moves of experts to another table while requests run, since the start.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct MoveCounts {
    /// Asked for. What neither ended nor was refused is under way.
    pub asked: u64,
    /// Came to their end: all tokens go by the other table.
    pub done: u64,
    /// Not begun or given up; all tokens go by the table that they went by before.
    pub refused: u64,
    /// Experts that ranks read for those that are done.
    pub experts: u64,
    /// Seconds that these took together.
    pub seconds: f64,
    /// Tokens told while those experts were read.
    pub tokens: u64,
    /// Why the last one of those refused was.
    pub why: Option<String>,
}

/// A running engine's figures. Rates are over the last half second in which anything ran.
#[derive(Debug, Clone, Serialize)]
pub struct LiveStats {
    /// Requests with a token that have not ended.
    pub running: usize,
    /// Requests without a token yet.
    pub waiting: usize,
    /// By what became of them.
    pub requests: RequestCounts,
    /// Tokens of all prompts since the start.
    pub prompt_tokens: u64,
    /// Tokens made since the start.
    pub output_tokens: u64,
    /// Tokens made per second.
    pub tokens_per_s: f64,
    /// Tokens in a decode step, on all ranks together; a mean.
    pub batch: f64,
    /// All-to-all rounds (dispatch and combine) per MoE layer and decode step.
    pub exchanges_per_layer: f64,
    /// Share of decode tokens' layer transitions whose two main experts lie on one rank, since the start.
    pub stay_rate: f64,
    /// Milliseconds from the call to the first token: sum over requests since the start.
    pub ttft_ms_sum: f64,
    /// How many that sum is of.
    pub ttft_count: u64,
    /// Milliseconds between a sequence's tokens: sum since the start.
    pub tpot_ms_sum: f64,
    /// How many that sum is of.
    pub tpot_count: u64,
    /// Bytes since the start, by class.
    pub bytes: BytesByClass<u64>,
    /// `[R][R]` bytes from row rank to column rank since the start.
    pub traffic: Vec<Vec<u64>>,
    /// `[R][R]` the same per second.
    pub traffic_per_s: Vec<Vec<f64>>,
    /// `[R]`.
    pub ranks: Vec<LiveRank>,
    /// Decode steps since the start.
    pub decode_steps: u64,
    /// Prefill steps since the start.
    pub prefill_steps: u64,
    /// Moves of experts.
    pub moves: MoveCounts,
}

impl LiveStats {
    pub(super) fn new(ranks: usize) -> Self {
        Self {
            running: 0,
            waiting: 0,
            requests: RequestCounts::default(),
            prompt_tokens: 0,
            output_tokens: 0,
            tokens_per_s: 0.0,
            batch: 0.0,
            exchanges_per_layer: 0.0,
            stay_rate: 0.0,
            ttft_ms_sum: 0.0,
            ttft_count: 0,
            tpot_ms_sum: 0.0,
            tpot_count: 0,
            bytes: BytesByClass::default(),
            traffic: vec![vec![0; ranks]; ranks],
            traffic_per_s: vec![vec![0.0; ranks]; ranks],
            ranks: vec![LiveRank::default(); ranks],
            decode_steps: 0,
            prefill_steps: 0,
            moves: MoveCounts::default(),
        }
    }
}

/// Turns the ranks' reports into [`LiveStats`].
pub(super) struct Meter {
    layers: f64,
    ranks: usize,
    /// When the last whole report came.
    reported: Instant,
    /// Reports asked for that have not come.
    missing: usize,
    /// Something ran since the last report.
    unreported: bool,
    tokens: u64,
    interval: Sums,
    total: Sums,
}

/// Counts of all ranks over some time.
#[derive(Default)]
struct Sums {
    wire: WireStats,
    decode_wire: WireStats,
    decode_tokens: u64,
    decode_steps: u64,
    decode_parts: u64,
    prefill_steps: u64,
    transitions: u64,
    stays: u64,
}

impl Meter {
    pub(super) fn new(ranks: usize, layers: usize) -> Self {
        Self {
            layers: layers as f64,
            ranks,
            reported: Instant::now(),
            missing: 0,
            unreported: true, // the first report tells what there is
            tokens: 0,
            interval: Sums::default(),
            total: Sums::default(),
        }
    }

    pub(super) fn since_report(&self) -> Duration {
        self.reported.elapsed()
    }

    /// Whether a report has still to be asked for or to come.
    pub(super) fn owes(&self) -> bool {
        self.unreported || self.missing > 0
    }

    /// Whether it is time to ask for one.
    pub(super) fn is_due(&self, every: Duration, runs: bool) -> bool {
        self.missing == 0 && (runs || self.unreported) && self.since_report() >= every
    }

    pub(super) fn asked(&mut self) {
        self.missing = self.ranks;
        self.unreported = false;
    }

    /// A request came.
    pub(super) fn wake(&mut self) {
        if !self.owes() {
            self.reported = Instant::now(); // rates are not over the time in which nothing ran
        }
        self.unreported = true;
    }

    /// Something changed that the next report is to tell.
    pub(super) fn touch(&mut self) {
        self.unreported = true;
    }

    /// A token came `now` seconds after its request, `gap` after the one before it.
    pub(super) fn token(&mut self, first: bool, now: f64, gap: f64, live: &mut LiveStats) {
        self.tokens += 1;
        self.unreported = true;
        live.output_tokens += 1;
        if first {
            live.waiting -= 1;
            live.running += 1;
            live.ttft_ms_sum += 1e3 * now;
            live.ttft_count += 1;
        } else {
            live.tpot_ms_sum += 1e3 * gap;
            live.tpot_count += 1;
        }
    }

    /// Takes in one rank's counts; with the last rank's the figures are made.
    pub(super) fn add(&mut self, rank: Rank, stats: &RankStats, live: &mut LiveStats) {
        let sums = &mut self.interval;
        sums.wire.merge(&stats.wire);
        sums.decode_wire.merge(&stats.decode_wire);
        sums.decode_tokens += stats.decode_tokens;
        sums.transitions += stats.transitions;
        sums.stays += stats.stays;
        if rank == Rank(0) {
            sums.decode_steps += stats.decode_steps;
            sums.decode_parts += stats.decode_parts;
            sums.prefill_steps += stats.prefill_steps;
        }
        if let Some(own) = live.ranks.get_mut(rank.index()) {
            own.pairs += stats.pairs;
            own.decode_tokens += stats.decode_tokens;
            (own.kv_blocks_used, own.kv_blocks) = stats.kv_blocks;
            own.memory_bytes = stats.memory_bytes;
        }
        self.missing = self.missing.saturating_sub(1);
        if self.missing == 0 {
            self.settle(live);
        }
    }

    fn settle(&mut self, live: &mut LiveStats) {
        let seconds = self.reported.elapsed().as_secs_f64();
        self.reported = Instant::now();
        let now = std::mem::take(&mut self.interval);
        live.tokens_per_s = ratio(std::mem::take(&mut self.tokens) as f64, seconds);
        live.batch = ratio(now.decode_tokens as f64, now.decode_steps as f64);
        if now.decode_steps > 0 {
            let rounds = row_exchanges(&now.decode_wire) as f64;
            live.exchanges_per_layer = ratio(rounds, now.decode_parts as f64 * self.layers);
        }
        let bytes = traffic(&now.wire, self.ranks);
        let rate = |row: &Vec<u64>| row.iter().map(|&b| ratio(b as f64, seconds)).collect();
        live.traffic_per_s = bytes.iter().map(rate).collect();

        let total = &mut self.total;
        total.wire.merge(&now.wire);
        total.transitions += now.transitions;
        total.stays += now.stays;
        live.decode_steps += now.decode_steps;
        live.prefill_steps += now.prefill_steps;
        live.stay_rate = match self.ranks {
            1 => 1.0,
            _ => ratio(total.stays as f64, total.transitions as f64),
        };
        live.traffic = traffic(&total.wire, self.ranks);
        live.bytes = BytesByClass::from_fn(|class| class_bytes(&total.wire, class));
    }
}
