//! What the solver promises on each class of instances, and whether it keeps it: distance to the best placement known
//! and share of the cost that the lower bound proves, at each time limit, on one thread.

use crate::best::best_known;
use crate::clock::clock;
use crate::instances::{Instance, build};
use exflow_placement::{PlacementTable, SolveOptions, solve};
use std::time::{Duration, Instant};

/// Limits for one time: most of (cost / best known - 1), least of bound / cost; none where nothing is promised.
#[derive(Debug, Clone, Copy)]
pub struct Promise {
    seconds: f64,
    excess: Option<f64>,
    proof: Option<f64>,
}

const fn promise(seconds: f64, excess: Option<f64>, proof: Option<f64>) -> Promise {
    Promise { seconds, excess, proof }
}

/// Few states, or one expert each: proven optimal.
const EXACT: [Promise; 1] = [promise(0.1, Some(0.0), Some(1.0))];
const MATCHED: [Promise; 1] = [promise(1.0, Some(0.0), Some(1.0))];
const SMALL: [Promise; 2] = [promise(1.0, Some(0.005), Some(0.90)), promise(10.0, Some(0.002), Some(0.94))];
const SMALL_HOSTS: [Promise; 2] =
    [promise(1.0, Some(0.005), Some(0.90)), promise(10.0, Some(0.002), Some(0.92))];
const MIDDLE: [Promise; 2] = [promise(1.0, None, None), promise(10.0, None, Some(0.94))];
const MIDDLE_HOSTS: [Promise; 2] = [promise(1.0, Some(0.01), None), promise(10.0, Some(0.003), Some(0.92))];
const MIXED: [Promise; 2] = [promise(1.0, None, None), promise(10.0, Some(0.005), Some(0.85))];
const LARGE: [Promise; 2] = [promise(10.0, Some(0.001), None), promise(60.0, None, Some(0.92))];

/// Every instance and what is promised for it.
pub const BARS: [(&str, &[Promise]); 18] = [
    ("12x8x4", &EXACT),
    ("12x8x4+wrap", &EXACT),
    ("64x8x4+wrap", &EXACT),
    ("64x8x4k2@2", &EXACT),
    ("24x16x16", &MATCHED),
    ("64x64x64", &MATCHED),
    ("24x16x8", &SMALL),
    ("24x16x8@2", &SMALL_HOSTS),
    ("24x16x8k2+wrap", &SMALL),
    ("32x32x8", &SMALL),
    ("32x32x8+wrap", &SMALL),
    ("32x32x8k2", &SMALL),
    ("16x64x8k8", &MIDDLE),
    ("40x64x16@4", &MIDDLE_HOSTS),
    ("40x64x16+wrap@4", &MIDDLE_HOSTS),
    ("20x32x6@mixed", &MIXED),
    ("20x32x6+wrap@mixed", &MIXED),
    ("58x256x32k8@4", &LARGE),
];

/// How a measurement is run.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub seed: u64,
    pub processor_time: bool,
}

/// One solve on one thread.
pub fn solved(instance: &Instance, seconds: f64, setting: Setting) -> (PlacementTable, u64, f64) {
    let options = SolveOptions {
        seed: setting.seed,
        time_limit: Duration::from_secs_f64(seconds),
        replicas: false,
        clock: clock(setting.processor_time),
        ..SolveOptions::default()
    };
    let (mut rounds, start) = (0, Instant::now());
    let table = solve(&instance.affinity, &instance.topology, &options, &mut |p| rounds = p.rounds)
        .expect("a generated instance is sound");
    (table, rounds, start.elapsed().as_secs_f64())
}

/// Measures `instance` at each of `promises`; how many were kept, and how many there are.
pub fn measure(name: &str, promises: &[Promise], setting: Setting) -> [usize; 2] {
    let Some(instance) = build(name) else {
        println!("{name}: no such instance");
        return [0, 1];
    };
    let (mut kept, mut made) = (0, 0);
    for promise in promises {
        let (table, rounds, took) = solved(&instance, promise.seconds, setting);
        let (cost, bound) = (table.cost.unwrap_or(0.0), table.lower_bound.unwrap_or(0.0));
        let proof = if cost > 0.0 { bound / cost } else { 1.0 };
        // A bound that meets the cost is itself the best there is.
        let best = if proof >= 1.0 { Some(cost) } else { best_known(&instance.name) };
        let excess = best.map(|best| cost / best - 1.0);
        let mut judge = |good: Option<bool>| match good {
            None => "",
            Some(good) => {
                made += 1;
                kept += usize::from(good);
                if good { " ok" } else { " NO" }
            }
        };
        let near = judge(promise.excess.map(|most| excess.is_some_and(|excess| excess <= most + 1e-12)));
        let proven = judge(promise.proof.map(|least| proof >= least));
        let percent =
            |share: Option<f64>| share.map_or("-".into(), |share| format!("{:.3} %", 100.0 * share));
        let least = promise.proof.map_or("-".into(), |least| format!("{least:.2}"));
        println!(
            "{name:20} {:>5} {cost:>12.0} {:>10} {:>9}{near:3} {proof:>8.4} {least:>5}{proven:3} {:>6.1} % {rounds:>7} {took:>6.2}",
            promise.seconds,
            percent(excess),
            percent(promise.excess),
            100.0 * cost / table.baselines["round_robin"].max(f64::MIN_POSITIVE),
        );
    }
    [kept, made]
}

/// The table's head.
pub fn head(setting: Setting) {
    let time = if setting.processor_time { "processor time of the thread" } else { "wall time" };
    println!("one thread, seed {}, {time}; to best: cost over the best known, less one", setting.seed);
    println!(
        "{:20} {:>5} {:>12} {:>10} {:>12} {:>8} {:>8} {:>8} {:>7} {:>6}",
        "instance", "s", "cost", "to best", "at most   ", "bound/c", "least  ", "of rr", "rounds", "took s"
    );
}

/// Promises without limits, for times of one's own.
pub fn at_times(seconds: &[f64]) -> Vec<Promise> {
    seconds.iter().map(|&seconds| promise(seconds, None, None)).collect()
}
