//! What a report shows, as plain numbers; also the JSON that the page carries.

mod checks;

pub use checks::{CheckFacts, StrategyFacts};

use crate::study::Replayed;
use exflow_placement::Moment;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Everything that one report shows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportData {
    /// Name of the run, for the page's title.
    pub title: String,
    /// Version of `exflow` that measured.
    pub version: String,
    /// When the run ended, as UTC text.
    pub created: String,
    /// The model that ran.
    pub model: ModelFacts,
    /// Adapter of each rank.
    pub adapters: Vec<String>,
    /// What the ranks were joined by: `local` or `quic`.
    pub transport: String,
    /// What was profiled.
    pub profile: ProfileFacts,
    /// The solved placement.
    pub placement: PlacementFacts,
    /// Transition counts between adjacent MoE layers, `[L-1][E][E]`: row = expert at l, column = expert at l+1.
    pub transitions: Vec<Vec<Vec<f64>>>,
    /// Tokens that each expert of each MoE layer worked on in the profile, `[L][E]`.
    pub load: Vec<Vec<f64>>,
    /// Stay rates on text that was not profiled.
    pub stay: Vec<StayFacts>,
    /// One entry per setting that ran, in the order of the table.
    pub settings: Vec<SettingFacts>,
    /// Repeats that the medians are over.
    pub repeats: usize,
    /// Sequences that ran at once.
    pub sequences: usize,
    /// Whether every setting and repeat produced the same tokens.
    pub same_tokens: bool,
    /// Prompts and the text that every setting produced for them.
    pub texts: Vec<(String, String)>,
    /// Further placements beside the one that groups the maps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<PlacementFacts>,
    /// Replays of `exflow simulate`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub replays: Vec<Replayed>,
    /// Rows of `exflow bench strategies`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub strategies: Vec<StrategyFacts>,
    /// Claims of the paper against our figures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<CheckFacts>,
}

/// The model's shape.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelFacts {
    /// Folder name.
    pub name: String,
    /// Digest of its weights, as the placement table records it.
    pub digest: String,
    /// Transformer layers.
    pub layers: usize,
    /// Layers whose FFN is a Mixture of Experts.
    pub moe_layers: usize,
    /// Experts per MoE layer.
    pub experts: usize,
    /// Experts that a token uses per layer.
    pub top_k: usize,
    /// Size of the residual stream.
    pub hidden: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Longest context.
    pub positions: usize,
}

/// What the affinity was counted on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ProfileFacts {
    /// Tokens that were profiled and solved on.
    pub tokens: usize,
    /// Tokens kept back for the stay rates.
    pub held_out_tokens: usize,
    /// Where the text came from, for people.
    pub sources: Vec<String>,
    /// Wall clock of profiling, in seconds.
    pub seconds: f64,
}

/// The solved placement and how good it is known to be.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PlacementFacts {
    /// File or rule, where there are several.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Ranks that the experts are spread over.
    pub ranks: usize,
    /// `[L][E]`: the rank of each expert.
    pub assignment: Vec<Vec<usize>>,
    /// Predicted crossings per token, on the profile.
    pub crossings_per_token: f64,
    /// No placement crosses less than this on the profile, where a bound was proven.
    pub lower_bound: Option<f64>,
    /// Wall clock of the solver, in seconds.
    pub seconds: f64,
    /// Cost and bound in counts × link cost by rising time, as the table carries them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Moment>,
    /// Cost of other placements by name, in the same units.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub baselines: BTreeMap<String, f64>,
}

/// Stay rate of one placement on held-out text.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StayFacts {
    /// Name of the placement.
    pub label: String,
    /// Share of layer transitions whose two experts lie on one rank, 0 to 1.
    pub stay_rate: f64,
    /// Crossings per token.
    pub crossings_per_token: f64,
    /// Rows of the busiest rank over the mean, worst layer.
    pub imbalance: f64,
}

/// Medians of one setting (strategy and placement).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SettingFacts {
    /// `vanilla` or `coherent`.
    pub strategy: String,
    /// Name of the placement.
    pub placement: String,
    /// Output tokens per second over all sequences, decode.
    pub tokens_per_s: f64,
    /// Lowest and highest of the repeats.
    pub tokens_per_s_range: (f64, f64),
    /// Mean time to first token, milliseconds.
    pub ttft_ms: f64,
    /// Mean time per output token after the first, milliseconds.
    pub tpot_ms: f64,
    /// Exchanges per MoE layer and decode step, counted on the wire.
    pub exchanges_per_layer: f64,
    /// Share of decode transitions that stayed on their rank, 0 to 1.
    pub stay_rate: f64,
    /// Crossings per decoded token.
    pub crossings_per_token: f64,
    /// Bytes of one run, prefill and decode, all ranks, headers included.
    pub bytes: ByteClasses,
    /// Bytes per decoded token.
    pub decode_bytes_per_token: ByteClasses,
    /// Bytes from row rank to column rank, one run.
    pub traffic: Vec<Vec<u64>>,
    /// Rows that each rank's experts worked on, one run.
    pub expert_load: Vec<u64>,
}

/// Bytes by class; nothing on the wire is outside these five.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ByteClasses {
    /// Rows on their way to experts.
    pub dispatch: f64,
    /// Expert outputs on their way back.
    pub combine: f64,
    /// Keys and values that keep contexts coherent.
    pub kv: f64,
    /// Sampled ids.
    pub ids: f64,
    /// Everything else.
    pub control: f64,
}

impl ByteClasses {
    /// Names and values, in the order of every table and plot.
    pub fn entries(&self) -> [(&'static str, f64); 5] {
        [
            ("dispatch", self.dispatch),
            ("combine", self.combine),
            ("kv", self.kv),
            ("ids", self.ids),
            ("control", self.control),
        ]
    }

    /// All classes together.
    pub fn total(&self) -> f64 {
        self.entries().iter().map(|(_, bytes)| bytes).sum()
    }
}

impl SettingFacts {
    /// `strategy, placement`, as titles have it.
    pub fn label(&self) -> String {
        format!("{} · {}", self.strategy, self.placement.replace('_', "-"))
    }
}
