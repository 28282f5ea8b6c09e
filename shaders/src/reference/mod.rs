//! The twin of each kernel on the CPU: same name, same bindings in the same order, plain loops kept close to the
//! kernel's text so that the two can be compared line by line. Slices are whole bindings, padding included.

mod argmax;
mod attention;
mod attention_merge;
mod clip;
mod embed;
mod expert_down;
mod expert_permute;
mod expert_up;
mod halved;
mod linear;
mod matrix_probe;
mod norm;
mod part_norm;
mod place;
mod probe;
mod rounded;
mod router;
mod sample;
mod shared_gate;

pub use argmax::argmax;
pub use attention::attention;
pub use attention_merge::attention_merge;
pub use clip::clip;
pub use embed::embed;
pub use expert_down::expert_down;
pub use expert_permute::expert_permute;
pub use expert_up::expert_up;
pub use halved::halved;
pub use linear::linear;
pub use matrix_probe::matrix_probe;
pub use norm::norm;
pub use part_norm::part_norm;
pub use place::place;
pub use probe::probe;
pub use rounded::rounded;
pub use router::router;
pub use sample::{drawn, sample};
pub use shared_gate::shared_gate;

use crate::{Activation, Cooperative, Rows, Variant};
use std::borrow::Cow;

/// What products are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factors {
    /// Rows and weights as they are.
    Whole,
    /// Rows rounded to bytes (`shared/dot.wgsl`).
    Bytes,
    /// Rows and weights rounded to f16 (`shared/cooperative.wgsl`).
    Halves,
}

impl From<Variant> for Factors {
    fn from(variant: Variant) -> Self {
        match (variant.cooperative, variant.rows) {
            (Cooperative::No, Rows::F32) => Self::Whole,
            (Cooperative::No, _) => Self::Bytes,
            _ => Self::Halves,
        }
    }
}

impl Factors {
    /// A row as a product sees it.
    fn row(self, row: &[f32]) -> Cow<'_, [f32]> {
        match self {
            Self::Whole => Cow::Borrowed(row),
            Self::Bytes => Cow::Owned(rounded(row)),
            Self::Halves => Cow::Owned(halved(row)),
        }
    }

    /// Weights as a product sees them.
    fn weights(self, weights: &[f32]) -> Cow<'_, [f32]> {
        let half = |weight: &f32| half::f16::from_f32(weight.clamp(-65_504.0, 65_504.0)).to_f32();
        match self {
            Self::Halves => Cow::Owned(weights.iter().map(half).collect()),
            _ => Cow::Borrowed(weights),
        }
    }
}

/// `x . w` with k ascending, one fused multiply-add each: the stated order of every matrix product.
fn dot(x: &[f32], w: &[f32]) -> f32 {
    x.iter().zip(w).fold(0.0, |sum, (&x, &w)| x.mul_add(w, sum))
}

/// GELU in GPT-2's tanh form.
fn gelu(x: f32) -> f32 {
    let u = 0.797_884_6 * (x + 0.044715 * x * x * x);
    0.5 * x * (1.0 + u.tanh())
}

/// What stands between an expert's matrices; `up` is ignored where there is one matrix only,
/// `limit` where nothing is clamped.
fn activate(activation: Activation, limit: f32, gate: f32, up: f32) -> f32 {
    match activation {
        Activation::Gelu => gelu(gate),
        Activation::SwiGlu => gate / (1.0 + (-gate).exp()) * up,
        Activation::ClampedGlu => {
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            (up + 1.0) * (gate / (1.0 + (-1.702 * gate).exp()))
        }
    }
}
