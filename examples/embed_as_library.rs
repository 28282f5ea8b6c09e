//! A model inside another program: many threads ask at once, one changes its mind, and the engine tells what it does.
//! `cargo run --release --example embed_as_library`
#![allow(clippy::print_stdout, reason = "an example talks to people")]

use exflow::engine::{self, ClusterOptions, EngineError, Request, Sampling};
use exflow::progress::Bars;
use exflow::{Engine, EngineOptions};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/gpt-moe-16e");
const RANKS: usize = 2;
const SUBJECTS: [&str; 6] = ["The king", "The sea", "A function", "The garden", "A friend", "The city"];

fn main() -> Result<(), EngineError> {
    engine::prepare_process(RANKS); // before any thread exists
    let mut options = ClusterOptions::new(MODEL);
    options.ranks = RANKS;
    // A request beyond these is refused, so that nobody waits without end.
    let limits = EngineOptions { max_waiting: 16, ..EngineOptions::default() };
    let engine = Engine::start(options, limits, &Bars::terminal_only())?;

    // Each thread asks for itself; the requests run together, and end when each of them ends.
    std::thread::scope(|scope| {
        for (seed, subject) in (1..).zip(SUBJECTS) {
            let engine = engine.clone();
            scope.spawn(move || match ask(&engine, subject, seed) {
                Ok(text) => println!("{subject}{text}"),
                Err(error) => println!("{subject}: {error}"),
            });
        }
    });

    // One that is dropped half-way is cancelled, and its cache is free for others.
    let prompt_ids = encode(&engine, "It was a long")?;
    let asked = Request { prompt_ids, max_tokens: 200, ignore_eos: true, ..Request::default() };
    let mut tokens = engine.submit(asked)?;
    let first = tokens.next().transpose()?;
    drop(tokens);
    println!("given up after {:?}", first.map(|event| event.text).unwrap_or_default());

    engine.finish();
    let live = engine.live();
    println!(
        "{} requests finished, {} given up, {} tokens",
        live.requests.finished, live.requests.cancelled, live.output_tokens
    );
    Ok(())
}

fn ask(engine: &Engine, subject: &str, seed: u64) -> Result<String, EngineError> {
    let sampling = Sampling { temperature: 0.7, seed, ..Sampling::default() };
    let prompt_ids = encode(engine, subject)?;
    let request =
        Request { prompt_ids, max_tokens: 24, sampling, stop: vec![".".into()], ..Request::default() };
    Ok(engine.submit(request)?.complete()?.text)
}

fn encode(engine: &Engine, text: &str) -> Result<Vec<u32>, EngineError> {
    engine.text().map_or_else(|| Ok(vec![1]), |codec| codec.encode(text)) // any id, for a model without text
}
