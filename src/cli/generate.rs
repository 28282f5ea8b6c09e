//! `exflow generate`: text from prompts, as it appears or as one JSON document.

use super::failure::Failure;
use super::flags::{self, RankFlags};
use super::output::{self, Format};
use exflow::engine::plan::Prediction;
use exflow::engine::{ChatTemplate, Cluster, Completion, Generation, Message, Request, Sampling, TokenEvent};
use exflow::progress::Bars;
use exflow::stream::TextStream;
use serde_json::{Value, json};
use std::io;

/// Continues one or several prompts
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  exflow generate -m examples/models/gpt-moe-16e --ep-size 4 --transport quic \\\n    -p \"In the beginning\" \"The king said\" -n 60 --temp 0"
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    #[command(flatten)]
    prompts: Prompts,
    /// Most tokens to add to each prompt
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// Temperature; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    temp: f32,
    /// Draws only among the K likeliest tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draws only among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Draws only among tokens at least this likely, as a share of the likeliest one's probability
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Makes tokens that are there already less likely, above 1
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Seed of the sampling, where the temperature is above 0; each further prompt takes the next one
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Takes each -p as what a user says in a chat, put into the model's chat template
    #[arg(long, requires = "prompt")]
    chat: bool,
    /// What the system says before a chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Ends a text where one of these appears; it is not shown
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    stop: Vec<String>,
    /// With --format json, tells each token's log-probability and the N likeliest tokens with theirs
    #[arg(long, value_name = "N")]
    logprobs: Option<usize>,
    /// Goes on after the model's end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

/// Texts or ids, one kind of the two.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Prompts {
    /// Prompts as text; all run together
    #[arg(short, long, value_name = "TEXT", num_args = 1..)]
    prompt: Vec<String>,
    /// Prompts as token ids; all run together
    #[arg(long, value_name = "1,2,3", num_args = 1..)]
    prompt_ids: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    // Ids as typed are checked before a model is loaded.
    let given =
        args.prompts.prompt_ids.iter().map(|ids| flags::token_ids(ids)).collect::<Result<Vec<_>, _>>()?;
    let Some(mut cluster) = args.ranks.start(&Bars::terminal_only())? else { return Ok(()) };
    let count = given.len().max(args.prompts.prompt.len());
    let chosen = args.ranks.tune(&mut cluster, count)?;
    let prompts = match (given.is_empty(), args.chat) {
        (false, _) => given,
        (true, false) => encode(&cluster, &args.prompts.prompt)?,
        (true, true) => encode_chats(&cluster, args)?,
    };
    let requests: Vec<Request> =
        prompts.into_iter().enumerate().map(|(i, ids)| request(args, i, ids)).collect();
    let run = match args.format {
        Format::Text => streamed(&mut cluster, &requests, args)?,
        Format::Json => cluster.generate(&requests, &mut |_| {})?,
    };
    match args.format {
        Format::Json => {
            args.ranks.note_placement();
            output::json(&as_json(&run, chosen.as_ref().map(|chosen| chosen.prediction))?)?;
        }
        Format::Text => output::note(&summary(&run)),
    }
    if let Some(chosen) = chosen {
        chosen.note(&run.stats);
    }
    Ok(())
}

fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value),
        _ => Err("the temperature must be a number of 0 or more".into()),
    }
}

fn encode(cluster: &Cluster, texts: &[String]) -> Result<Vec<Vec<u32>>, Failure> {
    let codec = cluster.text()?;
    texts.iter().map(|text| codec.encode(text).map_err(Failure::from)).collect()
}

/// Each prompt as a chat of its own.
fn encode_chats(cluster: &Cluster, args: &Args) -> Result<Vec<Vec<u32>>, Failure> {
    let (template, codec) = (ChatTemplate::open(&args.ranks.model)?, cluster.text()?);
    let ids = |text: &String| {
        let system = args.system.iter().map(|s| Message::new("system", s));
        let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
        Ok(codec.encode_whole(&template.render(&messages)?)?)
    };
    args.prompts.prompt.iter().map(ids).collect()
}

fn request(args: &Args, index: usize, prompt_ids: Vec<u32>) -> Request {
    Request {
        prompt_ids,
        max_tokens: args.max_tokens,
        ignore_eos: args.ignore_eos,
        sampling: Sampling {
            temperature: args.temp,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repetition_penalty: args.repeat_penalty,
            seed: args.seed.wrapping_add(index as u64),
        },
        stop: args.stop.clone(),
        path: false,
        logprobs: args.logprobs,
    }
}

/// Runs with text on stdout as it appears. Where stdout fails the run goes on in silence to its end.
fn streamed(cluster: &mut Cluster, requests: &[Request], args: &Args) -> Result<Generation, Failure> {
    let mut stream = TextStream::new(io::stdout().lock(), requests.len());
    let mut failed = None;
    let mut noted = false;
    let mut sink = |event: &TokenEvent| {
        if !noted {
            noted = true; // once it is certain that the request was sound: errors stay short
            args.ranks.note_placement();
        }
        if failed.is_none() {
            failed = stream.push(event.sequence, &event.text, event.finish.is_some()).err();
        }
    };
    let run = cluster.generate(requests, &mut sink)?;
    failed.map_or(Ok(run), |error| Err(error.into()))
}

fn as_json(run: &Generation, predicted: Option<Prediction>) -> Result<Value, Failure> {
    let sequences = run.sequences.iter().map(sequence).collect::<Result<Vec<_>, _>>()?;
    let mut value = json!({ "sequences": sequences, "stats": serde_json::to_value(&run.stats)? });
    if let Some(predicted) = predicted {
        value["prediction"] = serde_json::to_value(predicted)?;
    }
    Ok(value)
}

fn sequence(done: &Completion) -> Result<Value, Failure> {
    let mut value = json!({
        "prompt_ids": done.prompt_ids,
        "output_ids": done.output_ids,
        "text": done.text,
        "finish_reason": serde_json::to_value(done.finish_reason)?,
        "ttft_ms": done.ttft_ms,
    });
    if let Some(logprobs) = &done.logprobs {
        value["logprobs"] = serde_json::to_value(logprobs)?;
    }
    Ok(value)
}

fn summary(run: &Generation) -> String {
    let stats = &run.stats;
    let mut text = format!(
        "{} tokens, {:.1} tokens/s, first token after {:.0} ms",
        stats.output_tokens, stats.tokens_per_s, stats.ttft_ms
    );
    if stats.ranks > 1 {
        text.push_str(&format!(
            "; {} ranks, {}, {:.2} exchanges per MoE layer, stay rate {:.1} %",
            stats.ranks,
            stats.strategy,
            stats.exchanges_per_layer,
            100.0 * stats.stay_rate
        ));
    }
    if let Some(side) = stats.matrix_units.iter().find(|side| **side > 0) {
        text.push_str(&format!("; products in f16 on matrix units of {side} by {side}"));
    }
    let peak = stats.kv_peak_bytes.iter().copied().max().unwrap_or(0);
    text.push_str(&format!(
        "; K/V at most {:.1} MB a rank, texts of up to {} tokens fit",
        peak as f64 / 1e6,
        stats.longest_context
    ));
    text
}
