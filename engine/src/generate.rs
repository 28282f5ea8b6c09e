//! Requests in, tokens and figures out.

use crate::runtime::{Command, Event, FinishReason};
use crate::sampling::Sampling;
use crate::stats::{self, RunStats};
use crate::text::TextStream;
use crate::{Cluster, EngineError};
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
    /// Why the sequence ended, where it did.
    pub finish: Option<FinishReason>,
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
    pub(crate) forced: Vec<u32>,
    pub(crate) capture_routes: bool,
    pub(crate) capture_logits: bool,
}

struct Open {
    output: Vec<u32>,
    stream: TextStream,
    /// Everything that became readable.
    read: String,
    /// What of it was shown.
    text: String,
    first: Option<f64>,
    last: f64,
    finish: Option<FinishReason>,
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
        let run = Run {
            prompt: request.prompt_ids.clone(),
            max_tokens: request.max_tokens,
            ignore_eos: request.ignore_eos,
            sampling: request.sampling.clone(),
            ..Run::default()
        };
        index_of.insert(cluster.submit(run)?, index);
    }
    let mut open: Vec<Open> = requests.iter().map(|_| Open::new()).collect();
    while open.iter().any(|o| o.finish.is_none()) {
        let Event::Token { sequence, token, finish, .. } = cluster.event()? else { continue };
        let Some(&index) = index_of.get(&sequence) else { continue };
        if open[index].finish.is_some() {
            continue; // it ran over its stop text
        }
        let now = started.elapsed().as_secs_f64();
        let text = open[index].push(cluster, &requests[index].stop, token, finish, now)?;
        if finish.is_none() && open[index].finish.is_some() {
            cluster.command(Command::Cancel(sequence))?;
        }
        let finish = open[index].finish;
        sink(&TokenEvent { sequence: index, token, text, finish });
    }
    let seconds = started.elapsed().as_secs_f64();
    let reports = cluster.report()?;
    let times: Vec<_> = open.iter().map(|o| (o.first.unwrap_or(0.0), o.last, o.output.len())).collect();
    let prompt_tokens = requests.iter().map(|r| r.prompt_ids.len() as u64).sum();
    let stats = stats::summarise(cluster, &reports, &times, prompt_tokens, seconds);
    let complete = |(request, open): (&Request, Open)| Completion {
        prompt_ids: request.prompt_ids.clone(),
        output_ids: open.output,
        text: open.text,
        finish_reason: open.finish.unwrap_or(FinishReason::Length),
        ttft_ms: 1e3 * open.first.unwrap_or(0.0),
    };
    Ok(Generation { sequences: requests.iter().zip(open).map(complete).collect(), stats })
}

fn check(cluster: &Cluster, requests: &[Request]) -> Result<(), EngineError> {
    for request in requests {
        cluster.check_prompt(&request.prompt_ids)?;
        if request.max_tokens == 0 {
            return Err(EngineError::usage("0 tokens were asked for", "ask for at least 1"));
        }
        request.sampling.check().map_err(|(what, remedy)| EngineError::usage(what, remedy))?;
        if !request.stop.is_empty() {
            cluster.text()?;
            if request.stop.iter().any(String::is_empty) {
                return Err(EngineError::usage("an empty stop text", "give at least one character"));
            }
        }
    }
    Ok(())
}

impl Open {
    fn new() -> Self {
        let (output, read, text) = (Vec::new(), String::new(), String::new());
        Self { output, stream: TextStream::default(), read, text, first: None, last: 0.0, finish: None }
    }

    /// Takes in a token; returns the text that became readable.
    fn push(
        &mut self,
        cluster: &Cluster,
        stop: &[String],
        token: u32,
        finish: Option<FinishReason>,
        now: f64,
    ) -> Result<String, EngineError> {
        self.first.get_or_insert(now);
        self.last = now;
        self.finish = finish;
        let mut fresh = String::new();
        if finish != Some(FinishReason::Stop) {
            self.output.push(token);
        }
        if let Ok(codec) = cluster.text() {
            if finish != Some(FinishReason::Stop) {
                fresh = self.stream.push(codec, token)?;
            }
            if finish.is_some() {
                fresh += &self.stream.finish(codec)?;
            }
        }
        self.read += &fresh;
        Ok(self.show(stop))
    }

    /// Shows what cannot be the beginning of a stop text any more; ends the sequence where one is whole.
    fn show(&mut self, stop: &[String]) -> String {
        let found = stop.iter().filter_map(|s| self.read[self.text.len()..].find(s.as_str())).min();
        let shown = self.text.len();
        let end = match found {
            Some(at) => {
                self.finish = Some(FinishReason::Stop);
                shown + at
            }
            None if self.finish.is_some() => self.read.len(),
            None => {
                let held = |s: &String| {
                    (1..s.len()).rev().find(|&n| s.is_char_boundary(n) && self.read.ends_with(&s[..n]))
                };
                self.read.len() - stop.iter().filter_map(held).max().unwrap_or(0)
            }
        };
        let fresh = self.read[shown..end.max(shown)].to_owned();
        self.text += &fresh;
        fresh
    }
}
