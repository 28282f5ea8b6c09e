//! The main job: a trained model on four ranks over QUIC, its routing profiled, its experts placed by affinity,
//! the strategies side by side. `cargo run --release --example quickstart [MODEL_DIR]`
#![allow(clippy::print_stdout, reason = "an example talks to people")]

use exflow::engine::{self, Cluster, ClusterOptions, Request, Strategy, TransportKind};
use exflow::placement::SolveOptions;
use exflow::progress::Bars;
use exflow::report::{ModelFacts, rate_text};
use exflow::stream::TextStream;
use exflow::study::{self, Corpus, OwnText, Setting, Study, StudyError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const RANKS: usize = 4;
const REPEATS: usize = 3;
const TOKENS: usize = 64;
const PROMPTS: [&str; 4] = ["And the king said", "In Rust, a function", "A good friend", "In the beginning"];

fn main() -> ExitCode {
    engine::prepare_process(RANKS); // before any thread exists
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = std::env::args_os().nth(1).map_or(root.join("examples/models/gpt-moe-16e"), PathBuf::from);
    match run(root, &model) {
        Ok(report) => {
            println!("\nreport: file://{}", report.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if error.is_input() { 2 } else { 1 })
        }
    }
}

fn run(root: &Path, model: &Path) -> Result<PathBuf, StudyError> {
    let bars = Bars::new();

    // 1. Four ranks, each with a device of its own and its own experts only, joined by QUIC.
    let mut options = ClusterOptions::new(model);
    options.ranks = RANKS;
    options.transport = TransportKind::Quic;
    options.strategy = Strategy::Vanilla;
    let mut cluster = Cluster::start(options, &bars)?;
    let facts = ModelFacts::of(cluster.spec(), model);
    println!("{}: {} MoE layers × {} experts on {RANKS} ranks", facts.name, facts.moe_layers, facts.experts);

    // 2. Routing of text that the model writes itself and of this project's documents; every fourth passage
    //    is kept back. Then the placement.
    let own = OwnText { beginnings: PROMPTS.map(String::from).to_vec(), sequences: 32, tokens: 160, seed: 1 };
    let corpus = Corpus::collect(&mut cluster, &study::read_documents(root)?, &own, 256, &bars)?;
    let profiled = study::profile(&mut cluster, &corpus, &bars)?;
    let solve = SolveOptions { time_limit: Duration::from_secs(5), ..SolveOptions::default() };
    let mut placed = study::place(&profiled, facts.experts, RANKS, &solve, &bars)?;
    placed.table.model_digest = Some(facts.digest.clone());
    let requests = requests(&cluster)?;

    // 3. The same prompts under three settings, streamed; `compare` fails where they do not say the same.
    let mut stream = TextStream::new(std::io::stdout(), PROMPTS.len());
    let mut shown = String::new();
    let settings = Setting::three(&placed.table);
    let compared = study::compare(&mut cluster, settings, &requests, REPEATS, &mut |setting, event| {
        if shown != setting.label() {
            shown = setting.label();
            println!("\n── {shown}");
            stream = TextStream::new(std::io::stdout(), PROMPTS.len());
        }
        let _ = stream.push(event.sequence, &event.text, event.finish.is_some()); // a closed stdout is no reason to stop
    })?;

    // 4. The table, the files, the report.
    let said = compared.said.sequences.iter().map(|done| done.text.clone());
    let texts = PROMPTS.map(String::from).into_iter().zip(said).collect();
    let study = Study::new("ExFlow quickstart", facts, &corpus, profiled, placed, &compared, texts);
    println!("\n{}", study::text_table(&study.report));
    println!("All settings produced the same tokens in all {REPEATS} runs. Medians; bytes of one run.");
    println!("Stay rate on {} tokens that were not profiled:", study.report.profile.held_out_tokens);
    for stay in &study.report.stay {
        println!(
            "  {:<16} {:>7}   busiest rank ÷ mean {:.2}",
            stay.label,
            rate_text(stay.stay_rate),
            stay.imbalance
        );
    }
    study.save(&root.join("runs/quickstart"))
}

fn requests(cluster: &Cluster) -> Result<Vec<Request>, StudyError> {
    let codec = cluster.text()?;
    let request = |prompt: &&str| {
        let prompt_ids = codec.encode(prompt)?;
        Ok(Request { prompt_ids, max_tokens: TOKENS, ignore_eos: false, ..Request::default() })
    };
    PROMPTS.iter().map(request).collect()
}
