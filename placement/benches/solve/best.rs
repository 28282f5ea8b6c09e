//! The best cost known of each instance: `best_known.txt`, made by long independent runs (`-- best SECONDS RUNS NAME…`).

use crate::bars::{Setting, solved};
use crate::instances::build;

/// `name cost`, a line each; `#` begins a remark only at the start of a line, as it names models elsewhere.
const KNOWN: &str = include_str!("best_known.txt");

/// The best cost known of an instance.
pub fn best_known(name: &str) -> Option<f64> {
    let lines = KNOWN.lines().filter(|line| !line.starts_with('#'));
    let costs = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok()).flatten()
    });
    costs.min_by(f64::total_cmp)
}

/// Runs of their own seeds, each for so long; prints the line that belongs into the file where one finds a better cost.
pub fn search(name: &str, seconds: f64, runs: u64, processor_time: bool) {
    let Some(instance) = build(name) else { return println!("{name}: no such instance") };
    let mut best = best_known(name).unwrap_or(f64::INFINITY);
    for seed in 1000..1000 + runs {
        let (table, ..) = solved(&instance, seconds, Setting { seed, processor_time });
        let cost = table.cost.unwrap_or(f64::INFINITY);
        if cost < best {
            best = cost;
            println!("{name} {cost}");
        }
    }
}
