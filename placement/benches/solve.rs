//! `cargo bench -p exflow-placement [-- NAME… SECONDS…]`: cost, bound and gap of each instance at each time limit, on
//! one thread, as a table; then what a load bound costs (`load`), and what a profile of 100·E tokens loses on tokens
//! that it has not seen (`heldout`).
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::time::Duration;

use exflow_placement::{Affinity, Generator, PlacementTable, SolveOptions, Topology, score_affinity, solve};

struct Instance {
    name: &'static str,
    affinity: Affinity,
    topology: Topology,
}

fn instance(
    name: &'static str,
    [layers, experts, k]: [usize; 3],
    tokens: usize,
    topology: Topology,
) -> Instance {
    let trace = Generator::new(layers, experts, k).trace(tokens, 7, 11);
    let mut affinity = Affinity::from_trace(&trace, experts).expect("a generated trace is sound");
    if !name.ends_with("+wrap") {
        affinity.wrap = None;
    }
    Instance { name, affinity, topology }
}

fn mixed() -> Topology {
    let text = "ranks = [{host='a',slots=8},{host='a',slots=6},{host='b',slots=6},{host='b',slots=4},{host='c',slots=4},{host='c',slots=4}]
    cost = [[0,1,2.5,2.5,9,9],[1,0,2.5,2.5,9,9],[2.5,2.5,0,1,9,9],[2.5,2.5,1,0,9,9],[9,9,9,9,0,1],[9,9,9,9,1,0]]";
    let path = std::env::temp_dir().join("exflow-bench-mixed.toml");
    std::fs::write(&path, text).expect("the temporary folder can be written");
    Topology::load(&path).expect("the topology is sound")
}

fn build(name: &str) -> Option<Instance> {
    Some(match name {
        "12x8x4" => instance("12x8x4", [12, 8, 1], 20_000, Topology::uniform(4)),
        "12x8x4+wrap" => instance("12x8x4+wrap", [12, 8, 1], 20_000, Topology::uniform(4)),
        "64x8x4h" => instance("64x8x4h", [64, 8, 2], 20_000, Topology::hosts(2, 2, 1.0, 4.0)),
        "24x16x16" => instance("24x16x16", [24, 16, 1], 20_000, Topology::uniform(16)),
        "24x16x8" => instance("24x16x8", [24, 16, 1], 30_000, Topology::hosts(2, 4, 1.0, 4.0)),
        "24x16x8u" => instance("24x16x8u", [24, 16, 1], 30_000, Topology::uniform(8)),
        "24x16x8+wrap" => instance("24x16x8+wrap", [24, 16, 1], 30_000, Topology::uniform(8)),
        "32x32x8" => instance("32x32x8", [32, 32, 1], 40_000, Topology::uniform(8)),
        "32x32x8+wrap" => instance("32x32x8+wrap", [32, 32, 1], 40_000, Topology::uniform(8)),
        "40x64x16" => instance("40x64x16", [40, 64, 1], 60_000, Topology::hosts(4, 4, 1.0, 4.0)),
        "16x64x8k8" => instance("16x64x8k8", [16, 64, 8], 20_000, Topology::uniform(8)),
        "20x32x6mixed" => instance("20x32x6mixed", [20, 32, 1], 40_000, mixed()),
        "58x256x32k8" => instance("58x256x32k8", [58, 256, 8], 6_000, Topology::hosts(4, 8, 1.0, 4.0)),
        _ => return None,
    })
}

const ALL: [&str; 12] = [
    "12x8x4",
    "12x8x4+wrap",
    "64x8x4h",
    "24x16x16",
    "24x16x8",
    "24x16x8u",
    "32x32x8",
    "32x32x8+wrap",
    "40x64x16",
    "16x64x8k8",
    "20x32x6mixed",
    "58x256x32k8",
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let mut seconds: Vec<f64> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    if seconds.is_empty() {
        seconds = vec![0.1, 1.0, 10.0];
    }
    let mut names: Vec<&str> =
        arguments.iter().map(String::as_str).filter(|a| a.parse::<f64>().is_err()).collect();
    if names.is_empty() {
        names = ALL.to_vec();
    }
    println!(
        "{:14} {:>7} {:>16} {:>8} {:>9} {:>9} {:>8} {:>7}",
        "instance", "limit s", "cost", "bound/c", "to best", "of rr", "rounds", "took s"
    );
    let all = names.len() == ALL.len();
    for &name in &names {
        match (name, build(name)) {
            (_, Some(instance)) => run(&instance, &seconds),
            ("load" | "heldout", None) => {}
            _ => println!("{name}: no such instance"),
        }
    }
    let limit = seconds.iter().copied().fold(0.0, f64::max);
    if all || names.contains(&"load") {
        load_bounds(limit);
    }
    if all || names.contains(&"heldout") {
        held_out(limit);
    }
}

const LOADED: [&str; 6] = ["24x16x8", "32x32x8", "40x64x16", "16x64x8k8", "20x32x6mixed", "58x256x32k8"];

/// What it costs that no rank serves more than 1.15 times round-robin's busiest, in each layer.
fn load_bounds(limit: f64) {
    println!(
        "\nload bound 1.15, {limit} s: cost over free cost; busiest rank over round-robin's, worst layer"
    );
    let only = std::env::var("ONLY").ok();
    let wanted = LOADED.iter().filter(|name| only.as_deref().is_none_or(|only| only == **name));
    for instance in wanted.filter_map(|name| build(name)) {
        let solved = |load_bound| {
            let time_limit = Duration::from_secs_f64(limit);
            let options = SolveOptions { load_bound, time_limit, replicas: false, ..SolveOptions::default() };
            solve(&instance.affinity, &instance.topology, &options, &mut |_| ()).expect("sound")
        };
        let (free, bounded) = (solved(None), solved(Some(1.15)));
        let even = SolveOptions { max_rounds: Some(1), ..SolveOptions::default() };
        let even = solve(&instance.affinity, &instance.topology, &even, &mut |_| ()).expect("sound");
        let ratio = |table: &PlacementTable| {
            let (mine, even) = (busiest(table, &instance), busiest_even(&even, &instance));
            mine.iter().zip(&even).map(|(mine, even)| mine / even).fold(0.0, f64::max)
        };
        println!(
            "{:14} {:.4}   free {:.3}, bounded {:.3}",
            instance.name,
            bounded.cost.unwrap_or(0.0) / free.cost.unwrap_or(1.0),
            ratio(&free),
            ratio(&bounded)
        );
    }
}

/// `[L]` tokens on the busiest rank, by speed.
fn busiest(table: &PlacementTable, instance: &Instance) -> Vec<f64> {
    let load = instance.affinity.load_or_derived();
    let of = |(layer, row): (usize, &Vec<exflow_placement::Rank>)| {
        let mut sums = vec![0.0; table.ranks];
        row.iter().enumerate().for_each(|(e, g)| sums[g.index()] += load[layer * table.experts + e]);
        sums.into_iter().fold(0.0, f64::max)
    };
    table.assignment.iter().enumerate().map(of).collect()
}

/// `[L]` the same of round-robin within the topology's slots.
fn busiest_even(like: &PlacementTable, instance: &Instance) -> Vec<f64> {
    let mut held = vec![0; like.ranks];
    like.assignment[0].iter().for_each(|g| held[g.index()] += 1);
    let mut row = Vec::new();
    while row.len() < like.experts {
        for (g, left) in held.iter_mut().enumerate() {
            if *left > 0 {
                *left -= 1;
                row.push(exflow_placement::Rank::from(g));
            }
        }
    }
    let table = PlacementTable::from_assignment(vec![row; like.layers], like.ranks).expect("sound");
    busiest(&table, instance)
}

/// Cost on unseen tokens of a table solved on 100·E others, over that of a table solved on the unseen ones.
fn held_out(limit: f64) {
    println!(
        "\nprofile of 100·E tokens, {limit} s each: cost on 100,000 others over that of a table solved on those"
    );
    for [layers, experts, ranks] in [[24, 16, 8], [32, 32, 8], [40, 64, 16]] {
        let spec = Generator::new(layers, experts, 1);
        let counted = |tokens, text| {
            Affinity::from_trace(&spec.trace(tokens, 7, text), experts).expect("a generated trace is sound")
        };
        let (profile, unseen) = (counted(100 * experts, 11), counted(100_000, 12));
        let options = SolveOptions { time_limit: Duration::from_secs_f64(limit), ..SolveOptions::default() };
        let solved = |on: &Affinity| {
            solve(on, &Topology::uniform(ranks), &options, &mut |_| ())
                .expect("a generated instance is sound")
        };
        let moves = |table: &PlacementTable| {
            score_affinity(table, &unseen, &Topology::uniform(ranks)).crossings_per_token
        };
        println!("{layers}x{experts}x{ranks:<6} {:.4}", moves(&solved(&profile)) / moves(&solved(&unseen)));
    }
}

fn run(instance: &Instance, seconds: &[f64]) {
    let mut rows = Vec::new();
    for &limit in seconds {
        let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
        let options =
            SolveOptions { seed, time_limit: Duration::from_secs_f64(limit), ..SolveOptions::default() };
        let (mut rounds, start) = (0, std::time::Instant::now());
        let table = solve(&instance.affinity, &instance.topology, &options, &mut |p| rounds = p.rounds);
        let table = table.expect("a generated instance is sound");
        rows.push((
            limit,
            table.cost.unwrap_or(0.0),
            table.lower_bound.unwrap_or(0.0),
            table.baselines["round_robin"],
            rounds,
            start.elapsed(),
        ));
    }
    let known: f64 = std::env::var("BEST").ok().and_then(|b| b.parse().ok()).unwrap_or(f64::INFINITY);
    let best = rows.iter().map(|row| row.1).fold(known, f64::min);
    for (limit, cost, bound, rr, rounds, took) in rows {
        println!(
            "{:14} {limit:>7.2} {cost:>16.0} {:>8.4} {:>9.5} {:>9.4} {rounds:>8} {:>7.2}",
            instance.name,
            bound / cost,
            cost / best,
            cost / rr,
            took.as_secs_f64()
        );
    }
}
