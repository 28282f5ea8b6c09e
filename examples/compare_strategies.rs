//! The same prompts with two exchanges a layer (`vanilla`) and with one (`coherent`): same text, other traffic.
//! `cargo run --release --example compare_strategies`
#![allow(clippy::print_stdout, reason = "an example talks to people")]

use exflow::engine::{self, Cluster, ClusterOptions, EngineError, Request, Strategy, TransportKind};
use exflow::progress::Bars;
use exflow::report::byte_text;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/gpt-moe-16e");
const RANKS: usize = 4;
const PROMPTS: [&str; 4] = ["In the beginning", "The king said", "A good friend", "The function returns"];

fn main() -> Result<(), EngineError> {
    engine::prepare_process(RANKS); // before any thread exists
    println!(
        "{:<10} {:>9} {:>16} {:>10} {:>10} {:>10}",
        "strategy", "tokens/s", "exchanges/layer", "dispatch", "combine", "kv"
    );
    let mut said = Vec::new();
    for strategy in [Strategy::Vanilla, Strategy::Coherent] {
        // Four ranks that talk over QUIC, as they would between hosts.
        let mut options = ClusterOptions::new(MODEL);
        options.ranks = RANKS;
        options.transport = TransportKind::Quic;
        options.strategy = strategy;
        let mut cluster = Cluster::start(options, &Bars::terminal_only())?;
        let mut requests = Vec::new();
        for prompt in PROMPTS {
            let prompt_ids = cluster.text()?.encode(prompt)?;
            requests.push(Request { prompt_ids, max_tokens: 32, ignore_eos: true, ..Request::default() });
        }
        let run = cluster.generate(&requests, &mut |_| {})?;
        let (stats, bytes) = (&run.stats, &run.stats.bytes);
        println!(
            "{:<10} {:>9.1} {:>16.2} {:>10} {:>10} {:>10}",
            stats.strategy,
            stats.tokens_per_s,
            stats.exchanges_per_layer,
            byte_text(bytes.dispatch as f64),
            byte_text(bytes.combine as f64),
            byte_text(bytes.kv as f64)
        );
        said.push(run.sequences.into_iter().map(|done| done.text).collect::<Vec<_>>());
    }
    // Where a token is worked on changes nothing of what it says.
    println!("both said the same: {}", said[0] == said[1]);
    println!("{}{}", PROMPTS[0], said[0][0]);
    Ok(())
}
