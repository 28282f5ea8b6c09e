//! Rotary positions and how they are stretched over longer contexts. The formulas are those of the papers named at
//! each variant, as transformers computes them; angles are made on the host in f64.

use super::Keys;
use crate::EngineError;
use std::f64::consts::TAU;

/// Rotary positions of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Columns of a head that turn.
    pub dim: usize,
    /// Whether the columns of a pair are neighbours on disk.
    pub interleaved: bool,
    /// How it is stretched.
    pub scaling: RopeScaling,
    /// What cosines and sines are multiplied with.
    pub factor: f64,
}

/// Stretching beyond the context that a model was first trained at.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Positions divided by a factor (Chen et al. 2023, arXiv 2306.15595).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// A base that grows with the sequence (NTK-aware, dynamic).
    Dynamic {
        /// The factor.
        factor: f64,
        /// Context from which it grows.
        original: f64,
    },
    /// YaRN (Peng et al. 2023, arXiv 2309.00071): wavelengths are stretched the more the longer they are.
    Yarn {
        /// The factor.
        factor: f64,
        /// Context of the first training.
        original: f64,
        /// Turns within it above which a pair is left alone, and below which it is stretched in full.
        beta: (f64, f64),
        /// Whether the bounds are rounded to whole pairs.
        truncate: bool,
    },
    /// Llama 3.1's.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Context of the first training.
        original: f64,
        /// Its parts that bound the wavelengths between which the factor sets in.
        bounds: (f64, f64),
    },
    /// LongRoPE (Ding et al. 2024, arXiv 2402.13753): a factor for each pair.
    Long {
        /// Up to the original context.
        short: Vec<f64>,
        /// Beyond it.
        long: Vec<f64>,
        /// Context of the first training.
        original: f64,
        /// What cosines and sines are multiplied with up to it and beyond it, in place of `factor`.
        mscale: Option<(f64, f64)>,
    },
}

impl RopeSpec {
    /// Pairs of columns that turn.
    pub(crate) fn pairs(&self) -> usize {
        self.dim / 2
    }

    /// Tokens beyond which transformers makes all keys of a text anew: phimoe's, whose scales change there.
    pub(crate) fn remade_beyond(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::Long { original, mscale: Some(_), .. } => Some(*original as usize),
            _ => None,
        }
    }

    /// Cosine and sine of every pair at `position` of a sequence whose step knows `length` positions.
    pub(crate) fn turns(&self, position: u32, length: usize) -> Vec<[f32; 2]> {
        let factor =
            match &self.scaling {
                RopeScaling::Long { original, mscale: Some((short, long)), .. } => {
                    if length as f64 > *original { *long } else { *short }
                }
                _ => self.factor,
            };
        // The angle is rounded to f32 before the cosine, as in the models' training.
        let turn = |frequency: f64| {
            let angle = f64::from(position as f32 * frequency as f32);
            [(angle.cos() * factor) as f32, (angle.sin() * factor) as f32]
        };
        self.frequencies(length).into_iter().map(turn).collect()
    }

    /// Turns per position of every pair, times 2π.
    fn frequencies(&self, length: usize) -> Vec<f64> {
        let dim = self.dim as f64;
        let plain = |theta: f64| (0..self.pairs()).map(move |i| theta.powf(-2.0 * i as f64 / dim));
        match &self.scaling {
            RopeScaling::Default => plain(self.theta).collect(),
            RopeScaling::Linear { factor } => plain(self.theta).map(|f| f / factor).collect(),
            RopeScaling::Dynamic { factor, original } => {
                let stretch = factor * (length as f64).max(*original) / original - (factor - 1.0);
                plain(self.theta * stretch.powf(dim / (dim - 2.0))).collect()
            }
            RopeScaling::Yarn { factor, original, beta, truncate } => {
                let pair_of = |turns: f64| dim * (original / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (pair_of(beta.0), pair_of(beta.1));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let stretched = |(i, f): (usize, f64)| {
                    let share = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * share + f * (1.0 - share)
                };
                plain(self.theta).enumerate().map(stretched).collect()
            }
            RopeScaling::Llama3 { factor, original, bounds: (low, high) } => {
                let stretched = |f: f64| {
                    let wave = TAU / f;
                    if wave < original / high {
                        f
                    } else if wave > original / low {
                        f / factor
                    } else {
                        let share = (original / wave - low) / (high - low);
                        (1.0 - share) * f / factor + share * f
                    }
                };
                plain(self.theta).map(stretched).collect()
            }
            RopeScaling::Long { short, long, original, mscale } => {
                // With mscales (phimoe) transformers takes the short factors at any length.
                let beyond = length as f64 > *original && mscale.is_none();
                let factors = if beyond { long } else { short };
                plain(self.theta).zip(factors).map(|(f, factor)| f / factor).collect()
            }
        }
    }
}

/// YaRN's attention temperature for a stretch of `factor`.
pub(super) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (as published) for heads of which
/// `dim` columns turn.
pub(super) fn read(keys: &Keys, dim: usize, theta: f64, context: usize) -> Result<RopeSpec, EngineError> {
    if !dim.is_multiple_of(2) {
        return Err(keys.bad("head_dim", format!("{dim} columns cannot turn in pairs"), "use an even size"));
    }
    let (map, under) = match keys.object("rope_parameters")? {
        Some(map) => (Some(map), "rope_parameters."),
        None => (keys.object("rope_scaling")?, "rope_scaling."),
    };
    let empty = serde_json::Map::new();
    let inner = Keys { path: keys.path, map: map.unwrap_or(&empty), under };
    let theta = match inner.number(&["rope_theta"], 1.0, 1e12)? {
        Some(theta) => theta,
        None => keys.number(&["rope_theta"], 1.0, 1e12)?.unwrap_or(theta),
    };
    let kind = inner.text("rope_type").or_else(|| inner.text("type")).unwrap_or("default");
    let factor = || inner.number_needed("factor", 1e-3, 1e6);
    let original = || -> Result<f64, EngineError> {
        let name = "original_max_position_embeddings";
        let outer = keys.number(&[name], 1.0, 1e9)?;
        Ok(outer.or(inner.number(&[name], 1.0, 1e9)?).unwrap_or(context as f64))
    };
    let mut attention_factor = inner.number(&["attention_factor"], 1e-3, 1e3)?;
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic { factor: factor()?, original: context as f64 },
        "yarn" => {
            let original = original()?;
            let factor = match inner.number(&["factor"], 1e-3, 1e6)? {
                Some(factor) => factor,
                None => context as f64 / original,
            };
            let scale = |name| inner.number(&[name], 0.0, 1e3);
            attention_factor = attention_factor.or(match (scale("mscale")?, scale("mscale_all_dim")?) {
                (Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                    Some(yarn_mscale(factor, m) / yarn_mscale(factor, all))
                }
                _ => Some(yarn_mscale(factor, 1.0)),
            });
            let beta = |name, default| -> Result<f64, EngineError> {
                Ok(inner.number(&[name], 0.0, 1e6)?.filter(|b| *b != 0.0).unwrap_or(default))
            };
            let beta = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
            RopeScaling::Yarn { factor, original, beta, truncate: inner.flag("truncate")?.unwrap_or(true) }
        }
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            original: original()?,
            bounds: (
                inner.number_needed("low_freq_factor", 1e-3, 1e6)?,
                inner.number_needed("high_freq_factor", 1e-3, 1e6)?,
            ),
        },
        "longrope" | "su" => {
            let original = original()?;
            let factor = match inner.number(&["factor"], 1e-3, 1e6)? {
                Some(factor) => factor,
                None => context as f64 / original,
            };
            let derived = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
            attention_factor = attention_factor.or(Some(derived));
            let scale = |name| inner.number(&[name], 1e-3, 1e3);
            RopeScaling::Long {
                short: inner.numbers("short_factor", dim / 2)?,
                long: inner.numbers("long_factor", dim / 2)?,
                original,
                mscale: scale("short_mscale")?.zip(scale("long_mscale")?),
            }
        }
        other => {
            let known = "use default, linear, dynamic, yarn, llama3 or longrope";
            return Err(inner.bad("rope_type", format!("{other:?} is not known"), known));
        }
    };
    Ok(RopeSpec { theta, dim, interleaved: false, scaling, factor: attention_factor.unwrap_or(1.0) })
}
