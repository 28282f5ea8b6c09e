//! What other ranks, links and placements would give, from a recorded trace alone: no GPU, no model.
//! `cargo run --release --example replay_trace -- [TRACE.npy]`
#![allow(clippy::print_stdout, reason = "an example talks to people")]

use exflow::engine::Strategy;
use exflow::placement::{Affinity, PlacementTable, RoutingTrace, SolveOptions, Topology, solve};
use exflow::placement::{Generator, Link, SimulateOptions, simulate};
use std::error::Error;
use std::time::Duration;

const EXPERTS: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    // A trace of `exflow profile --trace`, or an invented one whose layers follow one another closely.
    let trace = match std::env::args_os().nth(1) {
        Some(path) => RoutingTrace::load_npy(path.as_ref())?,
        None => Generator::new(8, EXPERTS, 1).trace(4000, 1, 2),
    };
    let experts = trace.experts().max(EXPERTS);
    // The first half is what one profiles, the second is what comes later.
    let half = trace.tokens() / 2;
    let affinity = Affinity::from_trace(&trace.slice(0..half), experts)?;
    let later = trace.slice(half..trace.tokens());
    let base = SimulateOptions {
        strategy: Strategy::Coherent,
        batch: 8,
        row_bytes: 4.0 * 2048.0, // hidden size 2048 in f32
        kv_bytes: 4.0 * 2.0 * 512.0,
        combine_sum: false,
    };
    let wire = Link { latency_us: 200.0, gbit_per_s: 1.0 };

    println!(
        "{:>5} {:<10} {:<12} {:>6} {:>14} {:>10}",
        "ranks", "strategy", "placement", "stay", "dispatch B", "rounds ms"
    );
    for ranks in [2, 4, 8] {
        let topology = Topology::uniform(ranks).or_linked(wire);
        let options = SolveOptions { time_limit: Duration::from_millis(500), ..SolveOptions::default() };
        let solved = solve(&affinity, &topology, &options, &mut |_| {})?;
        let round_robin = PlacementTable::round_robin(trace.layers(), experts, ranks);
        for (strategy, name, table) in [
            (Strategy::Vanilla, "round_robin", &round_robin),
            (Strategy::Coherent, "round_robin", &round_robin),
            (Strategy::Coherent, "by affinity", &solved),
        ] {
            let replay = simulate(table, &later, &topology, &SimulateOptions { strategy, ..base })?;
            println!(
                "{ranks:>5} {:<10} {name:<12} {:>4.0} % {:>14.0} {:>10.2}",
                strategy.to_string(),
                100.0 * replay.stay_rate,
                replay.dispatch_bytes,
                replay.rounds_ms.unwrap_or(0.0)
            );
        }
    }
    println!(
        "stay and bytes are per token; time is that of the links alone, for one step of {} sequences",
        base.batch
    );
    Ok(())
}
