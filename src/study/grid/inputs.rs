//! What a grid is measured on: prompts, profiled routes, tables, and a synthetic model.

use super::requests;
use crate::study::{Corpus, OwnText, StudyError, passages};
use exflow_engine::{Cluster, ModelSpec, Progress, TextCodec};
use exflow_placement::{Affinity, PlacementTable, Rng, RoutingTrace, SolveOptions, Topology, solve};
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// Beginnings that any language model of English can go on from; what a grid is profiled on.
pub const BEGINNINGS: [&str; 8] = [
    "In the beginning",
    "The king said unto",
    "The function returns",
    "It is a truth that",
    "And when he had",
    "A value of this type",
    "There was a man",
    "If the file is",
];

/// Beginnings of the text that is measured; none of them is profiled.
const MEASURED: [&str; 8] = [
    "A good friend",
    "When the list is empty",
    "The children went",
    "Now after many days",
    "This method takes",
    "O my lord, what",
    "She looked at the",
    "To build the program",
];

/// What follows a beginning from its second turn on: every sequence of up to 64 is another one. Equal sequences choose equal
/// experts, which makes fuller launches than any real text does.
const ENDINGS: [&str; 8] = ["", " and", " that", " with", " in", ", for", " as", " to"];

/// Sequences that the model writes to be profiled on.
const OWN_SEQUENCES: usize = 40;
/// Tokens of each that tables are solved on.
pub const SOLVED_ON: usize = 96;
/// Different prompts of trials; predictions are made from what follows each.
pub(in crate::study) const TRIAL_PROMPTS: usize = BEGINNINGS.len() * ENDINGS.len();
/// Tokens of a prompt for a model without a tokenizer.
const DRAWN_PROMPT: usize = 6;

/// Routes of text of so many tokens a sequence that the model writes itself, or of drawn tokens where it has no tokenizer.
///
/// # Errors
/// What the engine refuses.
pub fn grid_profile(
    cluster: &mut Cluster,
    tokens: usize,
    seed: u64,
    progress: &dyn Progress,
) -> Result<RoutingTrace, StudyError> {
    own_routes(cluster, (OWN_SEQUENCES, tokens), seed, progress)
}

/// The same for so many sequences of so many tokens.
pub(in crate::study) fn own_routes(
    cluster: &mut Cluster,
    (sequences, tokens): (usize, usize),
    seed: u64,
    progress: &dyn Progress,
) -> Result<RoutingTrace, StudyError> {
    if cluster.text().is_ok() {
        let beginnings = BEGINNINGS.map(String::from).to_vec();
        let own = OwnText { beginnings, sequences, tokens, seed };
        let corpus = Corpus::collect(cluster, &[], &own, 256, progress)?;
        let all: Vec<Vec<u32>> = corpus.profile.into_iter().chain(corpus.held_out).collect();
        return Ok(cluster.profile(&all, progress)?);
    }
    let mut dice = Rng::new(seed ^ 0x5eed);
    let drawn: Vec<Vec<u32>> = (0..sequences).map(|_| draw(&mut dice, cluster.spec(), tokens)).collect();
    let cut: Vec<Vec<u32>> = drawn.iter().flat_map(|ids| passages(ids, 256, cluster.spec())).collect();
    Ok(cluster.profile(&cut, progress)?)
}

fn draw(dice: &mut Rng, spec: &ModelSpec, count: usize) -> Vec<u32> {
    (0..count).map(|_| dice.below(spec.vocab_size) as u32).collect()
}

/// Routes of text like what is measured: so many tokens that the model goes on with greedily after other prompts. Greedy text
/// repeats itself, and with that what its sequence is at home on; text that is drawn does not.
///
/// # Errors
/// What the engine refuses.
pub fn grid_alike(
    cluster: &mut Cluster,
    tokens: usize,
    progress: &dyn Progress,
) -> Result<RoutingTrace, StudyError> {
    let prompts = trial_prompts(cluster, TRIAL_PROMPTS)?;
    let run = cluster.generate(&requests(&prompts, tokens), &mut |_| {})?;
    let outputs = run.sequences.into_iter().map(|done| done.output_ids);
    let texts: Vec<Vec<u32>> =
        prompts.into_iter().zip(outputs).map(|(ids, out)| [ids, out].concat()).collect();
    Ok(cluster.profile(&texts, progress)?)
}

/// Prompts that are not part of what [`grid_profile`] routes.
///
/// # Errors
/// A model that cannot be read.
pub fn grid_prompts(model: &Path, count: usize, seed: u64) -> Result<Vec<Vec<u32>>, StudyError> {
    let spec = ModelSpec::read(model)?;
    match TextCodec::open(model, spec.vocab_size) {
        Ok(codec) => begin(&codec, &MEASURED, count),
        Err(_) => {
            let mut dice = Rng::new(seed ^ 0xa5a5);
            Ok((0..count).map(|_| draw(&mut dice, &spec, DRAWN_PROMPT)).collect())
        }
    }
}

/// Prompts of a trial: beginnings of text that is profiled, none that is measured.
///
/// # Errors
/// A tokenizer that does not know them.
pub(in crate::study) fn trial_prompts(cluster: &Cluster, count: usize) -> Result<Vec<Vec<u32>>, StudyError> {
    match cluster.text() {
        Ok(codec) => begin(codec, &BEGINNINGS, count),
        Err(_) => {
            let mut dice = Rng::new(0x7a1a1);
            Ok((0..count).map(|_| draw(&mut dice, cluster.spec(), DRAWN_PROMPT)).collect())
        }
    }
}

fn begin(codec: &TextCodec, beginnings: &[&str], count: usize) -> Result<Vec<Vec<u32>>, StudyError> {
    let text = |i: usize| {
        beginnings[i % beginnings.len()].to_owned() + ENDINGS[i / beginnings.len() % ENDINGS.len()]
    };
    Ok((0..count).map(|i| codec.encode(&text(i))).collect::<Result<_, _>>()?)
}

/// A table solved on `routes` for equal ranks as if each token began anywhere: without the wrap.
///
/// # Errors
/// What the solver refuses.
pub fn chain_table(
    routes: &RoutingTrace,
    experts: usize,
    ranks: usize,
    options: &SolveOptions,
) -> Result<PlacementTable, StudyError> {
    let mut affinity = Affinity::from_trace(routes, experts)?;
    affinity.wrap = None;
    Ok(solve(&affinity, &Topology::uniform(ranks), options, &mut |_| {})?)
}

/// A table solved on `routes` for equal ranks, the wrap included; with `slots` experts per layer and rank, those that
/// are left over take copies.
///
/// # Errors
/// What the solver refuses.
pub fn grid_table(
    routes: &RoutingTrace,
    experts: usize,
    ranks: usize,
    slots: Option<usize>,
    options: &SolveOptions,
) -> Result<PlacementTable, StudyError> {
    let affinity = Affinity::from_trace(routes, experts)?;
    let mut topology = Topology::uniform(ranks);
    for rank in &mut topology.ranks {
        rank.slots = slots;
    }
    Ok(solve(&affinity, &topology, options, &mut |_| {})?)
}

/// A random model of Mixtral's shape with grouped-query attention; the same for the same seed.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    /// Seed of the weights.
    pub seed: u64,
    /// H.
    pub hidden: usize,
    /// I.
    pub inner: usize,
    /// L, all of them MoE layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// V.
    pub vocab: usize,
}

impl Default for SyntheticModel {
    /// 8 layers of 16 experts, top-2, hidden 256, 8 query and 2 key-value heads: K/V is half a hidden vector.
    fn default() -> Self {
        let (hidden, inner, layers, heads, kv_heads) = (256, 256, 8, 8, 2);
        Self { seed: 0, hidden, inner, layers, heads, kv_heads, experts: 16, top_k: 2, vocab: 512 }
    }
}

impl SyntheticModel {
    /// Writes `config.json` and `model.safetensors` (bf16) into a new folder.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), StudyError> {
        let at = |path: &Path, source| StudyError::Io { path: path.into(), source };
        std::fs::create_dir_all(folder).map_err(|e| at(folder, e))?;
        let config = folder.join("config.json");
        std::fs::write(&config, self.config().to_string()).map_err(|e| at(&config, e))?;
        let path = folder.join("model.safetensors");
        self.store(&path).map_err(|e| at(&path, e))
    }

    fn config(&self) -> serde_json::Value {
        json!({
            "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false, "sliding_window": null,
            "eos_token_id": 0, "bos_token_id": 0,
        })
    }

    /// Every tensor: name, shape, standard deviation; 0: all ones.
    fn tensors(&self) -> Vec<(String, Vec<usize>, f32)> {
        let (h, i, d) = (self.hidden, self.inner, self.hidden / self.heads);
        let fan = |gain: f32, inputs: usize| gain / (inputs as f32).sqrt();
        let mut all = vec![("model.embed_tokens.weight".into(), vec![self.vocab, h], 1.0)];
        for layer in 0..self.layers {
            let mut add = |rest: &str, shape: Vec<usize>, std: f32| {
                all.push((format!("model.layers.{layer}.{rest}.weight"), shape, std));
            };
            add("input_layernorm", vec![h], 0.0);
            add("self_attn.q_proj", vec![h, h], fan(1.0, h));
            add("self_attn.k_proj", vec![self.kv_heads * d, h], fan(1.0, h));
            add("self_attn.v_proj", vec![self.kv_heads * d, h], fan(1.0, h));
            add("self_attn.o_proj", vec![h, h], fan(0.7, h));
            add("post_attention_layernorm", vec![h], 0.0);
            add("block_sparse_moe.gate", vec![self.experts, h], fan(3.0, h));
            for expert in 0..self.experts {
                for (name, shape, inputs) in
                    [("w1", vec![i, h], h), ("w2", vec![h, i], i), ("w3", vec![i, h], h)]
                {
                    add(&format!("block_sparse_moe.experts.{expert}.{name}"), shape, fan(1.0, inputs));
                }
            }
        }
        all.push(("model.norm.weight".into(), vec![h], 0.0));
        all.push(("lm_head.weight".into(), vec![self.vocab, h], fan(2.5, h)));
        all
    }

    fn store(&self, path: &Path) -> std::io::Result<()> {
        let tensors = self.tensors();
        let mut header = serde_json::Map::new();
        let mut end = 0;
        for (name, shape, _) in &tensors {
            let bytes = 2 * shape.iter().product::<usize>();
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes]});
            header.insert(name.clone(), entry);
            end += bytes;
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        let mut dice = Rng::new(self.seed);
        for (_, shape, std) in &tensors {
            for _ in 0..shape.iter().product::<usize>() {
                let value = if *std == 0.0 { 1.0 } else { std * dice.normal() as f32 };
                file.write_all(&((value.to_bits() >> 16) as u16).to_le_bytes())?;
            }
        }
        file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_of_64_prompts_are_the_same_and_none_is_profiled() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/gpt-moe-16e");
        let mut prompts = grid_prompts(&model, 64, 0).expect("prompts");
        let spec = ModelSpec::read(&model).expect("a model");
        let codec = TextCodec::open(&model, spec.vocab_size).expect("a tokenizer");
        prompts.extend(begin(&codec, &BEGINNINGS, 64).expect("beginnings"));
        let different: std::collections::BTreeSet<_> = prompts.iter().collect();
        assert_eq!(different.len(), 128);
        assert!(prompts.iter().all(|ids| !ids.is_empty()));
    }
}
