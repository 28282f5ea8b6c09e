//! `gpt_moe` in float64, written as the model's definition reads and sharing nothing with the engine.

use safetensors::{SafeTensors, tensor::Dtype};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// A model with its weights widened to float64.
pub(crate) struct Reference {
    pub(crate) vocab: usize,
    pub(crate) positions: usize,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) inner: usize,
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    renormalise: bool,
    epsilon: f64,
    tied: bool,
    weights: HashMap<String, Vec<f64>>,
}

/// What one forward pass over a text gives.
#[derive(Debug)]
pub(crate) struct Forward {
    /// `[T][V]`
    pub(crate) logits: Vec<Vec<f64>>,
    /// One per layer.
    pub(crate) routes: Vec<Routes>,
}

/// The router's choices in one layer.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    /// `[T][K]`, largest weight first.
    pub(crate) experts: Vec<Vec<usize>>,
    /// `[T][K]`
    pub(crate) weights: Vec<Vec<f64>>,
    /// `[T]`: by how much, in router logits, the closest decision about the first K + 1 experts was taken.
    pub(crate) margins: Vec<f64>,
}

impl Forward {
    /// The closest router decision of the whole text.
    pub(crate) fn router_margin(&self) -> f64 {
        self.routes.iter().flat_map(|r| &r.margins).fold(f64::INFINITY, |a, b| a.min(*b))
    }

    /// The likeliest successor of token `t`, and its lead over the second.
    pub(crate) fn best(&self, t: usize) -> (u32, f64) {
        let row = &self.logits[t];
        let best = (0..row.len()).fold(0, |a, b| if row[b] > row[a] { b } else { a });
        let second = (0..row.len()).filter(|i| *i != best).map(|i| row[i]).fold(f64::NEG_INFINITY, f64::max);
        (best as u32, row[best] - second)
    }
}

impl Reference {
    /// Reads `config.json` and `model.safetensors` of a folder.
    pub(crate) fn load(dir: &Path) -> Self {
        let config: Value =
            serde_json::from_slice(&fs::read(dir.join("config.json")).expect("config.json")).expect("JSON");
        let number = |key: &str| config[key].as_u64().unwrap_or_else(|| panic!("config key {key}")) as usize;
        let top_k = number("top_k");
        let file = fs::read(dir.join("model.safetensors")).expect("model.safetensors");
        let tensors = SafeTensors::deserialize(&file).expect("a safetensors file");
        let weights =
            tensors.iter().map(|(name, view)| (name.to_string(), widen(view.dtype(), view.data()))).collect();
        Self {
            vocab: number("vocab_size"),
            positions: number("n_positions"),
            hidden: number("n_embd"),
            layers: number("n_layer"),
            heads: number("n_head"),
            inner: number("n_inner"),
            experts: number("num_experts"),
            top_k,
            renormalise: config["norm_topk_prob"].as_bool().unwrap_or(top_k > 1),
            epsilon: config["layer_norm_epsilon"].as_f64().expect("layer_norm_epsilon"),
            tied: config["tie_word_embeddings"].as_bool().expect("tie_word_embeddings"),
            weights,
        }
    }

    /// Logits and routes at every position of `ids`.
    pub(crate) fn forward(&self, ids: &[u32]) -> Forward {
        let h = self.hidden;
        let (wte, wpe) = (self.get("wte.weight"), self.get("wpe.weight"));
        let mut x: Vec<Vec<f64>> = ids
            .iter()
            .enumerate()
            .map(|(t, id)| add(&wte[*id as usize * h..][..h], &wpe[t * h..][..h]))
            .collect();
        let mut routes = Vec::new();
        for l in 0..self.layers {
            let normed: Vec<_> = x.iter().map(|row| self.norm(&format!("h.{l}.ln_1"), row)).collect();
            for (row, update) in x.iter_mut().zip(self.attention(l, &normed)) {
                *row = add(row, &update);
            }
            let mut chosen = Routes::default();
            for row in &mut x {
                let normed = self.norm(&format!("h.{l}.ln_2"), row);
                let update = self.mixture(l, &normed, &mut chosen);
                *row = add(row, &update);
            }
            routes.push(chosen);
        }
        let head = self.get(if self.tied { "wte.weight" } else { "lm_head.weight" });
        let logits = x.iter().map(|row| matvec(head, &self.norm("ln_f", row))).collect();
        Forward { logits, routes }
    }

    /// Greedy continuation with the lead of each token over the second best; always `count` tokens.
    pub(crate) fn greedy(&self, prompt: &[u32], count: usize) -> Vec<(u32, f64)> {
        let mut ids = prompt.to_vec();
        let mut out = Vec::new();
        for _ in 0..count {
            let next = self.forward(&ids).best(ids.len() - 1);
            ids.push(next.0);
            out.push(next);
        }
        out
    }

    fn get(&self, name: &str) -> &[f64] {
        self.weights.get(name).unwrap_or_else(|| panic!("tensor {name}"))
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
        let scale = 1.0 / (variance + self.epsilon).sqrt();
        let (weight, bias) = (self.get(&format!("{name}.weight")), self.get(&format!("{name}.bias")));
        x.iter().zip(weight).zip(bias).map(|((x, w), b)| (x - mean) * scale * w + b).collect()
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        add(&matvec(self.get(&format!("{name}.weight")), x), self.get(&format!("{name}.bias")))
    }

    fn attention(&self, l: usize, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let (h, size) = (self.hidden, self.hidden / self.heads);
        let qkv: Vec<_> = x.iter().map(|row| self.linear(&format!("h.{l}.attn.c_attn"), row)).collect();
        let mut out = Vec::new();
        for t in 0..x.len() {
            let mut row = vec![0.0; h];
            for head in 0..self.heads {
                let at = head * size;
                let q = &qkv[t][at..at + size];
                let scores: Vec<f64> = (0..=t)
                    .map(|past| dot(q, &qkv[past][h + at..h + at + size]) / (size as f64).sqrt())
                    .collect();
                for (past, p) in softmax(&scores).into_iter().enumerate() {
                    for d in 0..size {
                        row[at + d] += p * qkv[past][2 * h + at + d];
                    }
                }
            }
            out.push(self.linear(&format!("h.{l}.attn.c_proj"), &row));
        }
        out
    }

    fn mixture(&self, l: usize, x: &[f64], routes: &mut Routes) -> Vec<f64> {
        let scores = matvec(self.get(&format!("h.{l}.moe.gate.weight")), x);
        let probabilities = softmax(&scores);
        let mut order: Vec<usize> = (0..self.experts).collect();
        // A stable sort: of equals the lower index comes first.
        order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
        let margin = order.windows(2).take(self.top_k).map(|w| scores[w[0]] - scores[w[1]]);
        routes.margins.push(margin.fold(f64::INFINITY, f64::min));
        let chosen = order[..self.top_k].to_vec();
        let mut weights: Vec<f64> = chosen.iter().map(|e| probabilities[*e]).collect();
        if self.renormalise {
            let sum: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        let mut out = vec![0.0; self.hidden];
        for (e, weight) in chosen.iter().zip(&weights) {
            for (o, y) in out.iter_mut().zip(self.expert(l, *e, x)) {
                *o += weight * y;
            }
        }
        routes.experts.push(chosen);
        routes.weights.push(weights);
        out
    }

    fn expert(&self, l: usize, e: usize, x: &[f64]) -> Vec<f64> {
        let (h, i) = (self.hidden, self.inner);
        let part = |name: &str, size: usize| &self.get(&format!("h.{l}.moe.{name}"))[e * size..][..size];
        let up = add(&matvec(part("w1", i * h), x), part("b1", i));
        let active: Vec<f64> = up.into_iter().map(gelu).collect();
        add(&matvec(part("w2", h * i), &active), part("b2", h))
    }
}

fn gelu(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
    let powers: Vec<f64> = x.iter().map(|v| (v - max).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

/// `matrix [out, in]` times `x [in]`
fn matvec(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F32 => {
            bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        Dtype::F16 => {
            bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
        }
        Dtype::BF16 => {
            bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
        }
        other => panic!("the tests read no {other:?}"),
    }
}
