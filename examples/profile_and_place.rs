//! From text to a placement: which expert follows which, a table that keeps followers together, and what it gains on
//! text that was not profiled.
//! `cargo run --release --example profile_and_place -- [TEXT_FILE…]`
#![allow(clippy::print_stdout, reason = "an example talks to people")]

use exflow::engine::{self, Cluster, ClusterOptions};
use exflow::placement::{Affinity, PlacementTable, SolveOptions, Topology, score_trace, solve};
use exflow::progress::Bars;
use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const RANKS: usize = 4;
const PASSAGE: usize = 128; // tokens

fn main() -> Result<(), Box<dyn Error>> {
    engine::prepare_process(1); // before any thread exists
    let root = PathBuf::from(ROOT);
    let mut files: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if files.is_empty() {
        files = ["README.md", "docs/ARCHITECTURE.md"].map(|name| root.join(name)).to_vec();
    }

    // 1. Route the text. Routing does not depend on the number of ranks, so one is enough to profile.
    let model = root.join("examples/models/gpt-moe-16e");
    let mut cluster = Cluster::start(ClusterOptions::new(model), &Bars::terminal_only())?;
    let mut passages = Vec::new();
    for file in files {
        let ids = cluster.text()?.encode(&std::fs::read_to_string(file)?)?;
        passages.extend(ids.chunks(PASSAGE).map(<[u32]>::to_vec));
    }
    // Every fourth passage is kept back: a placement is judged on what it has not seen.
    let (kept, profiled): (Vec<_>, Vec<_>) = passages.into_iter().enumerate().partition(|(i, _)| i % 4 == 3);
    let routes = |cluster: &mut Cluster, part: Vec<(usize, Vec<u32>)>| {
        let sequences: Vec<_> = part.into_iter().map(|(_, ids)| ids).collect();
        cluster.profile(&sequences, &Bars::terminal_only())
    };
    let trace = routes(&mut cluster, profiled)?;
    let held_out = routes(&mut cluster, kept)?;
    let experts = cluster.spec().experts;

    // 2. Count which expert follows which, and solve.
    let affinity = Affinity::from_trace(&trace, experts)?;
    let options = SolveOptions { time_limit: Duration::from_secs(2), ..SolveOptions::default() };
    let solved = solve(&affinity, &Topology::uniform(RANKS), &options, &mut |_| {})?;

    // 3. Judge it beside the placement that one gets for nothing.
    let round_robin = PlacementTable::round_robin(trace.layers(), experts, RANKS);
    println!("{} tokens profiled, {} kept back", trace.tokens(), held_out.tokens());
    for (name, table) in [("round_robin", &round_robin), ("by affinity", &solved)] {
        let score = score_trace(table, &held_out);
        println!("{name:<12} {:5.1} % of transitions stay on their rank", 100.0 * score.stay_rate);
    }
    let out = root.join("runs/profile_and_place.json");
    std::fs::create_dir_all(root.join("runs"))?;
    solved.save(&out)?;
    println!("for `exflow generate --ep-size {RANKS} --placement`: {}", out.display());
    Ok(())
}
