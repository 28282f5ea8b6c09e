//! `exflow bench model`: prefill and decode rates of one model, in the terms of llama-bench.

use super::super::failure::Failure;
use super::super::flags::RankFlags;
use super::super::output::{self, TableFormat};
use exflow::engine::{Cluster, Request};
use exflow::progress::Bars;
use exflow::shaders::KV_BLOCK;
use serde::Serialize;
use std::fmt::Write;

/// Measures tokens per second of prefill (pp) and decode (tg)
#[derive(Debug, clap::Args)]
#[command(
    after_help = "ppN: N prompt tokens, from the request to the first sampled token. tgN: N tokens decoded one after another by\n\
                        each of --batch sequences that start from a prompt of one token. One run of each is thrown away.\n\
                        The KV cache holds just that, where --ctx-size says nothing.\n\n\
                        Example:\n  exflow bench model -m examples/models/gpt-moe-16e -p 128 -n 32 -r 3 --format md"
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    /// Prompt tokens; 0: no prefill test
    #[arg(short, long, value_name = "N", default_value_t = 128)]
    prompt_tokens: usize,
    /// Tokens to decode; 0: no decode test
    #[arg(short = 'n', long, value_name = "N", default_value_t = 32)]
    decode_tokens: usize,
    /// Sequences at once
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Measured runs
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: TableFormat,
}

/// One test, as llama-bench names it.
#[derive(Debug, Serialize)]
struct Line {
    test: String,
    batch: u32,
    tokens_per_s: f64,
    stddev: f64,
    /// Of the quickest run, as `bench kernels` and `bench device` take it.
    best_tokens_per_s: f64,
    /// Rows and columns of the matrices that matrix units made its products of; 0: lanes made them.
    matrix_units: u64,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let (prompt, decode) = (args.prompt_tokens, args.decode_tokens);
    let mut options = args.ranks.options()?;
    // No more cache than what is measured needs, as llama-bench has it.
    let each = (prompt + 1).max(decode + 2).next_multiple_of(KV_BLOCK);
    options.cache_positions.get_or_insert(each * args.batch as usize);
    let mut cluster = Cluster::start(options, &Bars::new())?;
    let mut lines = Vec::new();
    if prompt > 0 {
        lines.push(test(args, &mut cluster, format!("pp{prompt}"), (prompt, 1))?);
    }
    if decode > 0 {
        lines.push(test(args, &mut cluster, format!("tg{decode}"), (1, decode + 1))?);
    }
    match args.format {
        TableFormat::Json => output::json(&lines),
        TableFormat::Md => {
            let mut text = "| test | batch | tokens/s | stddev | best |\n|---|---|---|---|---|\n".to_owned();
            for line in &lines {
                let (rate, stddev, best) = (line.tokens_per_s, line.stddev, line.best_tokens_per_s);
                let _ = writeln!(
                    text,
                    "| {} | {} | {rate:.2} | {stddev:.2} | {best:.2} |",
                    line.test, line.batch
                );
            }
            output::text(&text)
        }
        TableFormat::Text => {
            let units = |l: &Line| match l.matrix_units {
                0 => String::new(),
                side => format!(", on matrix units of {side} by {side}"),
            };
            let of = |l: &Line| {
                format!("{}: {:.2} ± {:.2} tokens/s{}\n", l.test, l.tokens_per_s, l.stddev, units(l))
            };
            output::text(&lines.iter().map(of).collect::<String>())
        }
    }
}

/// Runs of (prompt tokens, tokens to make) of every sequence; the first run makes pipelines and is not counted.
fn test(
    args: &Args,
    cluster: &mut Cluster,
    test: String,
    (prompt, make): (usize, usize),
) -> Result<Line, Failure> {
    let vocab = cluster.spec().vocab_size;
    // Ids that differ from sequence to sequence, spread over the vocabulary.
    let id = |sequence: usize, i: usize| ((7919 * (i + 1) + 104_729 * sequence) % vocab) as u32;
    let request = |sequence: usize| Request {
        prompt_ids: (0..prompt).map(|i| id(sequence, i)).collect(),
        max_tokens: make,
        ignore_eos: true,
        ..Request::default()
    };
    let requests: Vec<Request> = (0..args.batch as usize).map(request).collect();
    let (mut rates, mut matrix_units) = (Vec::new(), 0);
    for repeat in 0..=args.repeats {
        let stats = cluster.generate(&requests, &mut |_| {})?.stats;
        let rate =
            if make == 1 { (prompt * requests.len()) as f64 / stats.seconds } else { stats.tokens_per_s };
        matrix_units = stats.matrix_units.iter().copied().max().unwrap_or(0);
        if repeat > 0 {
            rates.push(rate);
        }
    }
    let mean = rates.iter().sum::<f64>() / rates.len() as f64;
    let squares: f64 = rates.iter().map(|r| (r - mean).powi(2)).sum();
    let stddev = (squares / (rates.len() as f64 - 1.0).max(1.0)).sqrt();
    let best_tokens_per_s = rates.iter().copied().fold(0.0, f64::max);
    Ok(Line { test, batch: args.batch, tokens_per_s: mean, stddev, best_tokens_per_s, matrix_units })
}
