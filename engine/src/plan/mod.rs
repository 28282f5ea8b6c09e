//! A model of time: what a setting will do on a world whose links and ranks were measured, before it runs. Measurements
//! and routes in, tokens per second out; no device, no socket, no clock.
//!
//! Steps in rounds are added up ([`rounds`]), flow is played event by event ([`flow`]), both over the routes that the
//! engine's own route plan gives the tokens of a trace ([`streams`]).

mod flow;
mod load;
mod measured;
mod rounds;
mod streams;

pub use load::{Load, Tried, Waits};
pub(crate) use measured::median;
pub use measured::{ByStrategy, Curve, LinkTime, Measurements, RankTimes, Waking};

use crate::ModelSpec;
use crate::options::{Combine, KvDtype, KvWire, Schedule};
use exflow_placement::{LayerId, PlacementTable, Route, RoutingTrace, Strategy};
use exflow_shaders::Cache;
use exflow_transport::proto::frame::HEADER_BYTES;
use serde::{Deserialize, Serialize};
use streams::{Place, Streams};

/// Tokens of each sequence that are played; the first is not counted. As a run is measured: from the last sequence's first
/// token to the first one's last.
const TOKENS: usize = 24;
const UNCOUNTED: usize = 1;

/// What time and bytes depend on of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Of each layer, its number among the MoE layers; none where it is dense.
    pub layers: Vec<Option<usize>>,
    /// Bytes of a hidden vector on the wire.
    pub hidden_bytes: f64,
    /// Bytes of a token's keys and values at one layer on the wire.
    pub kv_bytes: f64,
}

impl Shape {
    /// Of a model whose cache holds `kv`, which travels as `wire`.
    pub fn of(spec: &ModelSpec, kv: KvDtype, wire: KvWire) -> Self {
        let words = match wire {
            KvWire::Cache => Cache::from(kv).words(4 * spec.attention.cache4()),
            KvWire::Hidden => spec.hidden,
        };
        Self {
            layers: (0..spec.layers).map(|layer| spec.moe_index(layer)).collect(),
            hidden_bytes: 4.0 * spec.hidden as f64,
            kv_bytes: 10.0 + 4.0 * words as f64,
        }
    }

    /// The nearest MoE layer before a layer.
    fn before(&self, layer: usize) -> Option<LayerId> {
        self.layers[..layer].iter().rev().find_map(|moe| moe.map(LayerId::from))
    }

    fn moe_layers(&self) -> f64 {
        self.layers.iter().flatten().count() as f64
    }

    /// Bytes of a row for so many choices, frames' heads apart.
    fn row_bytes(&self, choices: usize) -> f64 {
        18.0 + 8.0 * choices as f64 + self.hidden_bytes
    }

    fn partial_bytes(&self) -> f64 {
        10.0 + self.hidden_bytes
    }
}

/// Bytes of a frame beside its payload.
const FRAME_BYTES: f64 = HEADER_BYTES as f64;

/// What can be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// Where tokens go after their experts.
    pub strategy: Strategy,
    /// What a rank waits for.
    pub schedule: Schedule,
    /// How partials come together.
    pub combine: Combine,
    /// Where experts are.
    pub table: &'a PlacementTable,
    /// `[R]` the group that each rank's sequences are bounded to; empty: to none.
    pub groups: &'a [u16],
}

/// What runs.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// Routes of text like that to come.
    pub routes: &'a RoutingTrace,
    /// Sequences that decode at once.
    pub sequences: usize,
}

/// What a setting is predicted to do while all sequences decode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Over all sequences.
    pub tokens_per_s: f64,
    /// Between two tokens of one sequence.
    pub ms_per_token: f64,
    /// Rounds: exchanges of all ranks per MoE layer. Flow: one-way latencies that a token waits for per MoE layer.
    pub waits_per_layer: f64,
    /// Rows and partials over a link, per token.
    pub crossings_per_token: f64,
    /// Share of the steps from one MoE layer to the next, the wrap included, after which a token is where it was.
    pub stay_rate: f64,
    /// Where a token's time goes.
    pub parts: Parts,
    /// Bytes per token: rows to experts.
    pub dispatch_bytes: f64,
    /// Bytes per token: partials.
    pub combine_bytes: f64,
    /// Bytes per token: keys and values.
    pub kv_bytes: f64,
}

/// Milliseconds of a token, by what it waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Parts {
    /// Being worked on; in rounds: until the slowest rank is done.
    pub compute_ms: f64,
    /// Travelling, or waiting for partials that do.
    pub travel_ms: f64,
    /// Flow: waiting for a rank that works on others.
    pub queue_ms: f64,
    /// Waiting for keys and values.
    pub context_ms: f64,
}

/// What `setting` will do, its ranks under the load that the nearest trial saw.
pub fn predict(
    measured: &Measurements,
    shape: &Shape,
    work: Workload<'_>,
    setting: Setting<'_>,
) -> Prediction {
    let loaded = measured.under_load(setting.strategy, setting.schedule, work.sequences.max(1));
    unloaded(&loaded, shape, work, setting)
}

/// The same by the ranks' times as they are.
fn unloaded(measured: &Measurements, shape: &Shape, work: Workload<'_>, setting: Setting<'_>) -> Prediction {
    let plays = plays(measured, shape, work, setting);
    if plays.is_empty() { Prediction::default() } else { mean(&plays, work.sequences.max(1)) }
}

/// Of several parts of the routes.
fn plays(
    measured: &Measurements,
    shape: &Shape,
    work: Workload<'_>,
    setting: Setting<'_>,
) -> Vec<Prediction> {
    if work.routes.tokens() == 0 || measured.world_size() < 2 {
        return Vec::new();
    }
    let play = |streams: Streams<'_>| {
        let scene = Scene { measured, shape, streams: &streams, setting: &setting };
        match setting.schedule {
            Schedule::Rounds => rounds::play(scene),
            Schedule::Flow => flow::play(scene),
        }
    };
    Streams::draws(work.routes, work.sequences.max(1)).map(play).collect()
}

/// What several plays come to: times and bytes are means, and tokens per second those of the mean time.
fn mean(plays: &[Prediction], sequences: usize) -> Prediction {
    let (share, mut mean) = (1.0 / plays.len() as f64, Prediction::default());
    for play in plays {
        let (parts, of) = (&mut mean.parts, &play.parts);
        for (mean, of) in [
            (&mut mean.ms_per_token, play.ms_per_token),
            (&mut mean.waits_per_layer, play.waits_per_layer),
            (&mut mean.crossings_per_token, play.crossings_per_token),
            (&mut mean.stay_rate, play.stay_rate),
            (&mut mean.dispatch_bytes, play.dispatch_bytes),
            (&mut mean.combine_bytes, play.combine_bytes),
            (&mut mean.kv_bytes, play.kv_bytes),
            (&mut parts.compute_ms, of.compute_ms),
            (&mut parts.travel_ms, of.travel_ms),
            (&mut parts.queue_ms, of.queue_ms),
            (&mut parts.context_ms, of.context_ms),
        ] {
            *mean += share * of;
        }
    }
    mean.tokens_per_s = 1e3 * sequences as f64 / mean.ms_per_token.max(1e-6);
    mean
}

/// What is played.
#[derive(Clone, Copy)]
struct Scene<'a> {
    measured: &'a Measurements,
    shape: &'a Shape,
    streams: &'a Streams<'a>,
    setting: &'a Setting<'a>,
}

/// Partials that a token's next residence gets from other ranks.
fn remote_partials(route: &Route, combine: Combine) -> usize {
    usize::from(crate::runtime::expected(route, combine))
}

#[cfg(test)]
mod tests;
