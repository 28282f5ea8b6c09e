//! From counts to a table: search for a cheap placement, prove how cheap any can be.

mod baseline;
mod bounded;
mod exact;
mod greedy;
mod grouped;
mod history;
mod options;
mod pair;
mod perturb;
mod run;
mod search;
mod state;
mod sweep;

pub use options::{SolveError, SolveOptions, SolveProgress};

use crate::affinity::Affinity;
use crate::capacity::{Balance, Capacity};
use crate::cost::{Problem, to_rows};
use crate::load::LoadTerm;
use crate::replicas;
use crate::table::PlacementTable;
use crate::topology::Topology;
use run::Run;

/// A rank's load over all layers where layers may be left off ranks, over round-robin's, if nothing else is said:
/// without a bound everything would go to the ranks with most memory.
const LOAD_OVER_ALL: f64 = 1.15;

/// Places L x E experts on the topology's ranks: the cheapest placement found within the time limit, with
/// its cost, a proven lower bound, the gap, and the cost of the baselines. Slots that are left over take copies.
pub fn solve(
    affinity: &Affinity,
    topology: &Topology,
    options: &SolveOptions,
    progress: &mut dyn FnMut(SolveProgress),
) -> Result<PlacementTable, SolveError> {
    let problem = problem_of(affinity, topology, options)?;
    let baselines = baseline::all(&problem, &affinity.load_or_derived(), options.seed);
    let (bound, holders, history) = Run::new(&problem, options, progress).solve(&baselines)?;
    let cost = problem.cost(&holders);
    let mut table = PlacementTable::from_assignment(to_rows(&holders, problem.experts), problem.ranks)?;
    table.source = None;
    table.objective = Some(options.weights);
    table.seed = Some(options.seed);
    table.cost = Some(cost);
    table.lower_bound = Some(bound.min(cost));
    table.gap = Some(gap(cost, bound));
    table.history = history;
    table.baselines =
        baselines.iter().map(|(name, holders)| ((*name).to_owned(), problem.cost(holders))).collect();
    if options.replicas {
        let copies = replicas::choose(&table, affinity, topology, &options.weights, &problem.capacity);
        table.set_replicas(copies);
        if !table.replicas.is_empty() {
            table.cost_with_replicas =
                Some(replicas::predicted_cost(&table, affinity, topology, &options.weights));
        }
    }
    table.look_ahead(affinity);
    Ok(table)
}

/// Placements that know nothing of affinity, by name: `linear`, `round_robin`, `random`, and `load_only`, which levels
/// load as expert-parallel engines' balancers do.
pub fn baselines(
    affinity: &Affinity,
    topology: &Topology,
    options: &SolveOptions,
) -> Result<Vec<(&'static str, PlacementTable)>, SolveError> {
    let problem = problem_of(affinity, topology, options)?;
    let all = baseline::all(&problem, &affinity.load_or_derived(), options.seed).into_iter();
    let table = |(name, holders): (&'static str, Vec<u16>)| {
        let rows = to_rows(&holders, problem.experts);
        Ok((name, PlacementTable::from_assignment(rows, problem.ranks)?))
    };
    all.map(table).collect()
}

/// `1 - bound / cost`, between 0 and 1.
fn gap(cost: f64, bound: f64) -> f64 {
    if cost > 0.0 { (1.0 - bound / cost).clamp(0.0, 1.0) } else { 0.0 }
}

fn problem_of(
    affinity: &Affinity,
    topology: &Topology,
    options: &SolveOptions,
) -> Result<Problem, SolveError> {
    affinity.check()?;
    topology.check()?;
    options.check()?;
    let (l, e) = (affinity.layers, affinity.experts);
    let capacity = Capacity::new(l, e, topology, options.balance, &options.memory)?;
    let speeds: Vec<f64> = topology.ranks.iter().map(|rank| rank.speed).collect();
    let mut load = LoadTerm::new(affinity.load_or_derived(), &speeds, options.weights.load);
    load.over_all = options.balance == Balance::Total;
    let factor = options.load_bound.or(load.over_all.then_some(LOAD_OVER_ALL));
    let mut problem = Problem::new(affinity, topology, &options.weights, capacity, load);
    problem.load.bound = factor.map_or_else(Vec::new, |factor| bounded::bounds(&problem, factor));
    Ok(problem)
}
