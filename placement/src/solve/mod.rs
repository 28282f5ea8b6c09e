//! From counts to a table: search for a cheap placement, prove how cheap any can be.

mod baseline;
mod bounded;
mod exact;
mod greedy;
mod grouped;
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
use crate::replicas;
use crate::table::PlacementTable;
use crate::topology::Topology;
use search::Search;

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
    let mut run = Run { problem: &problem, options, begin: options.clock.elapsed(), progress };
    let (bound, holders) = run.solve(&baselines)?;
    let cost = problem.cost(&holders);
    let mut table = PlacementTable::from_assignment(to_rows(&holders, problem.experts), problem.ranks)?;
    table.source = None;
    table.objective = Some(options.weights);
    table.seed = Some(options.seed);
    table.cost = Some(cost);
    table.lower_bound = Some(bound.min(cost));
    table.gap = Some(gap(cost, bound));
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

/// One solve under way.
struct Run<'r> {
    problem: &'r Problem,
    options: &'r SolveOptions,
    begin: Duration,
    progress: &'r mut dyn FnMut(SolveProgress),
}

impl Run<'_> {
    /// Bound and `[L, E]` holders.
    fn solve(&mut self, baselines: &[(&'static str, Vec<u16>)]) -> Result<(f64, Vec<u16>), SolveError> {
        let (problem, options) = (self.problem, self.options);
        let Some(start) = self.first_start(baselines) else { return Err(SolveError::NoRoom) };
        let limit = options.time_limit;
        if problem.load.bound.is_empty() {
            return Ok(self.search(baselines, start, limit));
        }
        let (bound, free) = self.search(baselines, start, bounded::first_part(limit));
        let (clock, begin) = (&options.clock, self.begin);
        let elapsed = || clock.elapsed().saturating_sub(begin);
        let rounds = std::cell::Cell::new(0);
        let stop = || {
            rounds.set(rounds.get() + 1);
            elapsed() >= limit || options.max_rounds.is_some_and(|most| rounds.get() >= 8 * most)
        };
        Ok((bound, bounded::within(problem, free, options.seed, &stop)))
    }

    /// A placement within the capacity.
    fn first_start(&self, baselines: &[(&'static str, Vec<u16>)]) -> Option<Vec<u16>> {
        let fitting = baselines.iter().find(|(_, holders)| self.problem.fits(holders));
        fitting.map(|(_, holders)| holders.clone()).or_else(|| grouped::all(self.problem).into_iter().next())
    }

    /// All threads until `limit`: further threads search with streams of their own until the first one, which also
    /// proves, is done.
    fn search(
        &mut self,
        baselines: &[(&'static str, Vec<u16>)],
        start: Vec<u16>,
        limit: Duration,
    ) -> (f64, Vec<u16>) {
        let (problem, options, begin) = (self.problem, self.options, self.begin);
        let stop = || options.clock.elapsed().saturating_sub(begin) >= limit;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let spawn = |stream| {
                scope.spawn({
                    let (over, stop, start) = (&over, &stop, start.clone());
                    move || {
                        search_along(problem, options.seed, stream, start, &|| over.load(Relaxed) || stop())
                    }
                })
            };
            let others: Vec<_> = (1..options.threads as u64).map(spawn).collect();
            let (bound, mut holders, mut cost) = self.search_and_prove(baselines, start.clone(), limit);
            over.store(true, Relaxed);
            for (found, value) in others.into_iter().filter_map(|thread| thread.join().ok()) {
                if value < cost {
                    (holders, cost) = (found, value);
                }
            }
            (bound, holders)
        })
    }

    /// The first thread's part: searching and proving in turn. Returns bound, `[L, E]` holders and their cost.
    fn search_and_prove(
        &mut self,
        baselines: &[(&'static str, Vec<u16>)],
        start: Vec<u16>,
        limit: Duration,
    ) -> (f64, Vec<u16>, f64) {
        let (problem, options, begin) = (self.problem, self.options, self.begin);
        let elapsed = || options.clock.elapsed().saturating_sub(begin);
        let stop = || elapsed() >= limit;
        let mut search = Search::new(problem, options.seed, 0, start);
        baselines.iter().for_each(|(_, holders)| search.offer(holders));
        let mut rounds = 0;
        search.start();
        let exact = options.exact.then(|| solve_exactly(problem, options, &mut search, &stop)).flatten();
        let proven = exact.unwrap_or(0.0);
        if search.best().1 <= proven {
            let (cost, lower_bound) = (search.best().1, proven);
            (self.progress)(SolveProgress { elapsed: elapsed(), cost, lower_bound, rounds });
            return (proven, search.best().0.to_vec(), cost);
        }
        let mut prover = Prover::new(problem, search.best().0);
        let mut proving = Duration::ZERO;
        let done = |rounds| (rounds > 0 && stop()) || options.max_rounds.is_some_and(|most| rounds >= most);
        while !done(rounds) {
            let now = elapsed();
            let share = now.as_secs_f64() / limit.as_secs_f64().max(1e-9);
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
            (self.progress)(SolveProgress { elapsed: elapsed(), cost, lower_bound, rounds });
            if cost <= lower_bound {
                break;
            }
        }
        let (holders, cost) = search.best();
        (prover.bound().max(proven), holders.to_vec(), cost)
    }
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
