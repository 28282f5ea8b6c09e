//! From counts to a table: search for a cheap placement, prove how cheap any can be.

mod assign;
mod baseline;
mod exact;
mod greedy;
mod options;
mod pair;
mod perturb;
mod search;
mod state;
mod sweep;

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

pub use options::{SolveError, SolveOptions, SolveProgress};

use crate::affinity::Affinity;
use crate::bound::Prover;
use crate::capacity::{Balance, Capacity};
use crate::cost::{Problem, to_rows};
use crate::load::LoadTerm;
use crate::table::PlacementTable;
use crate::topology::Topology;
use search::Search;

/// Places L x E experts on the topology's ranks: the cheapest placement found within the time limit, with
/// its cost, a proven lower bound, the gap, and the cost of the baselines.
pub fn solve(
    affinity: &Affinity,
    topology: &Topology,
    options: &SolveOptions,
    progress: &mut dyn FnMut(SolveProgress),
) -> Result<PlacementTable, SolveError> {
    let problem = problem_of(affinity, topology, options)?;
    let begin = options.clock.elapsed();
    let elapsed = || options.clock.elapsed().saturating_sub(begin);
    let stop = || elapsed() >= options.time_limit;
    let load = affinity.load_or_derived();
    let baselines = baseline::all(&problem, &load, options.seed);
    let over = AtomicBool::new(false);
    // Further threads search with streams of their own until the first one, which also proves, is done.
    let (bound, holders, cost) = std::thread::scope(|scope| {
        let start = &baselines[0].1;
        let spawn = |stream| {
            scope.spawn({
                let (problem, over, stop) = (&problem, &over, &stop);
                move || {
                    search_along(problem, options.seed, stream, start.clone(), &|| {
                        over.load(Relaxed) || stop()
                    })
                }
            })
        };
        let others: Vec<_> = (1..options.threads as u64).map(spawn).collect();
        let (bound, mut holders, mut cost) = search_and_prove(&problem, options, &baselines, progress);
        over.store(true, Relaxed);
        for (found, value) in others.into_iter().filter_map(|thread| thread.join().ok()) {
            if value < cost {
                (holders, cost) = (found, value);
            }
        }
        (bound, holders, cost)
    });
    let mut table = PlacementTable::from_assignment(to_rows(&holders, problem.experts), problem.ranks)?;
    table.source = None;
    table.objective = Some(options.weights);
    table.seed = Some(options.seed);
    table.cost = Some(cost);
    table.lower_bound = Some(bound.min(cost));
    table.gap = Some(gap(cost, bound));
    table.baselines =
        baselines.iter().map(|(name, holders)| ((*name).to_owned(), problem.cost(holders))).collect();
    Ok(table)
}

/// Searches until told to stop; `[L, E]` holders and their cost.
fn search_along(
    problem: &Problem,
    seed: u64,
    stream: u64,
    start: Vec<u16>,
    stop: &dyn Fn() -> bool,
) -> (Vec<u16>, f64) {
    let mut search = Search::new(problem, seed, stream, start);
    for round in 0u64.. {
        if stop() {
            break;
        }
        if round < 16 { search.start() } else { search.step(stop) }
    }
    let (holders, cost) = search.best();
    (holders.to_vec(), cost)
}

/// The first thread's part: searching and proving in turn. Returns bound, `[L, E]` holders and their cost.
fn search_and_prove(
    problem: &Problem,
    options: &SolveOptions,
    baselines: &[(&'static str, Vec<u16>)],
    progress: &mut dyn FnMut(SolveProgress),
) -> (f64, Vec<u16>, f64) {
    let begin = options.clock.elapsed();
    let elapsed = || options.clock.elapsed().saturating_sub(begin);
    let stop = || elapsed() >= options.time_limit;
    let mut search = Search::new(problem, options.seed, 0, baselines[0].1.clone());
    baselines.iter().for_each(|(_, holders)| search.offer(holders));
    let mut rounds = 0;
    search.start();
    let exact = options.exact.then(|| solve_exactly(problem, options, &mut search, &stop)).flatten();
    let proven = exact.unwrap_or(0.0);
    if search.best().1 <= proven {
        let (cost, lower_bound) = (search.best().1, proven);
        progress(SolveProgress { elapsed: elapsed(), cost, lower_bound, rounds });
        return (proven, search.best().0.to_vec(), cost);
    }
    let mut prover = Prover::new(problem, search.best().0);
    let mut proving = Duration::ZERO;
    while !done(options, rounds, elapsed()) {
        let now = elapsed();
        let share = now.as_secs_f64() / options.time_limit.as_secs_f64().max(1e-9);
        if prover.can_step() && proving < now.mul_f64(0.4) {
            prover.step(&stop);
            proving += elapsed() - now;
        } else if rounds < 4 && share < 0.3 || rounds < 200 && share < 0.1 {
            search.start();
        } else {
            search.step(&stop);
        }
        rounds += 1;
        let (cost, lower_bound) = (search.best().1, prover.bound().max(proven));
        progress(SolveProgress { elapsed: elapsed(), cost, lower_bound, rounds });
        if cost <= lower_bound {
            break;
        }
    }
    let (holders, cost) = search.best();
    (prover.bound().max(proven), holders.to_vec(), cost)
}

/// Exact dynamic programming where it takes a part of the time: what it proves, and `search` is offered what it finds.
fn solve_exactly(
    problem: &Problem,
    options: &SolveOptions,
    search: &mut Search<'_>,
    stop: &dyn Fn() -> bool,
) -> Option<f64> {
    // A ring is searched under the best placement known: a better one saves more than it takes to find.
    for round in 0..12 {
        if round < 4 { search.start() } else { search.step(stop) }
    }
    let seconds = 0.9 * options.time_limit.as_secs_f64();
    let exact = exact::solve(problem, search.best().0, seconds, stop)?;
    exact.holders.iter().for_each(|holders| search.offer(holders));
    Some(exact.bound)
}

/// `1 - bound / cost`, between 0 and 1.
fn gap(cost: f64, bound: f64) -> f64 {
    if cost > 0.0 { (1.0 - bound / cost).clamp(0.0, 1.0) } else { 0.0 }
}

fn done(options: &SolveOptions, rounds: u64, elapsed: Duration) -> bool {
    (rounds > 0 && elapsed >= options.time_limit) || options.max_rounds.is_some_and(|most| rounds >= most)
}

fn problem_of(
    affinity: &Affinity,
    topology: &Topology,
    options: &SolveOptions,
) -> Result<Problem, SolveError> {
    affinity.check()?;
    topology.check()?;
    options.check()?;
    if options.balance == Balance::Total {
        return Err(SolveError::BalanceTotal);
    }
    let (l, e) = (affinity.layers, affinity.experts);
    let capacity = Capacity::new(l, e, topology, options.balance, &options.memory)?;
    let speeds: Vec<f64> = topology.ranks.iter().map(|rank| rank.speed).collect();
    let load = LoadTerm::new(affinity.load_or_derived(), &speeds, options.weights.load);
    Ok(Problem::new(affinity, topology, &options.weights, capacity, load))
}
