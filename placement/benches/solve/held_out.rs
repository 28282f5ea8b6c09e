//! What a profile of 100·E tokens loses: cost on tokens that it has not seen, over that of a table solved on those.

use crate::clock::clock;
use exflow_placement::{Affinity, Generator, PlacementTable, SolveOptions, Topology, score_affinity, solve};
use std::time::Duration;

/// The most that a profile may lose.
const DEAREST: f64 = 1.015;
/// Tokens to score on.
const UNSEEN: usize = 100_000;

/// Prints a line for each shape.
pub fn measure(seconds: f64, processor_time: bool) -> [usize; 2] {
    println!(
        "\nprofile of 100·E tokens, top-1, {seconds} s each: cost on {UNSEEN} others over that of a table solved on those (at most {DEAREST})"
    );
    let mut kept = 0;
    let shapes = [[12, 8, 4], [24, 16, 8], [32, 32, 8], [40, 64, 16]];
    for [layers, experts, ranks] in shapes {
        let spec = Generator::new(layers, experts, 1);
        let counted = |tokens, text| {
            Affinity::from_trace(&spec.trace(tokens, 7, text), experts).expect("a generated trace is sound")
        };
        let (profile, unseen) = (counted(100 * experts, 11), counted(UNSEEN, 12));
        let topology = Topology::uniform(ranks);
        let solved = |on: &Affinity| {
            let time_limit = Duration::from_secs_f64(seconds);
            let options =
                SolveOptions { time_limit, clock: clock(processor_time), ..SolveOptions::default() };
            solve(on, &topology, &options, &mut |_| ()).expect("a generated instance is sound")
        };
        let moves = |table: &PlacementTable| score_affinity(table, &unseen, &topology).crossings_per_token;
        let ratio = moves(&solved(&profile)) / moves(&solved(&unseen));
        kept += usize::from(ratio <= DEAREST);
        println!("{layers}x{experts}x{ranks:<12} {ratio:.4} {}", if ratio <= DEAREST { "ok" } else { "NO" });
    }
    [kept, shapes.len()]
}
