//! A chat on the terminal: each line of stdin is a turn, and the answer streams. A model without a chat template goes
//! on from what was written instead.
//! `cargo run --release --example chat -- [MODEL_DIR]`
#![allow(clippy::print_stdout, reason = "an example talks to people")]

use exflow::engine::{self, ChatTemplate, ClusterOptions, EngineError, Message, Request, Sampling};
use exflow::progress::Bars;
use exflow::{Engine, EngineOptions};
use std::io::{BufRead, Write};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/gpt-moe-16e");

fn main() -> Result<(), EngineError> {
    engine::prepare_process(1); // before any thread exists
    let model = std::env::args().nth(1).unwrap_or_else(|| MODEL.into());
    let options = ClusterOptions::new(&model);
    let template = ChatTemplate::open(&options.model).ok();
    let engine = Engine::start(options, EngineOptions::default(), &Bars::terminal_only())?;
    let Some(codec) = engine.text() else {
        println!("{model} has no tokenizer: nothing to talk with");
        return Ok(());
    };

    let mut said: Vec<Message> = Vec::new();
    let lines = std::io::stdin().lock().lines().map_while(Result::ok);
    for (seed, line) in (1..).zip(lines.filter(|line| !line.trim().is_empty())) {
        said.push(Message::new("user", &line));
        let prompt_ids = match &template {
            Some(template) => codec.encode_whole(&template.render(&said)?)?,
            None => codec.encode(&line)?,
        };
        let sampling = Sampling { temperature: 0.7, seed, ..Sampling::default() };
        let request = Request { prompt_ids, max_tokens: 60, sampling, ..Request::default() };

        let mut answer = String::new();
        for event in engine.submit(request)? {
            let event = event?;
            print!("{}", event.text);
            let _ = std::io::stdout().flush(); // a reader that has enough is no reason to stop
            answer += &event.text;
        }
        println!();
        said.push(Message::new("assistant", answer));
    }
    Ok(())
}
