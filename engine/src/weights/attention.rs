//! Projections of attention: heads padded one by one, queries, keys and values in one matrix; latents absorbed.

use super::layers::{Dense, Loader, Matrix};
use super::rows::Rows;
use crate::EngineError;
use crate::gpu::Buffer;
use crate::model::{LatentSpec, QkNorm};

/// Attention of one layer.
pub(crate) struct AttentionWeights {
    /// From the hidden state to queries, keys and values; with a latent to what the cache holds.
    pub(crate) qkv: Dense,
    /// `[H, heads * value]`.
    pub(crate) out: Dense,
    /// RMSNorm of queries and of keys.
    pub(crate) qk_norm: Option<(Buffer, Buffer)>,
    /// `[heads]`.
    pub(crate) sinks: Option<Buffer>,
    pub(crate) latent: Option<LatentWeights>,
}

/// What multi-head latent attention has besides.
pub(crate) struct LatentWeights {
    /// `[q_rank, H]` and the norm behind it.
    pub(crate) q_low: Option<(Dense, Buffer)>,
    /// `[heads * (nope + rope), q_rank or H]`.
    pub(crate) q: Dense,
    /// `[kv_rank]`.
    pub(crate) norm: Buffer,
    /// Per head `[latent + rope, nope + rope]`: queries against the latent instead of the key made from it.
    pub(crate) absorb: Matrix,
    /// Per head `[value, latent]`.
    pub(crate) values: Matrix,
}

impl Loader<'_> {
    pub(super) fn attention(&mut self, layer: usize) -> Result<AttentionWeights, EngineError> {
        if let Some(latent) = self.spec.attention.latent {
            return self.latent_attention(layer, latent);
        }
        let spec = &self.spec.attention;
        let (d, d4) = (spec.head_dim, 4 * spec.d4());
        let (heads, kv_heads, hidden) = (spec.heads, spec.kv_heads, self.spec.hidden);
        let (biased, out_biased, qk_norm, sinks) = (spec.qkv_bias, spec.out_bias, spec.qk_norm, spec.sinks);
        let gpt = self.spec.model_type == "gpt_moe";
        let name = |loader: &Self, part: &str| loader.names.of_layer(layer, part);

        let (mut rows, mut bias): (Option<Rows>, Vec<f32>) = (None, Vec::new());
        let parts: &[(&str, usize)] = match gpt {
            true => &[("attn.c_attn", 3 * heads)],
            false => {
                &[("self_attn.q_proj", heads), ("self_attn.k_proj", kv_heads), ("self_attn.v_proj", kv_heads)]
            }
        };
        for &(part, count) in parts {
            let weight = self.whole(&format!("{}.weight", name(self, part)), count * d, hidden)?;
            let weight = weight.widen(4 * self.spec.h4()).lengthen(d, d4);
            rows = Some(match rows {
                Some(above) => above.above(weight),
                None => weight,
            });
            if biased {
                let values = self.vector(&format!("{}.bias", name(self, part)), count * d)?;
                bias.extend(values.cut(d).widen(d4).values);
            }
        }
        let label = name(self, "attention");
        let rows = rows.unwrap_or(Rows { values: Vec::new(), columns: 4 * self.spec.h4() });
        let weight = self.upload_matrix(&label, &rows, rows.count())?;
        let bias = if biased { Some(self.upload(&label, &bias)?) } else { None };
        let qkv = Dense { weight, bias };

        let qk_norm = match qk_norm {
            None => None,
            Some(kind) => {
                let mut norm = |part: &str, count: usize| {
                    let heads = if kind == QkNorm::Projection { count } else { 1 };
                    let weight = self.vector(&self.names.of_layer(layer, part), heads * d)?;
                    self.upload(part, &weight.cut(d).widen(d4).values)
                };
                Some((norm("self_attn.q_norm.weight", heads)?, norm("self_attn.k_norm.weight", kv_heads)?))
            }
        };
        let sinks = match sinks {
            true => {
                let values = self.vector(&name(self, "self_attn.sinks"), heads)?;
                Some(self.upload("sinks", &values.values)?)
            }
            false => None,
        };
        let out = name(self, if gpt { "attn.c_proj" } else { "self_attn.o_proj" });
        let out = self.projection(&out, (heads, d, d4), out_biased)?;
        Ok(AttentionWeights { qkv, out, qk_norm, sinks, latent: None })
    }

    /// `[H, heads * width]`, whose columns follow heads padded to `padded`.
    fn projection(
        &mut self,
        name: &str,
        (heads, width, padded): (usize, usize, usize),
        biased: bool,
    ) -> Result<Dense, EngineError> {
        let (hidden, h) = (self.spec.hidden, 4 * self.spec.h4());
        let rows = self.whole(&format!("{name}.weight"), hidden, heads * width)?;
        let rows = rows.cut(width).widen(padded).cut(heads * padded).lengthen(hidden, h);
        let bias = match biased {
            true => {
                let values = self.vector(&format!("{name}.bias"), hidden)?;
                Some(self.upload(name, &values.widen(h).values)?)
            }
            false => None,
        };
        Ok(Dense { weight: self.upload_matrix(name, &rows.cut(heads * padded), h)?, bias })
    }

    fn latent_attention(&mut self, layer: usize, spec: LatentSpec) -> Result<AttentionWeights, EngineError> {
        let (hidden, heads) = (self.spec.hidden, self.spec.attention.heads);
        let name = |loader: &Self, part: &str| loader.names.of_layer(layer, &format!("self_attn.{part}"));
        let (pad, head) = (|n: usize| n.next_multiple_of(4), spec.nope + spec.rope);
        let turning = self.turning_order(spec.rope);

        // Queries: columns that do not turn, then those that do, each padded.
        let (q_name, q_low) = match spec.q_rank {
            None => (name(self, "q_proj.weight"), None),
            Some(rank) => {
                let low = self
                    .low(&name(self, "q_a_proj"), rank, spec.bias, &|rows| rows.lengthen(rank, pad(rank)))?;
                let norm = self.vector(&name(self, "q_a_layernorm.weight"), rank)?;
                let norm = self.upload("query norm", &norm.widen(pad(rank)).values)?;
                (name(self, "q_b_proj.weight"), Some((low, norm)))
            }
        };
        let inputs = spec.q_rank.unwrap_or(hidden);
        let q = self.whole(&q_name, heads * head, inputs)?.widen(pad(inputs));
        let mut rows = Rows { values: Vec::new(), columns: pad(inputs) };
        for h in 0..heads {
            let still = q.take(h * head..h * head + spec.nope).lengthen(spec.nope, pad(spec.nope));
            let turned = q.take(turning.iter().map(|i| h * head + spec.nope + i));
            rows = rows.above(still).above(turned.lengthen(spec.rope, pad(spec.rope)));
        }
        let q = Dense { weight: self.upload_matrix(&q_name, &rows, rows.count())?, bias: None };

        // What the cache holds: the latent, then the rotary key.
        let order = |rows: Rows| {
            let latent = rows.take(0..spec.kv_rank).lengthen(spec.kv_rank, pad(spec.kv_rank));
            let key = rows.take(turning.iter().map(|i| spec.kv_rank + i));
            latent.above(key.lengthen(spec.rope, pad(spec.rope)))
        };
        let kv_name = name(self, "kv_a_proj_with_mqa");
        let qkv = self.low(&kv_name, spec.kv_rank + spec.rope, spec.bias, &order)?;
        let norm = self.vector(&name(self, "kv_a_layernorm.weight"), spec.kv_rank)?;
        let norm = self.upload("latent norm", &norm.widen(pad(spec.kv_rank)).values)?;

        let both = spec.nope + spec.value;
        let kv = self.whole(&name(self, "kv_b_proj.weight"), heads * both, spec.kv_rank)?;
        let (mut absorb, mut values) = (Vec::new(), Vec::new());
        for h in 0..heads {
            let keys = kv.take(h * both..h * both + spec.nope).transposed();
            let keys = keys.widen(pad(spec.nope) + pad(spec.rope)).lengthen(spec.kv_rank, pad(spec.kv_rank));
            absorb.extend(keys.values);
            for i in 0..pad(spec.rope) {
                let mut row = vec![0.0; pad(spec.nope) + pad(spec.rope)];
                row[pad(spec.nope) + i] = if i < spec.rope { 1.0 } else { 0.0 };
                absorb.extend(row);
            }
            values.extend(kv.take(h * both + spec.nope..(h + 1) * both).padded().values);
        }
        let (d, head, latent) =
            (4 * self.spec.attention.d4(), pad(spec.nope) + pad(spec.rope), pad(spec.kv_rank));
        let absorb = self.upload_matrix("absorbed keys", &Rows { values: absorb, columns: head }, d)?;
        let values = self.upload_matrix("values", &Rows { values, columns: latent }, pad(spec.value))?;
        let out_name = name(self, "o_proj");
        let out = self.projection(&out_name, (heads, spec.value, pad(spec.value)), spec.bias)?;
        let latent = Some(LatentWeights { q_low, q, norm, absorb, values });
        Ok(AttentionWeights { qkv, out, qk_norm: None, sinks: None, latent })
    }

    /// A projection `[rows, H]` from the hidden state, its rows ordered and padded by `order`, its bias likewise.
    fn low(
        &mut self,
        name: &str,
        rows: usize,
        biased: bool,
        order: &dyn Fn(Rows) -> Rows,
    ) -> Result<Dense, EngineError> {
        let hidden = self.spec.hidden;
        let weight = self.whole(&format!("{name}.weight"), rows, hidden)?.widen(4 * self.spec.h4());
        let weight = order(weight);
        let weight = self.upload_matrix(name, &weight, weight.count())?;
        let bias = match biased {
            true => {
                let column = self.vector(&format!("{name}.bias"), rows)?.cut(1);
                Some(self.upload(name, &order(column).values)?)
            }
            false => None,
        };
        Ok(Dense { weight, bias })
    }

    /// Which row on disk each rotary row comes from: pairs that are neighbours there are half a head apart here.
    fn turning_order(&self, rope: usize) -> Vec<usize> {
        match self.spec.attention.rope.as_ref().is_some_and(|r| r.interleaved) {
            true => (0..rope).step_by(2).chain((1..rope).step_by(2)).collect(),
            false => (0..rope).collect(),
        }
    }
}
