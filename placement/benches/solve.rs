//! `cargo bench -p exflow-placement [-- NAME… SECONDS…]`: cost, bound and gap of each instance at each
//! time limit, on one thread, as a table.
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::time::Duration;

use exflow_placement::{Affinity, Generator, SolveOptions, Topology, solve};

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
    for name in names {
        match build(name) {
            Some(instance) => run(&instance, &seconds),
            None => println!("{name}: no such instance"),
        }
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
