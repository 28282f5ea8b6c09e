//! What the ranks' times come to while everything is at work at once. A rank times its kernels while the network rests; in a
//! run, threads that carry its messages and those of whoever shares its cores take their part, and a message that comes
//! waits until one of them has a core. A short trial of a strategy and schedule says how much that is; other tables are
//! predicted with it.

use super::{Measurements, Prediction, Setting, Shape, Workload, mean, plays, unloaded};
use crate::options::Schedule;
use crate::stats::RunStats;
use exflow_placement::Strategy;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// What a trial came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// As which it ran.
    pub strategy: Strategy,
    /// In which schedule.
    pub schedule: Schedule,
    /// Sequences that decoded at once.
    pub sequences: usize,
    /// Over all of them.
    pub tokens_per_s: f64,
    /// By which the ranks' own times are multiplied to explain it.
    pub factor: f64,
    /// Flow: seconds that a message takes beyond its link's latency, mean; negative where that was measured in a slower moment.
    #[serde(default)]
    pub delay_s: f64,
}

/// What was seen of a trial.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Tried {
    /// Over all sequences.
    pub tokens_per_s: f64,
    /// Flow: what tokens waited for; none where hardly one did.
    pub waits: Option<Waits>,
}

/// One-way latencies that a token waited for, mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Waits {
    /// Per token.
    pub count: f64,
    /// Seconds of each.
    pub each_s: f64,
}

impl Tried {
    /// Of a run of a model with so many MoE layers.
    pub fn of(tokens_per_s: f64, stats: &RunStats, schedule: Schedule, moe_layers: usize) -> Self {
        let count = stats.exchanges_per_layer * moe_layers as f64;
        let away = 1e-3 * (stats.token_time.dispatch_ms + stats.token_time.combine_ms);
        let told = schedule == Schedule::Flow && count > FEWEST_WAITS;
        Self { tokens_per_s, waits: told.then(|| Waits { count, each_s: away / count }) }
    }

    /// Of several with the same work, one after the other.
    pub fn mean(of: &[Self]) -> Self {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let seconds: Vec<f64> = of.iter().map(|tried| tried.tokens_per_s.max(1e-9).recip()).collect();
        let waits: Vec<Waits> = of.iter().filter_map(|tried| tried.waits).collect();
        let of_waits = |what: fn(&Waits) -> f64| mean(&waits.iter().map(what).collect::<Vec<_>>());
        let all = Waits { count: of_waits(|waits| waits.count), each_s: of_waits(|waits| waits.each_s) };
        Self {
            tokens_per_s: if of.is_empty() { 0.0 } else { mean(&seconds).recip() },
            waits: (!waits.is_empty()).then_some(all),
        }
    }

    /// Tokens per second of a text of which each of `sequences` waits so often.
    fn as_if(&self, sequences: usize, count: f64) -> f64 {
        let Some(waits) = self.waits else { return self.tokens_per_s };
        let seconds = sequences as f64 / self.tokens_per_s.max(1e-9);
        let others = (seconds - (waits.count - count) * waits.each_s).max(LEAST * seconds);
        sequences as f64 / others
    }
}

/// Factors that are looked among: beyond them it is not the ranks' times that the trial differs by.
const FACTORS: (f64, f64) = (0.25, 32.0);
/// How far, as a logarithm, the throughput of a trial's few tokens commonly lies from that of the trace for its text alone,
/// and as how many parts of the trace that counts beside those that were played.
const TEXT: (f64, f64) = (0.1, 2.0);
/// How far, as a logarithm, the model's throughput commonly lies from the truth for what it leaves out.
const MODEL: f64 = 0.07;
/// How far, as a logarithm, a factor commonly lies from 1.
const USUAL: f64 = std::f64::consts::LN_2;
/// Steps of the search; each leaves 0.62 of the range.
const STEPS: usize = 15;
/// Share of a trial's time that its text cannot have been behind in.
const LEAST: f64 = 0.5;
/// Share of a latency that it cannot be less than, whenever it was measured.
const QUICKEST: f64 = 0.1;
/// Waits of a token below which what else lies between two ranks would be taken for them.
const FEWEST_WAITS: f64 = 0.25;

impl Load {
    /// Of a trial of `setting`. Where its text waited more or less often than the trace's does, its rate is taken for what
    /// the trace's would have made.
    ///
    /// The likeliest factor where both its own logarithm and what it leaves unexplained are normally distributed: on a
    /// fast link, where the ranks' times are nearly all, it is the one with which the model says the same throughput; on
    /// a slow one, where it would take a large factor to explain a text that crosses a little more, it stays near 1. How far
    /// a trial's text may be from others is how far the parts of the trace are from each other.
    pub fn of(
        measured: &Measurements,
        shape: &Shape,
        work: Workload<'_>,
        setting: Setting<'_>,
        tried: Tried,
    ) -> Self {
        let sequences = work.sequences.max(1);
        let alone = plays(measured, shape, work, setting);
        let off = variance(&alone) + MODEL * MODEL;
        let waits = mean(&alone, sequences).waits_per_layer * shape.moe_layers();
        let as_replayed = tried.as_if(sequences, waits);
        // How much later messages come depends on how much of a token's time away the ranks that serve it take.
        let delay = |log: f64| match tried.waits {
            Some(Waits { each_s, .. }) if waits > FEWEST_WAITS => {
                let travel = unloaded(&measured.loaded(log.exp(), 0.0), shape, work, setting).parts.travel_ms;
                each_s - 1e-3 * travel / waits
            }
            _ => 0.0,
        };
        let unlikely = |log: f64| {
            let loaded = measured.loaded(log.exp(), delay(log));
            let rate = unloaded(&loaded, shape, work, setting).tokens_per_s;
            (rate.max(1e-9) / as_replayed.max(1e-9)).ln().powi(2) / off + (log / USUAL).powi(2)
        };
        let log = least((FACTORS.0.ln(), FACTORS.1.ln()), unlikely);
        let (strategy, schedule) = (setting.strategy, setting.schedule);
        let (factor, delay_s, tokens_per_s) = (log.exp(), delay(log), tried.tokens_per_s);
        Self { strategy, schedule, sequences: work.sequences, tokens_per_s, factor, delay_s }
    }
}

/// Of the logarithm of what several sequences make at once, by the text that they are about.
fn variance(plays: &[Prediction]) -> f64 {
    let logs = || plays.iter().map(|play| play.tokens_per_s.max(1e-9).ln());
    let (mean, (common, parts)) = (logs().sum::<f64>() / plays.len().max(1) as f64, TEXT);
    let apart: f64 = logs().map(|log| (log - mean).powi(2)).sum();
    (parts * common * common + apart) / (parts + plays.len().saturating_sub(1) as f64)
}

/// Where a function with one valley is least: golden-section search.
fn least((mut low, mut high): (f64, f64), of: impl Fn(f64) -> f64) -> f64 {
    let golden = (5.0_f64.sqrt() - 1.0) / 2.0;
    let inner = |low: f64, high: f64| (high - golden * (high - low), low + golden * (high - low));
    let (mut left, mut right) = inner(low, high);
    let (mut at_left, mut at_right) = (of(left), of(right));
    for _ in 0..STEPS {
        if at_left < at_right {
            (high, right, at_right) = (right, left, at_left);
            left = inner(low, high).0;
            at_left = of(left);
        } else {
            (low, left, at_left) = (left, right, at_right);
            right = inner(low, high).1;
            at_right = of(right);
        }
    }
    (low + high) / 2.0
}

impl Measurements {
    /// The world as the trial of this strategy and schedule with about so many sequences found it; as it is without one.
    pub(super) fn under_load(
        &self,
        strategy: Strategy,
        schedule: Schedule,
        sequences: usize,
    ) -> Cow<'_, Self> {
        let apart = |load: &Load| (load.sequences as f64 / sequences as f64).ln().abs();
        let of = self.loads.iter().filter(|l| (l.strategy, l.schedule) == (strategy, schedule));
        match of.min_by(|a, b| apart(a).total_cmp(&apart(b))) {
            Some(load) => Cow::Owned(self.loaded(load.factor, load.delay_s)),
            None => Cow::Borrowed(self),
        }
    }

    /// The same world with ranks that take `factor` times as long and messages that come `delay_s` later. Ranks that are
    /// quicker than they were measured were measured in a slow moment, in which an exchange was slower too.
    fn loaded(&self, factor: f64, delay_s: f64) -> Self {
        let mut loaded = self.clone();
        loaded.ranks.iter_mut().for_each(|times| times.stretch(factor));
        for link in loaded.links.iter_mut().flatten() {
            link.message_s *= factor;
            link.latency_s = (link.latency_s + delay_s).max(QUICKEST * link.latency_s);
        }
        loaded.exchange_s *= factor.min(1.0);
        loaded
    }
}
