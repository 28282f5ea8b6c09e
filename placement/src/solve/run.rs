//! One solve under way: the first thread searches and proves in turn, further threads search beside it.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::bound::Prover;
use crate::cost::Problem;
use crate::solve::history::History;
use crate::solve::search::Search;
use crate::solve::{SolveError, SolveOptions, SolveProgress, bounded, exact, grouped};
use crate::table::Moment;

/// Walks at once, at most.
const MOST_WALKS: usize = 4;
/// Share of the time that beginning further walks may take.
const FURTHER: f64 = 0.08;
/// From this share of the time on, only so many walks go on.
const NARROWING: [(f64, usize); 2] = [(0.2, 2), (0.35, 1)];

/// Placements that know nothing of affinity, by name.
type Baselines = [(&'static str, Vec<u16>)];

/// Share of the time so far that proving may have taken, until the bound is [`CLOSE`] to the cost, and from then on.
const PROVING: [f64; 2] = [0.4, 0.15];
/// The same where time is too short for the bound to come near the cost.
const PROVING_IN_VAIN: f64 = 0.1;
/// Entries of the bound's matrices that a second is enough for, about (measured on a desktop core).
const ENTRIES_A_SECOND: f64 = 2.6e5;
/// A bound above this share of the cost rises slowly: searching is the better use of most of the time.
const CLOSE: f64 = 0.95;

/// One solve under way.
pub(crate) struct Run<'r> {
    problem: &'r Problem,
    options: &'r SolveOptions,
    begin: Duration,
    progress: &'r mut dyn FnMut(SolveProgress),
    history: History,
}

/// The cheapest placement of all threads.
struct Pool(Mutex<(f64, Vec<u16>)>);

impl Pool {
    fn offer(&self, holders: &[u16], cost: f64) {
        let mut best = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if cost < best.0 {
            *best = (cost, holders.to_vec());
        }
    }

    fn cost(&self) -> f64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    fn into_best(self) -> (f64, Vec<u16>) {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'r> Run<'r> {
    /// A solve that begins now.
    pub(crate) fn new(
        problem: &'r Problem,
        options: &'r SolveOptions,
        progress: &'r mut dyn FnMut(SolveProgress),
    ) -> Self {
        Self { problem, options, begin: options.clock.elapsed(), progress, history: History::default() }
    }

    /// Bound, `[L, E]` holders, and how cost and bound came about.
    pub(crate) fn solve(mut self, baselines: &Baselines) -> Result<(f64, Vec<u16>, Vec<Moment>), SolveError> {
        let Some(start) = self.first_start(baselines) else { return Err(SolveError::NoRoom) };
        let limit = self.options.time_limit;
        let (bound, holders) = if self.problem.load.bound.is_empty() {
            self.search(baselines, start, limit)
        } else {
            let (bound, free) = self.search(baselines, start, bounded::first_part(limit));
            (bound, self.within_load_bounds(bound, free))
        };
        let cost = self.problem.cost(&holders);
        self.history.push(self.elapsed(), cost, bound.min(cost));
        Ok((bound, holders, self.history.finish()))
    }

    fn elapsed(&self) -> Duration {
        self.options.clock.elapsed().saturating_sub(self.begin)
    }

    fn tell(&mut self, cost: f64, lower_bound: f64, rounds: u64) {
        let elapsed = self.elapsed();
        self.history.push(elapsed, cost, lower_bound);
        (self.progress)(SolveProgress { elapsed, cost, lower_bound, rounds });
    }

    /// A placement within the capacity.
    fn first_start(&self, baselines: &Baselines) -> Option<Vec<u16>> {
        let fitting = baselines.iter().find(|(_, holders)| self.problem.fits(holders));
        fitting.map(|(_, holders)| holders.clone()).or_else(|| grouped::all(self.problem).into_iter().next())
    }

    /// From the cheapest placement without bounds on load to one within them.
    fn within_load_bounds(&mut self, bound: f64, free: Vec<u16>) -> Vec<u16> {
        let (problem, options, begin) = (self.problem, self.options, self.begin);
        let rounds = std::cell::Cell::new(0);
        let stop = || {
            rounds.set(rounds.get() + 1);
            options.clock.elapsed().saturating_sub(begin) >= options.time_limit
                || options.max_rounds.is_some_and(|most| rounds.get() >= 8 * most)
        };
        // What was cheaper than any placement within the bounds is no part of how this one came about.
        self.history = History::default();
        bounded::within(problem, free, options.seed, &stop, &mut |cost| self.tell(cost, bound, rounds.get()))
    }

    /// All threads until `limit`: further threads search with streams of their own until the first one, which also
    /// proves, is done.
    fn search(&mut self, baselines: &Baselines, start: Vec<u16>, limit: Duration) -> (f64, Vec<u16>) {
        let (problem, options, begin) = (self.problem, self.options, self.begin);
        let stop = || options.clock.elapsed().saturating_sub(begin) >= limit;
        let over = AtomicBool::new(false);
        let pool = Pool(Mutex::new((problem.cost(&start), start.clone())));
        let bound = std::thread::scope(|scope| {
            for stream in 1..options.threads as u64 {
                let (over, stop, pool, start) = (&over, &stop, &pool, start.clone());
                scope.spawn(move || {
                    let stop = || over.load(Relaxed) || stop();
                    search_along(Search::new(problem, options.seed, stream, start), pool, &stop);
                });
            }
            let bound = self.search_and_prove(baselines, start.clone(), limit, &pool);
            over.store(true, Relaxed);
            bound
        });
        (bound, pool.into_best().1)
    }

    /// The first thread's part: searching and proving in turn. Returns the bound.
    fn search_and_prove(
        &mut self,
        baselines: &Baselines,
        start: Vec<u16>,
        limit: Duration,
        pool: &Pool,
    ) -> f64 {
        let (problem, options, begin) = (self.problem, self.options, self.begin);
        let elapsed = || options.clock.elapsed().saturating_sub(begin);
        let stop = || elapsed() >= limit;
        let mut search = Search::new(problem, options.seed, 0, start);
        baselines.iter().for_each(|(_, holders)| search.offer(holders));
        let mut rounds = 0;
        search.start();
        let exact = options.exact.then(|| solve_exactly(problem, options, &mut search, &stop)).flatten();
        let proven = exact.unwrap_or(0.0);
        pool.offer(search.best().0, search.best().1);
        if search.best().1 <= proven {
            self.tell(search.best().1, proven, rounds);
            return proven;
        }
        let mut prover = Prover::new(problem, search.best().0, longest_step(limit.as_secs_f64()));
        let mut proving = Duration::ZERO;
        let done = |rounds| (rounds > 0 && stop()) || options.max_rounds.is_some_and(|most| rounds >= most);
        let mut walking = false;
        let entries = problem.layers as f64 * (2.0 * problem.experts as f64).powi(2);
        let in_vain = limit.as_secs_f64() * ENTRIES_A_SECOND < entries;
        while !done(rounds) {
            let now = elapsed();
            let seconds = limit.as_secs_f64().max(1e-9);
            // A number of rounds in place of a time: nothing then depends on the clock.
            let share = match options.max_rounds {
                Some(most) => rounds as f64 / most.max(1) as f64,
                None => now.as_secs_f64() / seconds,
            };
            let close = prover.bound().max(proven) >= CLOSE * search.best().1;
            let due = match options.max_rounds {
                Some(_) => rounds % 3 == 2,
                None => {
                    proving < now.mul_f64(if in_vain { PROVING_IN_VAIN } else { PROVING[usize::from(close)] })
                }
            };
            if prover.can_step() && due {
                prover.step(&stop);
                proving += elapsed() - now;
            } else if rounds < 4 && share < 0.3 || rounds < 200 && share < 0.1 {
                search.start();
            } else if walking {
                NARROWING.iter().filter(|(from, _)| share > *from).for_each(|(_, most)| search.narrow(*most));
                search.step(&stop);
            } else {
                search.step(&stop);
                walking = true;
                let took = (elapsed() - now).as_secs_f64() / seconds;
                let more = if options.max_rounds.is_some() { 0 } else { (FURTHER / took.max(1e-9)) as usize };
                (0..more.min(MOST_WALKS - 1)).for_each(|_| search.another_walk(&stop));
            }
            rounds += 1;
            pool.offer(search.best().0, search.best().1);
            let (cost, lower_bound) = (pool.cost(), prover.bound().max(proven));
            self.tell(cost, lower_bound, rounds);
            if cost <= lower_bound {
                break;
            }
        }
        prover.bound().max(proven)
    }
}

/// Seconds that one step of the prover may take, all its parts together: a quarter of a short limit, which is better
/// spent on searching, and up to all of a minute.
fn longest_step(limit: f64) -> f64 {
    limit * (limit / 60.0).clamp(0.25, 1.0)
}

/// Searches until told to stop.
fn search_along(mut search: Search<'_>, pool: &Pool, stop: &dyn Fn() -> bool) {
    for round in 0u64.. {
        if stop() {
            break;
        }
        if round < 16 {
            search.start()
        } else {
            search.step(stop)
        }
        pool.offer(search.best().0, search.best().1);
    }
}

/// Exact dynamic programming where it takes a part of the time: what it proves, and `search` is offered what it finds.
fn solve_exactly(
    problem: &Problem,
    options: &SolveOptions,
    search: &mut Search<'_>,
    stop: &dyn Fn() -> bool,
) -> Option<f64> {
    // A ring is searched under the best placement known: a better one saves more than it takes to find.
    if problem.has_wrap() {
        (0..3).for_each(|_| search.start());
    }
    let seconds = 0.9 * options.time_limit.as_secs_f64();
    let exact = exact::solve(problem, search.best().0, seconds, stop)?;
    exact.holders.iter().for_each(|holders| search.offer(holders));
    Some(exact.bound)
}
