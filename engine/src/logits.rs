//! Logits and routes of given ids.

use crate::generate::{self, Run};
use crate::options::{Feed, Progress};
use crate::runtime::{Captured, Event};
use crate::{Cluster, EngineError};
use exflow_placement::RoutingTrace;
use exflow_placement::npy::NpzWriter;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::Path;

/// Logits of every position with the experts chosen on the way.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitsDump {
    /// T.
    pub tokens: usize,
    /// V.
    pub vocab: usize,
    /// `[T, V]`.
    pub logits: Vec<f32>,
    /// One per MoE layer.
    pub layers: Vec<LayerRouting>,
}

/// The router's choice at one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRouting {
    /// The model's own number of the layer.
    pub layer: usize,
    /// K.
    pub k: usize,
    /// `[T, K]`, largest weight first.
    pub experts: Vec<i32>,
    /// `[T, K]`.
    pub weights: Vec<f32>,
}

pub(crate) fn run(cluster: &mut Cluster, ids: &[u32], feed: Feed) -> Result<LogitsDump, EngineError> {
    generate::check_prompt(cluster.spec(), ids)?;
    let split = match feed {
        Feed::Prefill => ids.len(),
        Feed::Decode => 1,
    };
    let run = Run {
        prompt: ids[..split].to_vec(),
        max_tokens: ids.len() - split + 1,
        ignore_eos: true,
        forced: ids[split..].to_vec(),
        capture_routes: true,
        capture_logits: true,
        ..Run::default()
    };
    let sequence = cluster.submit(run)?;
    let captured = collect(cluster, &[sequence], &mut |_| {})?;
    assemble(cluster, ids.len(), captured)
}

/// Everything captured of `sequences`, until the last of them ends.
fn collect(
    cluster: &mut Cluster,
    sequences: &[u32],
    ended: &mut dyn FnMut(u32),
) -> Result<Vec<Captured>, EngineError> {
    let mut open: Vec<u32> = sequences.to_vec();
    let mut captured = Vec::new();
    while !open.is_empty() {
        match cluster.event()? {
            Event::Captured(c) => captured.push(c),
            Event::Token { request, finish: Some(_), .. } => {
                open.retain(|id| *id != request);
                ended(request);
            }
            _ => {}
        }
    }
    Ok(captured)
}

fn assemble(cluster: &Cluster, tokens: usize, captured: Vec<Captured>) -> Result<LogitsDump, EngineError> {
    let spec = cluster.spec();
    let (vocab, k) = (spec.vocab_size, spec.top_k);
    // What was preempted is captured again when it is replayed, with the same bits.
    let mut seen = HashSet::new();
    let mut logits = vec![0.0; tokens * vocab];
    let mut layers: Vec<_> = (spec.moe_layers.iter())
        .map(|&layer| LayerRouting { layer, k, experts: vec![0; tokens * k], weights: vec![0.0; tokens * k] })
        .collect();
    for c in captured {
        match c {
            Captured::Logits { position, values, .. } => {
                seen.insert((position, None));
                logits[position as usize * vocab..][..vocab].copy_from_slice(&values);
            }
            Captured::Route { position, layer, experts, weights, .. } => {
                seen.insert((position, Some(layer)));
                let at = position as usize * k;
                let routing = &mut layers[usize::from(layer)];
                let ids: Vec<i32> = experts.iter().map(|&e| e as i32).collect();
                routing.experts[at..at + k].copy_from_slice(&ids);
                routing.weights[at..at + k].copy_from_slice(&weights);
            }
        }
    }
    let expected = tokens * (1 + spec.moe_layers());
    if seen.len() != expected {
        let what = format!("{} of {expected} captures came", seen.len());
        return Err(EngineError::Internal(what));
    }
    Ok(LogitsDump { tokens, vocab, logits, layers })
}

impl LogitsDump {
    /// Writes `logits` f32 `[T, V]`, `experts.{l}` i32 `[T, K]` and `router_weights.{l}` f32 `[T, K]`.
    pub fn save_npz(&self, path: &Path) -> Result<(), EngineError> {
        let write = || {
            let mut archive = NpzWriter::create(path)?;
            archive.f32("logits", &[self.tokens, self.vocab], &self.logits)?;
            for LayerRouting { layer, k, experts, weights } in &self.layers {
                archive.i32(&format!("experts.{layer}"), &[self.tokens, *k], experts)?;
                archive.f32(&format!("router_weights.{layer}"), &[self.tokens, *k], weights)?;
            }
            archive.finish()
        };
        write()
            .map_err(|source| EngineError::Write { path: path.to_owned(), source: io::Error::other(source) })
    }
}

/// Sequences profiled at once: few enough that their routes are small, enough to fill every rank.
const PROFILE_AT_ONCE: usize = 16;

pub(crate) fn profile(
    cluster: &mut Cluster,
    sequences: &[Vec<u32>],
    progress: &dyn Progress,
) -> Result<RoutingTrace, EngineError> {
    let (layers, k) = (cluster.spec().moe_layers(), cluster.spec().top_k);
    let context = cluster.spec().max_positions;
    let contexts: Vec<&[u32]> = sequences.iter().flat_map(|s| s.chunks(context)).collect();
    let total: usize = contexts.iter().map(|c| c.len()).sum();
    let mut trace = RoutingTrace::new(layers, k);
    let mut done = 0;
    for group in contexts.chunks(PROFILE_AT_ONCE) {
        let mut lengths = HashMap::new();
        let mut ids = Vec::new();
        for context in group {
            let run = Run { prompt: context.to_vec(), max_tokens: 1, capture_routes: true, ..Run::default() };
            let id = cluster.submit(run)?;
            lengths.insert(id, context.len());
            ids.push(id);
        }
        let captured = collect(cluster, &ids, &mut |id| {
            done += lengths.get(&id).copied().unwrap_or(0);
            progress.update("profile", done as u64, total as u64, "tokens");
        })?;
        append(&mut trace, captured, layers, k);
    }
    Ok(trace)
}

/// Appends the captured routes, sequence by sequence.
fn append(trace: &mut RoutingTrace, captured: Vec<Captured>, layers: usize, k: usize) {
    let mut tokens: BTreeMap<(u32, u32), Vec<i32>> = BTreeMap::new();
    for c in captured {
        if let Captured::Route { request, position, layer, experts, .. } = c {
            let ids = tokens.entry((request, position)).or_insert_with(|| vec![0; layers * k]);
            let at = usize::from(layer) * k;
            ids[at..at + k].iter_mut().zip(&experts).for_each(|(to, &e)| *to = e as i32);
        }
    }
    let mut last = None;
    for ((sequence, _), ids) in tokens {
        if last != Some(sequence) {
            trace.mark_break();
        }
        last = Some(sequence);
        trace.push_token(&ids);
    }
}
