//! The search of one thread: greedy chains from many starts, each swept until no layer improves.

use crate::cost::Problem;
use crate::rng::Rng;
use crate::solve::greedy;
use crate::solve::state::State;
use crate::solve::sweep::Sweeper;

/// A search that can be run a slice at a time.
pub(crate) struct Search<'p> {
    problem: &'p Problem,
    rng: Rng,
    sweeper: Sweeper,
    best: Vec<u16>,
    best_cost: f64,
}

impl<'p> Search<'p> {
    /// A search from a known placement.
    pub(crate) fn new(problem: &'p Problem, seed: u64, stream: u64, holders: Vec<u16>) -> Self {
        let best_cost = problem.cost(&holders);
        Self {
            problem,
            rng: Rng::fork(seed, stream),
            sweeper: Sweeper::new(problem),
            best: holders,
            best_cost,
        }
    }

    /// The cheapest placement so far, and its cost.
    pub(crate) fn best(&self) -> (&[u16], f64) {
        (&self.best, self.best_cost)
    }

    /// One start.
    pub(crate) fn round(&mut self) {
        let start = self.rng.below(self.problem.layers);
        let holders = greedy::chain(self.problem, start, &mut self.rng);
        let mut state = State::new(self.problem, holders);
        self.sweeper.settle(&mut state);
        self.offer(state.holders);
    }

    /// Keeps a placement if it is the cheapest.
    pub(crate) fn offer(&mut self, holders: Vec<u16>) {
        let cost = self.problem.cost(&holders);
        if cost < self.best_cost {
            self.best_cost = cost;
            self.best = holders;
        }
    }
}
