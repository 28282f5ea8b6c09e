//! Requests in, tokens and figures out.

use crate::output::Output;
use crate::runtime::{Command, Event, FinishReason};
use crate::sampling::{Logprobs, MAX_LOGPROBS, Sampling};
use crate::stats::{self, RunStats};
use crate::{Cluster, EngineError, ModelSpec};
use exflow_placement::Rank;
use serde::Serialize;
use std::collections::HashMap;
use std::time::Instant;

/// A prompt and how to go on from it.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt_ids: Vec<u32>,
    /// How many tokens to make at most, at least one.
    pub max_tokens: usize,
    /// Whether to go on past the model's end of text.
    pub ignore_eos: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end the output; they are not part of it.
    pub stop: Vec<String>,
    /// Whether [`Engine`](crate::Engine) tells each token's way over layers and ranks.
    pub path: bool,
    /// Tells each token's log-probability, and so many of the likeliest tokens with theirs (at most
    /// [`MAX_LOGPROBS`]); `None`: neither.
    pub logprobs: Option<usize>,
}

/// A token as it appears.
#[derive(Debug, Clone)]
pub struct TokenEvent {
    /// Index into the requests.
    pub sequence: usize,
    /// The token; the one that ends a text is among the events but not in the output.
    pub token: u32,
    /// What became readable with it; perhaps nothing.
    pub text: String,
    /// How likely it was, where the request asks for it.
    pub logprobs: Option<Logprobs>,
    /// Why the sequence ended, where it did.
    pub finish: Option<FinishReason>,
    /// Whether the token itself ends the text and is no part of the output.
    pub ends_text: bool,
    /// The way of the position that this token was sampled from, layer by layer, where a request asked for it.
    pub path: Vec<Hop>,
}

/// One MoE layer on a token's way.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hop {
    /// Counted over the MoE layers only.
    pub layer: usize,
    /// Where attention and router ran: the token's residence.
    pub rank: Rank,
    /// `[K]` chosen experts, largest weight first.
    pub experts: Vec<u32>,
    /// `[K]` their router weights.
    pub weights: Vec<f32>,
}

/// One finished request.
#[derive(Debug, Clone, Serialize)]
pub struct Completion {
    /// As given.
    pub prompt_ids: Vec<u32>,
    /// What was made, end of text not included.
    pub output_ids: Vec<u32>,
    /// The same as text; empty for a model without a tokenizer.
    pub text: String,
    /// Of each token of the output, where the request asks for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<Logprobs>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Milliseconds from the call to the first token.
    pub ttft_ms: f64,
}

/// All finished requests with the figures of the run.
#[derive(Debug, Clone)]
pub struct Generation {
    /// In order of the requests.
    pub sequences: Vec<Completion>,
    /// Figures of the run.
    pub stats: RunStats,
}

/// What a sequence is started with.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: usize,
    pub(crate) ignore_eos: bool,
    pub(crate) sampling: Sampling,
    pub(crate) logprobs: Option<usize>,
    pub(crate) forced: Vec<u32>,
    pub(crate) capture_routes: bool,
    pub(crate) capture_logits: bool,
}

impl Run {
    /// As a request asks for it.
    pub(crate) fn of(request: Request) -> Self {
        Self {
            prompt: request.prompt_ids,
            max_tokens: request.max_tokens,
            ignore_eos: request.ignore_eos,
            sampling: request.sampling,
            logprobs: request.logprobs,
            ..Self::default()
        }
    }
}

pub(crate) fn run(
    cluster: &mut Cluster,
    requests: &[Request],
    sink: &mut dyn FnMut(&TokenEvent),
) -> Result<Generation, EngineError> {
    check(cluster, requests)?;
    cluster.report()?; // counts of earlier runs end here
    let started = Instant::now();
    let mut index_of = HashMap::new();
    for (index, request) in requests.iter().enumerate() {
        index_of.insert(cluster.submit(Run::of(request.clone()))?, index);
    }
    let codec = cluster.codec();
    let mut open: Vec<Output> = requests.iter().map(|_| Output::default()).collect();
    let mut all_logprobs: Vec<Vec<Logprobs>> = vec![Vec::new(); requests.len()];
    while open.iter().any(|o| o.finish.is_none()) {
        let Event::Token { request, token, logprobs, finish } = cluster.event()? else { continue };
        let Some(&index) = index_of.get(&request) else { continue };
        if open[index].finish.is_some() {
            continue; // it ran over its stop text
        }
        let now = started.elapsed().as_secs_f64();
        let text = open[index].push(codec.as_deref(), &requests[index].stop, token, finish, now)?;
        if finish.is_none() && open[index].finish.is_some() {
            cluster.command(Command::Cancel(request))?;
        }
        let ends_text = finish == Some(FinishReason::Stop);
        let finish = open[index].finish;
        if !ends_text {
            all_logprobs[index].extend(logprobs.clone());
        }
        sink(&TokenEvent { sequence: index, token, text, logprobs, finish, ends_text, path: Vec::new() });
    }
    let seconds = started.elapsed().as_secs_f64();
    let reports = cluster.report()?;
    let times: Vec<_> = open.iter().map(|o| (o.first.unwrap_or(0.0), o.last, o.ids.len())).collect();
    let prompt_tokens = requests.iter().map(|r| r.prompt_ids.len() as u64).sum();
    let stats = stats::summarise(cluster, &reports, &times, prompt_tokens, seconds);
    let complete = |((request, open), logprobs): ((&Request, Output), Vec<Logprobs>)| Completion {
        prompt_ids: request.prompt_ids.clone(),
        output_ids: open.ids,
        text: open.text,
        logprobs: request.logprobs.map(|_| logprobs),
        finish_reason: open.finish.unwrap_or(FinishReason::Length),
        ttft_ms: 1e3 * open.first.unwrap_or(0.0),
    };
    Ok(Generation { sequences: requests.iter().zip(open).zip(all_logprobs).map(complete).collect(), stats })
}

fn check(cluster: &Cluster, requests: &[Request]) -> Result<(), EngineError> {
    for request in requests {
        check_request(cluster.spec(), cluster.cache_positions(), request)?;
        if !request.stop.is_empty() {
            cluster.text()?;
        }
    }
    Ok(())
}

/// Whether a request can be run by a model of this shape with so many positions of cache.
pub(crate) fn check_request(spec: &ModelSpec, held: usize, request: &Request) -> Result<(), EngineError> {
    check_prompt(spec, &request.prompt_ids)?;
    if request.max_tokens == 0 {
        return Err(EngineError::usage("0 tokens were asked for", "ask for at least 1"));
    }
    check_room(spec, held, request.prompt_ids.len(), request.max_tokens)?;
    request.sampling.check().map_err(|(what, remedy)| EngineError::usage(what, remedy))?;
    if let Some(top) = request.logprobs.filter(|&top| top > MAX_LOGPROBS) {
        let what = format!("{top} alternatives to each token were asked for");
        return Err(EngineError::usage(what, format!("ask for at most {MAX_LOGPROBS}")));
    }
    if request.stop.iter().any(String::is_empty) {
        return Err(EngineError::usage("an empty stop text", "give at least one character"));
    }
    Ok(())
}

pub(crate) fn check_prompt(spec: &ModelSpec, prompt: &[u32]) -> Result<(), EngineError> {
    let (vocab, context) = (spec.vocab_size, spec.max_positions);
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
        let what = format!("prompt id {id} is outside the vocabulary");
        return Err(EngineError::usage(what, format!("use ids below {vocab}")));
    }
    if prompt.is_empty() {
        return Err(EngineError::usage("the prompt has no tokens", "give at least one token"));
    }
    if prompt.len() > context {
        let what = format!("the prompt has {} tokens, n_positions is {context}", prompt.len());
        return Err(EngineError::usage(what, "shorten the prompt"));
    }
    Ok(())
}

/// Whether the cache of a rank has room for the sequence at all.
pub(crate) fn check_room(
    spec: &ModelSpec,
    held: usize,
    prompt: usize,
    max_tokens: usize,
) -> Result<(), EngineError> {
    let needed = crate::runtime::positions_needed(prompt, max_tokens, spec.max_positions);
    if needed <= held {
        return Ok(());
    }
    let what = format!("prompt and output need {needed} positions, the KV cache holds {held}");
    Err(EngineError::usage(what, "ask for fewer tokens, or set --ctx-size"))
}
