//! Tiny random `gpt_moe` folders, the same for the same seed on every machine.
//!
//! The weights are scaled so that logits spread by about 2.5, every layer moves the residual stream, and
//! routers decide clearly; so a wrong kernel shows, and rounding does not.

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// How the weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
}

/// The shape of a tiny model; `write` makes its folder.
#[derive(Debug, Clone)]
pub(crate) struct Tiny {
    pub(crate) vocab: usize,
    pub(crate) positions: usize,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) inner: usize,
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) norm_topk_prob: Option<bool>,
    pub(crate) tied: bool,
    pub(crate) stored: Stored,
    pub(crate) eos: Value,
    pub(crate) seed: u64,
}

impl Default for Tiny {
    fn default() -> Self {
        Self {
            vocab: 257,
            positions: 64,
            hidden: 32,
            layers: 4,
            heads: 4,
            inner: 48,
            experts: 8,
            top_k: 1,
            norm_topk_prob: None,
            tied: false,
            stored: Stored::F32,
            eos: Value::Null,
            seed: 1,
        }
    }
}

/// A tensor by name, before it is stored.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// A model folder that is removed with the value.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: TempDir,
}

impl Folder {
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Rewrites `config.json` after `edit`.
    pub(crate) fn edit_config(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        let path = self.file("config.json");
        let text = fs::read_to_string(&path).expect("config.json is readable");
        let mut config: Map<String, Value> = serde_json::from_str(&text).expect("config.json is JSON");
        edit(&mut config);
        fs::write(&path, serde_json::to_vec_pretty(&config).expect("JSON")).expect("config.json is writable");
    }
}

impl Tiny {
    /// Makes the folder: `config.json`, `model.safetensors`, `tokenizer.json`.
    pub(crate) fn write(&self) -> Folder {
        let folder = Folder { dir: TempDir::new().expect("a temporary folder") };
        fs::write(folder.file("config.json"), self.config().to_string()).expect("write config.json");
        fs::write(folder.file("tokenizer.json"), tokenizer(self.vocab).to_string())
            .expect("write tokenizer.json");
        store(&folder.file("model.safetensors"), self.stored, &self.tensors());
        folder
    }

    pub(crate) fn config(&self) -> Value {
        json!({
            "architectures": ["GptMoeForCausalLM"], // a key that a reader has to ignore
            "model_type": "gpt_moe",
            "vocab_size": self.vocab,
            "n_positions": self.positions,
            "n_embd": self.hidden,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.inner,
            "num_experts": self.experts,
            "top_k": self.top_k,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": self.tied,
            "norm_topk_prob": self.norm_topk_prob,
            "eos_token_id": self.eos,
        })
    }

    /// Every tensor of the model, in an order of its own.
    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        let (v, s, h, i, e) = (self.vocab, self.positions, self.hidden, self.inner, self.experts);
        let fan = |scale: f32, inputs: usize| scale / (inputs as f32).sqrt();
        let mut made = Maker { random: Random::new(self.seed), tensors: Vec::new() };
        made.normal("wte.weight", &[v, h], if self.tied { fan(2.5, h) } else { 0.8 });
        made.normal("wpe.weight", &[s, h], 0.3);
        for l in 0..self.layers {
            let name = |rest: &str| format!("h.{l}.{rest}");
            made.norm(&name("ln_1"), h);
            made.normal(&name("attn.c_attn.weight"), &[3 * h, h], fan(1.4, h));
            made.normal(&name("attn.c_attn.bias"), &[3 * h], 0.2);
            made.normal(&name("attn.c_proj.weight"), &[h, h], fan(0.7, h));
            made.normal(&name("attn.c_proj.bias"), &[h], 0.1);
            made.norm(&name("ln_2"), h);
            made.normal(&name("moe.gate.weight"), &[e, h], fan(3.0, h));
            made.normal(&name("moe.w1"), &[e, i, h], fan(1.2, h));
            made.normal(&name("moe.b1"), &[e, i], 0.3);
            made.normal(&name("moe.w2"), &[e, h, i], fan(1.2, i));
            made.normal(&name("moe.b2"), &[e, h], 0.2);
        }
        made.norm("ln_f", h);
        if !self.tied {
            made.normal("lm_head.weight", &[v, h], fan(2.5, h));
        }
        made.tensors
    }

    /// `length` ids that are all inside the vocabulary.
    pub(crate) fn prompt(&self, length: usize, seed: u64) -> Vec<u32> {
        let mut random = Random::new(self.seed ^ seed.wrapping_mul(0x9e37_79b9));
        (0..length).map(|_| (random.next() % self.vocab as u64) as u32).collect()
    }
}

/// Writes a safetensors file.
pub(crate) fn store(path: &Path, stored: Stored, tensors: &[Tensor]) {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| stored.bytes(&t.values)).collect();
    let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
        let view = TensorView::new(stored.dtype(), tensor.shape.clone(), bytes).expect("bytes fit the shape");
        (tensor.name.clone(), view)
    });
    safetensors::serialize_to_file(views, None, path).expect("write model.safetensors");
}

impl Stored {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    }
}

struct Maker {
    random: Random,
    tensors: Vec<Tensor>,
}

impl Maker {
    fn normal(&mut self, name: &str, shape: &[usize], std: f32) {
        let values = (0..shape.iter().product()).map(|_| std * self.random.normal()).collect();
        self.tensors.push(Tensor { name: name.to_string(), shape: shape.to_vec(), values });
    }

    fn norm(&mut self, name: &str, width: usize) {
        let weight = (0..width).map(|_| 1.0 + 0.2 * self.random.normal()).collect();
        self.tensors.push(Tensor { name: format!("{name}.weight"), shape: vec![width], values: weight });
        self.normal(&format!("{name}.bias"), &[width], 0.1);
    }
}

/// A small seeded generator (an additive counter through a mixing function).
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xd134_2543_de82_ef95) ^ 0x5bf0_3635_dcf9_8e0d)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// In 0..bound.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Nearly normal: the sum of twelve uniforms, which needs no function that differs between platforms.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32).sum();
        sum - 6.0
    }
}

/// A byte-level BPE without merges: as many bytes as fit, printable ones first, and an end-of-text token last.
fn tokenizer(vocab: usize) -> Value {
    let bytes = vocab.saturating_sub(1).min(256);
    let mut ids = Map::new();
    for (id, letter) in byte_letters().into_iter().take(bytes).enumerate() {
        ids.insert(letter.to_string(), json!(id));
    }
    let end = "<|endoftext|>";
    ids.insert(end.to_string(), json!(bytes));
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": bytes, "content": end, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": level,
        "post_processor": null,
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": ids, "merges": [],
        },
    })
}

/// The letters that stand for the 256 bytes in byte-level vocabularies: bytes with a printable Latin-1 form
/// stand for themselves, the rest is counted up from U+0100. In order of id, printable ones first.
fn byte_letters() -> Vec<char> {
    let printable = |b: &u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let own = (0..256).filter(printable);
    let others = (0..256u32).filter(|b| !printable(b)).count() as u32;
    own.chain(0x100..0x100 + others).filter_map(char::from_u32).collect()
}
