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
    /// By which the ranks' own times must be multiplied for the model of time to say the same.
    pub factor: f64,
}

/// Factors that are looked among: beyond them it is not the ranks' times that the trial differs by.
const FACTORS: (f64, f64) = (0.25, 32.0);
/// Halvings of that range.
const HALVINGS: usize = 20;

impl Load {
    /// Of a trial of `setting` that made so many tokens per second.
    pub fn of(
        measured: &Measurements,
        shape: &Shape,
        work: Workload<'_>,
        setting: Setting<'_>,
        tokens_per_s: f64,
    ) -> Self {
        let rate = |factor: f64| unloaded(&measured.loaded(factor), shape, work, setting).tokens_per_s;
        let (mut low, mut high) = FACTORS;
        for _ in 0..HALVINGS {
            let middle = (low * high).sqrt();
            match rate(middle) > tokens_per_s {
                true => low = middle,
                false => high = middle,
            }
        }
        let (strategy, schedule) = (setting.strategy, setting.schedule);
        Self { strategy, schedule, sequences: work.sequences, tokens_per_s, factor: (low * high).sqrt() }
    }
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
