//! What it costs that no rank serves more than 1.15 times round-robin's busiest, in each layer.

use crate::clock::clock;
use crate::instances::{Instance, build};
use exflow_placement::{PlacementTable, Rank, SolveOptions, solve};
use std::time::Duration;

/// The bound, and the most that it may cost.
const FACTOR: f64 = 1.15;
const DEAREST: f64 = 1.03;

const LOADED: [&str; 7] =
    ["24x16x8", "24x16x8@2", "32x32x8", "40x64x16@4", "16x64x8k8", "20x32x6@mixed", "58x256x32k8@4"];

/// Prints a line for each instance.
pub fn measure(seconds: f64, processor_time: bool) -> [usize; 2] {
    println!(
        "\nload at most {FACTOR} x round-robin's in each layer, {seconds} s: cost over free cost (at most {DEAREST})"
    );
    let mut kept = 0;
    for name in LOADED {
        let Some(instance) = build(name) else { continue };
        let solved = |load_bound| {
            let options = SolveOptions {
                load_bound,
                time_limit: Duration::from_secs_f64(seconds),
                replicas: false,
                clock: clock(processor_time),
                ..SolveOptions::default()
            };
            solve(&instance.affinity, &instance.topology, &options, &mut |_| ()).expect("sound")
        };
        let (free, bounded) = (solved(None), solved(Some(FACTOR)));
        let even = busiest_of_round_robin(&instance);
        let worst = |table: &PlacementTable| {
            busiest(table, &instance).iter().zip(&even).map(|(mine, even)| mine / even).fold(0.0, f64::max)
        };
        let price = bounded.cost.unwrap_or(f64::INFINITY) / free.cost.unwrap_or(1.0);
        let good = price <= DEAREST && worst(&bounded) <= FACTOR + 1e-9;
        kept += usize::from(good);
        println!(
            "{name:20} {price:.4} {}   busiest rank over round-robin's, worst layer: free {:.3}, bounded {:.3}",
            if good { "ok" } else { "NO" },
            worst(&free),
            worst(&bounded)
        );
    }
    [kept, LOADED.len()]
}

/// `[L]` tokens on the busiest rank.
fn busiest(table: &PlacementTable, instance: &Instance) -> Vec<f64> {
    let load = instance.affinity.load_or_derived();
    let of = |(layer, row): (usize, &Vec<Rank>)| {
        let mut sums = vec![0.0; table.ranks];
        row.iter().enumerate().for_each(|(e, g)| sums[g.index()] += load[layer * table.experts + e]);
        sums.into_iter().fold(0.0, f64::max)
    };
    table.assignment.iter().enumerate().map(of).collect()
}

/// `[L]` the same of round-robin within the topology's slots.
fn busiest_of_round_robin(instance: &Instance) -> Vec<f64> {
    let (_, table) =
        exflow_placement::baselines(&instance.affinity, &instance.topology, &SolveOptions::default())
            .expect("sound")
            .into_iter()
            .find(|(name, _)| *name == "round_robin")
            .expect("a baseline");
    busiest(&table, instance)
}
