//! Exact solutions where there are few states: Viterbi's algorithm along the layers (Viterbi 1967).
//!
//! A state is one way to spread a layer's experts over the ranks. The chain of layers is solved backwards,
//!
//!   B_l(s) = u_l(s) + min_t [ cost_l(s, t) + B_{l+1}(t) ],
//!
//! u_l what a layer costs by itself (co-activation, load). Ranks that can be renamed without anything changing make
//! states equal, so that B is kept per orbit only. The wrap closes the chain to a ring: with the last layer's
//! successor left free, B_0(s) is a lower bound for every ring that begins with s; the rings are then searched in
//! the order of that bound, and a state is dropped as soon as its way so far plus B reaches the best ring known.

mod chain;
mod cycles;
mod matching;
mod ring;
mod states;

use crate::cost::Problem;
use chain::Chain;
use states::States;

/// What is known after an exact solve, or of a bound that comes near one.
pub(crate) struct Exact {
    /// No placement costs less.
    pub(crate) bound: f64,
    /// `[L, E]` holders of a cheapest placement; none where time ran out or the one given was already cheapest.
    pub(crate) holders: Option<Vec<u16>>,
}

/// Pairs of states that are weighed in a second, about (measured on a desktop core).
const PAIRS_A_SECOND: f64 = 6e8;

/// Solves the problem exactly if that takes less than `seconds`, about; `known` `[L, E]` is a good placement. None where
/// there are too many states or `stop` said so before anything was proven.
pub(crate) fn solve(
    problem: &Problem,
    known: &[u16],
    seconds: f64,
    stop: &dyn Fn() -> bool,
) -> Option<Exact> {
    if problem.capacity.total.is_some() {
        return None;
    }
    if let Some(holders) = matching::one_expert_each(problem) {
        return Some(Exact { bound: problem.cost(&holders), holders: Some(holders) });
    }
    let few = |states: &States| {
        let pairs = states.orbits() as f64 * states.len() as f64 * problem.layers as f64;
        pairs <= seconds * PAIRS_A_SECOND
    };
    match States::new(problem).filter(few) {
        Some(states) => Chain::new(problem, states, stop)?.solve(known, stop),
        None => cycles::bound(problem, known, seconds, stop),
    }
}
