//! Placements whose busiest ranks are bounded: tokens above the bound are given a price, which rises until there are
//! none (the penalty method); what is still above then takes round-robin's holders, for which the bound is made.

use std::time::Duration;

use crate::cost::Problem;
use crate::solve::baseline;
use crate::solve::search::Search;

/// The price rises by this factor while a rank is above its bound.
const RISE: f64 = 2.0;
/// Times that it may rise.
const RISES: u32 = 24;

/// Most tokens that a rank may serve: `factor` times round-robin's busiest rank, `[L]` (`[1]` over all layers).
pub(crate) fn bounds(problem: &Problem, factor: f64) -> Vec<f64> {
    let row = baseline::round_robin(problem);
    let holders = row.repeat(problem.layers);
    let layers = if problem.load.over_all { 1 } else { problem.layers };
    let busiest =
        |layer| problem.load.sums(layer, &holders, problem.experts).into_iter().fold(0.0f64, f64::max);
    (0..layers).map(|layer| factor * busiest(layer)).collect()
}

/// The cheapest placement found within the load's bounds, beginning with `holders` `[L, E]`; each cost goes to `tell`.
pub(crate) fn within(
    problem: &Problem,
    holders: Vec<u16>,
    seed: u64,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(f64),
) -> Vec<u16> {
    let tokens: f64 = problem.load.load.iter().sum::<f64>().max(1.0);
    let mut priced = problem.clone();
    priced.load.price = 0.25 * problem.pair_cost(&holders).max(1.0) / tokens;
    let excess = |holders: &[u16]| problem.load.excess(holders, problem.experts);
    let within_bounds = |holders: &[u16]| excess(holders) <= 1e-9 * tokens;
    let mut here = holders;
    for _ in 0..RISES {
        let mut search = Search::new(&priced, seed, 1000, here.clone());
        search.settle();
        here = search.best().0.to_vec();
        if within_bounds(&here) || stop() {
            break;
        }
        priced.load.price *= RISE;
    }
    if !within_bounds(&here) {
        here = with_round_robin(problem, here);
    }
    // The price is enough now: the rest of the time goes to what is cheaper at it.
    let (mut best, mut cost) = (here.clone(), problem.cost(&here));
    tell(cost);
    let mut search = Search::new(&priced, seed, 1000, here);
    while !stop() {
        search.step(stop);
        let found = search.best().0;
        if problem.cost(found) < cost && within_bounds(found) {
            (best, cost) = (found.to_vec(), problem.cost(found));
            tell(cost);
        }
    }
    best
}

/// Layers with a rank above its bound take round-robin's holders.
fn with_round_robin(problem: &Problem, mut holders: Vec<u16>) -> Vec<u16> {
    let (e, row) = (problem.experts, baseline::round_robin(problem));
    if problem.load.over_all {
        return holders;
    }
    for (layer, row_of_layer) in holders.chunks_exact_mut(e).enumerate() {
        let sums = problem.load.of_layer(layer, row_of_layer);
        if sums.iter().any(|&sum| sum > problem.load.bound[layer] * (1.0 + 1e-9)) {
            row_of_layer.copy_from_slice(&row);
        }
    }
    holders
}

/// Part of the time that the first, unbounded search gets.
pub(crate) fn first_part(limit: Duration) -> Duration {
    limit.mul_f64(0.4)
}
