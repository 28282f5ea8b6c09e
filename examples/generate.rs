//! Text from one or several prompts on one rank or several, as it appears.
//! `cargo run --release --example generate -- [PROMPT…]`
#![allow(clippy::print_stdout, reason = "an example talks to people")]

use exflow::engine::{self, Cluster, ClusterOptions, EngineError, Request, Sampling};
use exflow::progress::Bars;
use exflow::stream::TextStream;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/gpt-moe-16e");
const RANKS: usize = 2;

fn main() -> Result<(), EngineError> {
    engine::prepare_process(RANKS); // before any thread exists
    let mut prompts: Vec<String> = std::env::args().skip(1).collect();
    if prompts.is_empty() {
        prompts = vec!["In the beginning".into(), "The king said".into()];
    }

    // A model on two ranks of this process: each holds half of the experts on a device of its own.
    let mut options = ClusterOptions::new(MODEL);
    options.ranks = RANKS;
    let mut cluster = Cluster::start(options, &Bars::terminal_only())?;

    // All prompts run together; each draws its tokens from a seed of its own.
    let mut requests = Vec::new();
    for (seed, prompt) in (1..).zip(&prompts) {
        let sampling = Sampling { temperature: 0.8, top_p: 0.95, seed, ..Sampling::default() };
        let prompt_ids = cluster.text()?.encode(prompt)?;
        requests.push(Request { prompt_ids, max_tokens: 40, sampling, ..Request::default() });
    }
    let mut stream = TextStream::new(std::io::stdout(), requests.len());
    let run = cluster.generate(&requests, &mut |event| {
        // A reader that has enough is no reason to stop.
        let _ = stream.push(event.sequence, &event.text, event.finish.is_some());
    })?;

    let stats = &run.stats;
    println!(
        "{} tokens at {:.0} tokens/s; {:.2} exchanges per MoE layer, {:.0} % of transitions stayed on their rank",
        stats.output_tokens,
        stats.tokens_per_s,
        stats.exchanges_per_layer,
        100.0 * stats.stay_rate
    );
    Ok(())
}
