//! config.json, checked and made into one description of the model's shape.

use crate::EngineError;
use exflow_shaders::{MAX_EXPERTS, MAX_HEAD_SIZE};
use serde_json::{Map, Value};
use std::path::Path;

/// The shape of a model. Letters as in the kernels: V vocabulary, S context, H hidden, I intermediate, E experts,
/// K top-k, L layers.
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
    /// L, all of them MoE layers in this family.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// I, per expert.
    pub intermediate: usize,
    /// E, per layer.
    pub experts: usize,
    /// K, experts per token and layer.
    pub top_k: usize,
    /// Whether the K router weights are made to sum to 1.
    pub renormalise: bool,
    /// Epsilon of every norm.
    pub norm_eps: f32,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// First token of a text, where the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// SHA-256 over config, tokenizer and weights (header and samples), in hexadecimal.
    pub digest: String,
}

const KNOWN: [&str; 1] = ["gpt_moe"];
/// No real config comes near it; a larger one is not read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

impl ModelSpec {
    /// Reads `folder/config.json`; the digest is left empty for the weights' reader to fill.
    pub(crate) fn read(folder: &Path) -> Result<Self, EngineError> {
        let path = folder.join("config.json");
        if !folder.is_dir() {
            return Err(EngineError::file(folder, "no such folder", "give -m the folder of a model"));
        }
        let size = std::fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
        if size > MAX_CONFIG_BYTES {
            return Err(EngineError::file(&path, format!("{size} bytes, too large"), "copy the model anew"));
        }
        let text = std::fs::read_to_string(&path)
            .map_err(|e| EngineError::file(&path, format!("cannot be read: {e}"), "copy the model anew"))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| EngineError::file(&path, format!("not JSON: {e}"), "copy the model anew"))?;
        let Value::Object(map) = value else {
            return Err(EngineError::file(&path, "not a JSON object", "copy the model anew"));
        };
        Keys { path: &path, map: &map }.spec()
    }

    /// D, the size of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// How many MoE layers there are.
    pub fn moe_layers(&self) -> usize {
        self.layers
    }

    /// Elements that a rank reads which holds `experts` experts over all layers, for progress.
    pub(crate) fn elements(&self, experts: usize) -> u64 {
        let (h, i) = (self.hidden as u64, self.intermediate as u64);
        let heads = if self.tied_head { 1 } else { 2 };
        let tables = (self.max_positions as u64 + heads * self.vocab_size as u64) * h + 2 * h;
        let layer = 4 * h * h + 8 * h + self.experts as u64 * h;
        tables + self.layers as u64 * layer + experts as u64 * (2 * h * i + h + i)
    }

    /// H in whole vec4s.
    pub(crate) fn h4(&self) -> usize {
        self.hidden.div_ceil(4)
    }

    /// I in whole vec4s.
    pub(crate) fn i4(&self) -> usize {
        self.intermediate.div_ceil(4)
    }

    /// D in whole vec4s; heads are padded one by one.
    pub(crate) fn d4(&self) -> usize {
        self.head_dim().div_ceil(4)
    }

    /// The keys (or the values) of one token at one layer, in vec4s.
    pub(crate) fn kv4(&self) -> usize {
        self.heads * self.d4()
    }

    /// V in whole vec4s.
    pub(crate) fn v4(&self) -> usize {
        self.vocab_size.div_ceil(4)
    }
}

struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn spec(&self) -> Result<ModelSpec, EngineError> {
        let model_type = match self.map.get("model_type").and_then(Value::as_str) {
            Some(name) if KNOWN.contains(&name) => name.to_owned(),
            Some(name) => {
                return Err(self.bad("model_type", format!("{name:?} is not known"), known()));
            }
            None => return Err(self.bad("model_type", "missing", known())),
        };
        let experts = self.count("num_experts", MAX_EXPERTS)?;
        let top_k = self.count("top_k", 64)?;
        if top_k > experts {
            let what = format!("{top_k} is more than num_experts, which is {experts}");
            return Err(self.bad("top_k", what, "set it to at most num_experts"));
        }
        let (hidden, heads) = (self.count("n_embd", 1 << 16)?, self.count("n_head", 1 << 12)?);
        if hidden % heads != 0 || hidden / heads > MAX_HEAD_SIZE {
            let what =
                format!("{heads} heads do not divide n_embd {hidden} into heads of at most {MAX_HEAD_SIZE}");
            return Err(self.bad("n_head", what, "set it to a divisor of n_embd"));
        }
        let vocab_size = self.count("vocab_size", 1 << 24)?;
        Ok(ModelSpec {
            model_type,
            vocab_size,
            max_positions: self.count("n_positions", 1 << 24)?,
            hidden,
            layers: self.count("n_layer", 4096)?,
            heads,
            intermediate: self.count("n_inner", 1 << 20)?,
            experts,
            top_k,
            renormalise: self.flag("norm_topk_prob")?.unwrap_or(top_k > 1),
            norm_eps: self.positive("layer_norm_epsilon")?,
            tied_head: self.flag("tie_word_embeddings")?.unwrap_or(false),
            bos: self.ids("bos_token_id", vocab_size)?.first().copied(),
            eos: self.ids("eos_token_id", vocab_size)?,
            digest: String::new(),
        })
    }

    fn bad(&self, key: &str, what: impl Into<String>, remedy: impl Into<String>) -> EngineError {
        EngineError::config(self.path, key, what, remedy)
    }

    fn count(&self, key: &str, most: usize) -> Result<usize, EngineError> {
        let value =
            self.map.get(key).ok_or_else(|| self.bad(key, "missing", "add it, a whole number above 0"))?;
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if n > 0 && n <= most => Ok(n),
            _ => Err(self.bad(key, format!("{value} is out of range"), format!("set it from 1 to {most}"))),
        }
    }

    fn positive(&self, key: &str) -> Result<f32, EngineError> {
        let value = self.map.get(key).ok_or_else(|| self.bad(key, "missing", "add it, 1e-5 as a rule"))?;
        match value.as_f64() {
            Some(x) if x > 0.0 && x < 1.0 => Ok(x as f32),
            _ => Err(self.bad(key, format!("{value} is out of range"), "set it between 0 and 1")),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, EngineError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => {
                Err(self.bad(key, format!("{other} is no truth value"), "use true, false or null"))
            }
        }
    }

    /// A token id, a list of them, or none.
    fn ids(&self, key: &str, vocab: usize) -> Result<Vec<u32>, EngineError> {
        let one = |value: &Value| {
            let id = value.as_u64().filter(|&id| id < vocab as u64);
            id.map(|id| id as u32).ok_or_else(|| {
                self.bad(key, format!("{value} is no token id"), format!("use ids below {vocab}, or null"))
            })
        };
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }
}

fn known() -> String {
    format!("this version runs: {}", KNOWN.join(", "))
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
        assert_eq!((spec.head_dim(), spec.d4(), spec.h4(), spec.i4()), (10, 3, 8, 9));
        assert!(spec.renormalise, "null renormalises iff top_k > 1");
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
