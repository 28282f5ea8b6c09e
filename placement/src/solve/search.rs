//! The search of one thread: greedy chains from many starts, swept and re-split pair by pair; then
//! iterated local search from the best, with fresh starts between.

use crate::cost::Problem;
use crate::rng::Rng;
use crate::solve::pair::{Effort, resplit};
use crate::solve::perturb;
use crate::solve::state::State;
use crate::solve::sweep::Sweeper;
use crate::solve::{greedy, grouped};

/// Layers on each side of a perturbation in which pairs of ranks are re-split.
const REACH: usize = 3;
/// A step may worsen the cost by this share and still be taken.
const TOLERANCE: f64 = 2e-4;
/// Steps without a new best after which a walk returns to its best, at most.
const PATIENCE: u64 = 400;
/// Fewer experts than this over all layers: walks also begin afresh.
const SMALL: u64 = 128;

/// A search that can be run a slice at a time.
pub(crate) struct Search<'p> {
    problem: &'p Problem,
    rng: Rng,
    sweeper: Sweeper,
    best: Vec<u16>,
    best_cost: f64,
    walks: Vec<Walk<'p>>,
    turn: usize,
    starts: u64,
    /// Starts where only a rank's total is bounded, last first.
    grouped: Vec<Vec<u16>>,
}

/// Which pairs of ranks are worth another look, by passes.
struct Look<'l> {
    /// `[R, R]` the pass in which a pair was last tried in vain.
    vain: &'l mut [u64],
    /// `[R]` the pass in which a rank last gained or lost an expert.
    changed: &'l mut [u64],
    now: u64,
}

impl Look<'_> {
    fn is_vain(&self, [g, h]: [usize; 2]) -> bool {
        self.vain[g * self.changed.len() + h] > self.changed[g].max(self.changed[h])
    }

    fn seen(&mut self, [g, h]: [usize; 2], changed: Option<Vec<usize>>) {
        match changed {
            Some(ranks) => ranks.into_iter().for_each(|rank| self.changed[rank] = self.now),
            None => self.vain[g * self.changed.len() + h] = self.now,
        }
    }
}

/// An iterated local search under way.
struct Walk<'p> {
    state: State<'p>,
    cost: f64,
    /// Cost of `known`, the cheapest placement on this walk.
    record: f64,
    known: Vec<u16>,
    /// Steps since then.
    idle: u64,
}

impl<'p> Search<'p> {
    /// A search from a known placement.
    pub(crate) fn new(problem: &'p Problem, seed: u64, stream: u64, holders: Vec<u16>) -> Self {
        let best_cost = problem.cost(&holders);
        let (rng, sweeper) = (Rng::fork(seed, stream), Sweeper::new(problem));
        let grouped = if problem.capacity.total.is_some() { grouped::all(problem) } else { Vec::new() };
        Self {
            problem,
            rng,
            sweeper,
            best: holders,
            best_cost,
            walks: Vec::new(),
            turn: 0,
            starts: 0,
            grouped,
        }
    }

    /// The cheapest placement so far, and its cost.
    pub(crate) fn best(&self) -> (&[u16], f64) {
        (&self.best, self.best_cost)
    }

    /// Keeps a placement if it is the cheapest and within the capacity.
    pub(crate) fn offer(&mut self, holders: &[u16]) {
        let cost = self.problem.cost(holders);
        if cost < self.best_cost && self.problem.fits(holders) {
            self.best_cost = cost;
            self.best = holders.to_vec();
        }
    }

    /// A fresh start, improved until neither sweeps nor pairs help.
    pub(crate) fn start(&mut self) {
        if self.problem.capacity.total.is_some() {
            return self.grouped_start();
        }
        let holders = self.fresh();
        self.offer(&holders);
    }

    /// `[L, E]` holders of a fresh start, swept.
    fn fresh(&mut self) -> Vec<u16> {
        let host_first = self.starts % 2 == 1;
        self.starts += 1;
        let at = self.rng.below(self.problem.layers);
        let holders = match host_first.then(|| greedy::host_first(self.problem, at, &mut self.rng)).flatten()
        {
            Some(holders) => holders,
            None => greedy::chain(self.problem, at, &mut self.rng),
        };
        let mut state = State::new(self.problem, holders);
        self.sweeper.settle(&mut state);
        state.holders
    }

    /// The next start where only a rank's total is bounded; nothing once all were tried.
    fn grouped_start(&mut self) {
        if let Some(holders) = self.grouped.pop() {
            let mut state = State::new(self.problem, holders);
            self.sweeper.settle(&mut state);
            self.offer(&state.holders);
        }
    }

    /// Sweeps from the best placement.
    pub(crate) fn settle(&mut self) {
        let mut state = State::new(self.problem, self.best.clone());
        self.sweeper.settle(&mut state);
        self.offer(&state.holders);
    }

    /// A further walk, from a fresh start. Walks take turns; each keeps to its own record until it is the last.
    pub(crate) fn another_walk(&mut self, stop: &dyn Fn() -> bool) {
        if self.problem.capacity.total.is_none() {
            let holders = self.fresh();
            self.walk_from(holders, stop);
        }
    }

    /// Ends all walks but the best `most`.
    pub(crate) fn narrow(&mut self, most: usize) {
        if self.walks.len() > most {
            self.walks.sort_by(|a, b| a.record.total_cmp(&b.record));
            self.walks.truncate(most);
        }
    }

    /// All pairs over all layers from a placement, then a walk from there.
    fn walk_from(&mut self, holders: Vec<u16>, stop: &dyn Fn() -> bool) {
        let mut state = State::new(self.problem, holders);
        self.sweeper.settle(&mut state);
        let every = vec![true; self.problem.ranks];
        for effort in [Effort::Quick, Effort::Exact] {
            // Two ranks that kept their experts since they were last tried in vain need no second look.
            let mut vain = vec![0; self.problem.ranks * self.problem.ranks];
            let mut changed = vec![1; self.problem.ranks];
            for pass in 1.. {
                let mut look = Look { vain: &mut vain, changed: &mut changed, now: pass };
                let improved =
                    self.pairs(&mut state, (0, self.problem.layers), &every, effort, Some(&mut look), stop);
                state.commit();
                if !improved || stop() {
                    break;
                }
            }
        }
        self.offer(&state.holders);
        let (cost, known) = (self.total(&state), state.holders.clone());
        self.walks.push(Walk { state, cost, record: cost, known, idle: 0 });
    }

    /// One step of the next walk: perturb, settle, accept or undo. The first walk begins at the best placement.
    pub(crate) fn step(&mut self, stop: &dyn Fn() -> bool) {
        if self.walks.is_empty() {
            return self.walk_from(self.best.clone(), stop);
        }
        self.turn = (self.turn + 1) % self.walks.len();
        let mut walk = self.walks.swap_remove(self.turn);
        walk.state.commit();
        let before = walk.state.cost;
        let (first, length) = perturb::disturb(&mut walk.state, &mut self.rng);
        self.sweeper.settle(&mut walk.state);
        let (first, length) = self.widen(first, length);
        let mut cost = self.total(&walk.state);
        // Pairs are dear: only where the sweeps alone came close.
        let effort = if self.rng.below(10) == 0 { Effort::Exact } else { Effort::Quick };
        let touched = walk.state.touched_ranks();
        if cost < walk.cost * 1.02
            && self.pairs(&mut walk.state, (first, length), &touched, effort, None, stop)
        {
            cost = self.total(&walk.state);
        }
        if cost <= walk.cost.max(walk.record * (1.0 + TOLERANCE)) {
            walk.cost = cost;
        } else {
            walk.state.undo_to(0);
            walk.state.cost = before;
        }
        self.keep(&mut walk);
        self.walks.push(walk);
        let last = self.walks.len() - 1;
        self.walks.swap(self.turn, last);
    }

    fn keep(&mut self, walk: &mut Walk<'p>) {
        walk.idle += 1;
        if walk.cost < walk.record {
            (walk.record, walk.idle) = (walk.cost, 0);
            walk.known.clone_from(&walk.state.holders);
        }
        if walk.cost < self.best_cost {
            self.offer(&walk.known);
        }
        if walk.idle > self.patience() {
            let alone = self.walks.is_empty();
            let afresh = self.is_small() && alone && self.rng.below(2) == 0;
            let holders = match (afresh, alone) {
                (true, _) => self.fresh(),
                (_, true) => self.best.clone(),
                _ => walk.known.clone(),
            };
            walk.state.replace(holders);
            if afresh && self.rng.below(2) == 0 {
                perturb::deal_anew(&mut walk.state, &mut self.rng);
            }
            self.sweeper.settle(&mut walk.state);
            walk.cost = self.total(&walk.state);
            if afresh {
                (walk.record, walk.known) = (walk.cost, walk.state.holders.clone());
            }
            (walk.record, walk.idle) = (walk.cost.min(walk.record), 0);
        }
    }

    /// Few experts have few ways to be disturbed: those were soon all tried.
    fn patience(&self) -> u64 {
        PATIENCE.min((self.problem.layers * self.problem.experts) as u64)
    }

    /// Where a fresh start is cheaper than waiting for a disturbance that leads out of a local optimum.
    fn is_small(&self) -> bool {
        self.patience() < SMALL && self.problem.capacity.total.is_none()
    }

    fn widen(&self, first: usize, length: usize) -> (usize, usize) {
        let layers = self.problem.layers;
        ((first + layers - REACH.min(layers)) % layers, (length + 2 * REACH).min(layers))
    }

    /// Re-splits all pairs of `among` ranks in a run of layers, in random order, sweeping after each
    /// success. Whether anything improved.
    fn pairs(
        &mut self,
        state: &mut State<'p>,
        (first, length): (usize, usize),
        among: &[bool],
        effort: Effort,
        mut look: Option<&mut Look<'_>>,
        stop: &dyn Fn() -> bool,
    ) -> bool {
        let ranks = self.problem.ranks;
        let mut pairs: Vec<[usize; 2]> =
            (0..ranks).flat_map(|g| (g + 1..ranks).map(move |h| [g, h])).collect();
        pairs.retain(|&[g, h]| among[g] && among[h]);
        self.rng.shuffle(&mut pairs);
        let mut improved = false;
        for pair in pairs {
            if stop() {
                break;
            }
            if look.as_ref().is_some_and(|look| look.is_vain(pair)) {
                continue;
            }
            let (first, length) = self.open_ring(first, length);
            let (mark, before) = (state.mark(), self.total(state));
            let mut better = resplit(state, pair, (first, length), effort, self.sweeper.epsilon());
            if better {
                self.sweeper.settle(state);
                better = self.total(state) < before;
                if !better {
                    state.undo_to(mark);
                }
            }
            improved |= better;
            look.iter_mut().for_each(|look| look.seen(pair, better.then(|| state.ranks_since(mark))));
        }
        improved
    }

    /// A run around the whole ring of layers leaves one out, chosen at random.
    fn open_ring(&mut self, first: usize, length: usize) -> (usize, usize) {
        let layers = self.problem.layers;
        if length < layers || layers < 3 || !self.problem.has_wrap() {
            return (if length == layers { 0 } else { first }, length);
        }
        (self.rng.below(layers), layers - 1)
    }

    fn total(&self, state: &State<'_>) -> f64 {
        state.cost + self.problem.load.cost(&state.holders, self.problem.experts)
    }
}
