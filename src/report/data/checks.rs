//! Rows of `exflow bench strategies`, and claims of the paper with what was measured here.

use super::ByteClasses;
use serde::{Deserialize, Serialize};

/// One row of `exflow bench strategies --format json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StrategyFacts {
    /// `bundled`, `synthetic-gqa` or a folder.
    pub model: String,
    /// Experts that a token takes; 0 where the file does not tell.
    pub top_k: usize,
    /// R.
    pub ranks: usize,
    /// Sequences at once.
    pub sequences: usize,
    /// `local`, `lan`, `wifi` or `wan`.
    pub link: String,
    /// `vanilla`, `coherent` or `auto`.
    pub strategy: String,
    /// `rounds` or `flow`.
    pub schedule: String,
    /// `round_robin`, `affinity`, …
    pub table: String,
    /// Measured output tokens a second, decode.
    pub tokens_per_s: f64,
    /// What the planner said before.
    pub predicted_tokens_per_s: Option<f64>,
    /// Time to first token, ms.
    pub ttft_ms: f64,
    /// Median time per further token, ms.
    pub tpot_p50_ms: f64,
    /// The slowest of a hundred, ms.
    pub tpot_p99_ms: f64,
    /// Exchanges per MoE layer and step.
    pub exchanges_per_layer: f64,
    /// Moves to another rank per token.
    pub crossings_per_token: f64,
    /// Share of transitions that stay.
    pub stay_rate: f64,
    /// Bytes per decoded token by class.
    pub bytes_per_token: ByteClasses,
    /// Whether the tokens were those of every other setting, where that was noted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_tokens: Option<bool>,
}

/// One claim of the paper, our figure, and whether it holds here.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckFacts {
    /// Short name, as one can quote it.
    pub name: String,
    /// What is claimed, and where.
    pub claim: String,
    /// What was measured here, in words and figures; what to give where it was not.
    pub figure: String,
    /// Whether the claim holds; none where it was not measured.
    pub pass: Option<bool>,
    /// Names and values behind the figure, in the order of its drawing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<(String, f64)>,
}
