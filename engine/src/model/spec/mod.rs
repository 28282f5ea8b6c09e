//! What a model is made of, as data: one decoder serves every family by what stands here.

mod families;
mod keys;
mod rope;

use crate::EngineError;
pub use exflow_shaders::Activation;
use keys::Keys;
pub use rope::{RopeScaling, RopeSpec};
use std::path::Path;

/// A model. Letters as in the kernels: V vocabulary, S context, H hidden, I intermediate, E experts, K top-k, L layers.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of config.json.
    pub model_type: String,
    /// V.
    pub vocab_size: usize,
    /// S, the longest context in tokens.
    pub max_positions: usize,
    /// H.
    pub hidden: usize,
    /// L, layers of every kind.
    pub layers: usize,
    /// The model's own numbers of its MoE layers, ascending.
    pub moe_layers: Vec<usize>,
    /// Layers behind them that guess tokens ahead; they are not used.
    pub draft_layers: usize,
    /// Every norm over H.
    pub norm: NormSpec,
    /// Attention of every layer.
    pub attention: AttentionSpec,
    /// Router of every MoE layer.
    pub router: RouterSpec,
    /// E, per layer.
    pub experts: usize,
    /// K, experts per token and layer.
    pub top_k: usize,
    /// Each expert.
    pub expert: FfnSpec,
    /// Whether experts are published in MXFP4, as which they are held where no other rounding is asked for.
    pub packed_experts: bool,
    /// An expert that every token takes, on every rank.
    pub shared: Option<SharedSpec>,
    /// The FFN of layers that are not MoE layers.
    pub dense: Option<FfnSpec>,
    /// Whether there is a table of learned positions.
    pub learned_positions: bool,
    /// What embeddings are multiplied with.
    pub embedding_scale: f32,
    /// What attention and FFN are multiplied with before they are added to the residual stream.
    pub residual_scale: f32,
    /// What logits are multiplied with.
    pub logit_scale: f32,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// Whether the head has a bias.
    pub head_bias: bool,
    /// First token of a text, where the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// SHA-256 over config, tokenizer and weights (headers and samples), in hexadecimal.
    pub digest: String,
}

/// A norm over a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// LayerNorm with weight and bias; else RMSNorm with a weight.
    pub centred: bool,
    /// Epsilon.
    pub eps: f32,
}

/// Attention: what is projected, turned, cached and attended over.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key heads; query heads share them in groups.
    pub kv_heads: usize,
    /// D, of a query and a key as they are cached.
    pub head_dim: usize,
    /// Of a value as it is cached.
    pub value_dim: usize,
    /// Biases of queries, keys and values.
    pub qkv_bias: bool,
    /// Bias of the output projection.
    pub out_bias: bool,
    /// RMSNorm of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// What queries, keys and values are clamped to, on both sides, behind those norms.
    pub clip: Option<f32>,
    /// Rotary positions.
    pub rope: Option<RopeSpec>,
    /// Positions that a token sees, its own included, per layer; `None`: all.
    pub windows: Vec<Option<usize>>,
    /// Whether each head has a sink.
    pub sinks: bool,
    /// What scores are multiplied with.
    pub scale: f32,
    /// Keys and values made from one latent (MLA), cached in place of them; `kv_heads` is 1 then, `head_dim` the
    /// latent and the rotary key, `value_dim` the latent.
    pub latent: Option<LatentSpec>,
}

/// RMSNorm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Head by head.
    Head,
    /// Over all heads together.
    Projection,
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in its absorbed form.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentSpec {
    /// Of the latent that queries are made from; `None`: they are made from the hidden state.
    pub q_rank: Option<usize>,
    /// Of the latent that keys and values are made from.
    pub kv_rank: usize,
    /// Columns of a query head that do not turn.
    pub nope: usize,
    /// Columns of a query head that turn; the key's are shared by all heads.
    pub rope: usize,
    /// Of a head's value before the output projection.
    pub value: usize,
    /// Biases of the projections from the hidden state.
    pub bias: bool,
    /// Epsilon of the latents' norms.
    pub eps: f32,
}

/// How experts are scored, chosen and weighted.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSpec {
    /// What the products become.
    pub score: Score,
    /// Whether the K weights are made to sum to 1.
    pub renormalise: bool,
    /// Whether a bias is added to the products.
    pub bias: bool,
    /// Whether a correction is added for the choice alone.
    pub correction: bool,
    /// (groups, groups kept, best experts that make a group's score); experts of other groups are not chosen.
    pub groups: Option<(usize, usize, usize)>,
    /// What the weights are multiplied with.
    pub scale: f32,
}

/// What a router's products become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Score {
    /// Softmax over all experts, then top-k.
    Softmax,
    /// Top-k, then softmax over the chosen.
    SoftmaxOfChosen,
    /// A sigmoid each.
    Sigmoid,
    /// phimoe's: softmax over the experts within this relative distance of the best that is left.
    Sparsemixer(f32),
}

/// An expert, a shared expert or the FFN of a dense layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FfnSpec {
    /// I.
    pub intermediate: usize,
    /// Between its matrices.
    pub activation: Activation,
    /// Whether its matrices have biases.
    pub bias: bool,
    /// What a clamped activation's inputs are clamped to.
    pub limit: f32,
}

/// The expert that every token takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedSpec {
    /// Its matrices.
    pub ffn: FfnSpec,
    /// Whether a sigmoid of the token decides how much of it is taken.
    pub gated: bool,
}

/// No real config comes near it; a larger one is not read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

impl ModelSpec {
    /// Reads `folder/config.json`; the digest is left empty for the weights' reader to fill.
    pub fn read(folder: &Path) -> Result<Self, EngineError> {
        let path = folder.join("config.json");
        let again = "copy or download the model anew";
        if !folder.is_dir() {
            return Err(EngineError::file(folder, "no such folder", "give -m the folder of a model"));
        }
        let size = std::fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
        if size > MAX_CONFIG_BYTES {
            return Err(EngineError::file(&path, format!("{size} bytes, too large"), again));
        }
        let bytes = std::fs::read(&path)
            .map_err(|e| EngineError::file(&path, format!("cannot be read: {e}"), again))?;
        Self::parse(&path, &bytes)
    }

    /// Reads the content of a config.json; `path` is what errors name.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, EngineError> {
        let again = "copy or download the model anew";
        let value: serde_json::Value = serde_json::from_slice(bytes)
            .map_err(|e| EngineError::file(path, format!("not JSON: {e}"), again))?;
        let serde_json::Value::Object(map) = value else {
            return Err(EngineError::file(path, "not a JSON object", again));
        };
        families::spec(&Keys { path, map: &map, under: "" })
    }

    /// Numbers that the cache keeps of a token at one layer.
    pub fn cached_values(&self) -> usize {
        4 * self.attention.cache4()
    }

    /// How many MoE layers there are: the layers of traces, affinities and placement tables.
    pub fn moe_layers(&self) -> usize {
        self.moe_layers.len()
    }

    /// Which of the MoE layers `layer` is.
    pub(crate) fn moe_index(&self, layer: usize) -> Option<usize> {
        self.moe_layers.binary_search(&layer).ok()
    }

    /// The nearest MoE layer before `layer`, counted over the MoE layers.
    pub(crate) fn moe_before(&self, layer: usize) -> Option<usize> {
        self.moe_layers.partition_point(|&moe| moe < layer).checked_sub(1)
    }

    /// Partials that a token's residual takes at a MoE layer: its experts' and the shared one's.
    pub(crate) fn partials(&self) -> usize {
        self.top_k + usize::from(self.shared.is_some())
    }

    /// The largest I of any FFN, in whole vec4s.
    pub(crate) fn largest_i4(&self) -> usize {
        let all = [Some(self.expert), self.shared.map(|s| s.ffn), self.dense];
        all.into_iter().flatten().map(|ffn| ffn.i4()).max().unwrap_or(1)
    }

    /// Elements that a rank reads which holds `experts` experts over all layers, for progress.
    pub(crate) fn elements(&self, experts: usize) -> u64 {
        let (h, layers, moe) = (self.hidden as u64, self.layers as u64, self.moe_layers() as u64);
        let heads = if self.tied_head { 1 } else { 2 };
        let positions = if self.learned_positions { self.max_positions as u64 } else { 0 };
        let shared = self.shared.map_or(0, |s| s.ffn.elements(h));
        let dense = self.dense.map_or(0, |ffn| ffn.elements(h));
        (positions + heads * self.vocab_size as u64) * h
            + layers * self.attention.elements(h)
            + moe * (self.experts as u64 * h + shared)
            + (layers - moe) * dense
            + experts as u64 * self.expert.elements(h)
    }

    /// H in whole vec4s.
    pub(crate) fn h4(&self) -> usize {
        self.hidden.div_ceil(4)
    }

    /// V in whole vec4s.
    pub(crate) fn v4(&self) -> usize {
        self.vocab_size.div_ceil(4)
    }
}

impl FfnSpec {
    /// I in whole vec4s.
    pub(crate) fn i4(&self) -> usize {
        self.intermediate.div_ceil(4)
    }

    fn elements(&self, hidden: u64) -> u64 {
        (self.activation.matrices() as u64 + 1) * hidden * self.intermediate as u64
    }
}

impl LatentSpec {
    /// A query head before absorption, in vec4s: columns that do not turn, then those that do.
    pub(crate) fn head4(&self) -> usize {
        self.nope.div_ceil(4) + self.rope.div_ceil(4)
    }
}

/// Widths in vec4s; heads are padded one by one.
impl AttentionSpec {
    /// D of a query and a key. A latent and its rotary key are padded apart.
    pub(crate) fn d4(&self) -> usize {
        match self.latent {
            Some(latent) => latent.kv_rank.div_ceil(4) + latent.rope.div_ceil(4),
            None => self.head_dim.div_ceil(4),
        }
    }

    /// A head's value.
    pub(crate) fn v4(&self) -> usize {
        self.value_dim.div_ceil(4)
    }

    /// All query heads.
    pub(crate) fn q4(&self) -> usize {
        self.heads * self.d4()
    }

    /// What the cache holds of a token at one layer: keys, then values; a latent is both.
    pub(crate) fn cache4(&self) -> usize {
        let values = if self.latent.is_some() { 0 } else { self.kv_heads * self.v4() };
        self.kv_heads * self.d4() + values
    }

    /// Queries, then what the cache holds.
    pub(crate) fn qkv4(&self) -> usize {
        self.q4() + self.cache4()
    }

    fn elements(&self, h: u64) -> u64 {
        let (heads, dim) = (self.heads as u64, self.head_dim as u64);
        match self.latent {
            Some(l) => {
                let head = (l.nope + l.rope) as u64;
                let queries = l.q_rank.map_or(h * heads * head, |r| r as u64 * (h + heads * head));
                queries
                    + (l.kv_rank + l.rope) as u64 * h
                    + heads * (l.nope + l.value) as u64 * l.kv_rank as u64
                    + heads * l.value as u64 * h
            }
            None => 2 * heads * dim * h + 2 * self.kv_heads as u64 * dim * h,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<ModelSpec, EngineError> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("config.json"), json).expect("writes");
        ModelSpec::read(folder.path())
    }

    const GOOD: &str = r#"{"model_type":"gpt_moe","vocab_size":257,"n_positions":64,"n_embd":30,"n_layer":2,
        "n_head":3,"n_inner":33,"num_experts":5,"top_k":2,"layer_norm_epsilon":1e-5,"tie_word_embeddings":true,
        "norm_topk_prob":null,"eos_token_id":[3,4],"surprise":1}"#;

    #[test]
    fn reads_the_shape_and_ignores_unknown_keys() {
        let spec = read(GOOD).expect("a good config");
        assert_eq!(
            (spec.attention.head_dim, spec.attention.d4(), spec.h4(), spec.expert.i4()),
            (10, 3, 8, 9)
        );
        assert!(spec.router.renormalise, "null renormalises iff top_k > 1");
        assert_eq!(spec.eos, [3, 4]);
    }

    #[test]
    fn names_the_key_that_is_wrong() {
        for (from, to, key) in [
            (r#""n_head":3"#, r#""n_head":0"#, "n_head"),
            (r#""n_head":3"#, r#""n_head":-3"#, "n_head"),
            (r#""n_head":3"#, r#""n_head":7"#, "n_head"),
            (r#""top_k":2"#, r#""top_k":6"#, "top_k"),
            (r#""vocab_size":257,"#, "", "vocab_size"),
            ("gpt_moe", "gpt_none", "model_type"),
            ("[3,4]", "[300]", "eos_token_id"),
        ] {
            let error = read(&GOOD.replace(from, to)).expect_err(to).to_string();
            assert!(error.contains(&format!("key {key}")), "{error}");
        }
    }
}
