//! What the ranks' times come to while everything is at work at once. A rank times its kernels while the network rests; in a
//! run, threads that carry its messages and those of whoever shares its cores take their part. A short trial of a strategy
//! and schedule says how much that is; other tables are predicted with it.

use super::{Measurements, Setting, Shape, Workload, unloaded};
use crate::options::Schedule;
use exflow_placement::Strategy;
use serde::{Deserialize, Serialize};

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
}

/// Factors that are looked among: beyond them it is not the ranks' times that the trial differs by.
const FACTORS: (f64, f64) = (0.25, 32.0);
/// How far, as a logarithm, the throughput of a trial's few tokens may lie from that of the trace for its text alone.
const TEXT: f64 = 0.1;
/// How far, as a logarithm, a factor commonly lies from 1.
const USUAL: f64 = std::f64::consts::LN_2;
/// Steps of the search; each leaves 0.62 of the range.
const STEPS: usize = 18;

impl Load {
    /// Of a trial of `setting` that made so many tokens per second.
    ///
    /// The likeliest factor where both its own logarithm and what it leaves unexplained are normally distributed: on a
    /// fast link, where the ranks' times are nearly all, it is the one with which the model says the same throughput; on
    /// a slow one, where it would take a large factor to explain a text that crosses a little more, it stays near 1.
    pub fn of(
        measured: &Measurements,
        shape: &Shape,
        work: Workload<'_>,
        setting: Setting<'_>,
        tokens_per_s: f64,
    ) -> Self {
        let unlikely = |log: f64| {
            let rate = unloaded(&measured.loaded(log.exp()), shape, work, setting).tokens_per_s;
            ((rate / tokens_per_s.max(1e-9)).ln() / TEXT).powi(2) + (log / USUAL).powi(2)
        };
        let factor = least((FACTORS.0.ln(), FACTORS.1.ln()), unlikely).exp();
        let (strategy, schedule) = (setting.strategy, setting.schedule);
        Self { strategy, schedule, sequences: work.sequences, tokens_per_s, factor }
    }
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
    /// The factor of the trial of this strategy and schedule with about so many sequences; 1 without such a trial.
    pub(super) fn load(&self, strategy: Strategy, schedule: Schedule, sequences: usize) -> f64 {
        let apart = |load: &Load| (load.sequences as f64 / sequences as f64).ln().abs();
        let of = self.loads.iter().filter(|l| (l.strategy, l.schedule) == (strategy, schedule));
        of.min_by(|a, b| apart(a).total_cmp(&apart(b))).map_or(1.0, |load| load.factor)
    }

    /// The same world with ranks that take `factor` times as long.
    pub(super) fn loaded(&self, factor: f64) -> Self {
        let mut loaded = self.clone();
        loaded.ranks.iter_mut().for_each(|times| times.stretch(factor));
        loaded.links.iter_mut().flatten().for_each(|link| link.message_s *= factor);
        loaded
    }
}
