//! One expert of each layer on a rank, equal links, and a wrap that closes the layers to a ring.
//!
//! Each rank then holds a closed walk, one expert a layer, and the walks share no expert: the tokens that stay are the
//! weight of E disjoint cycles. Choosing these is an assignment problem of L dimensions (NP-hard from three on:
//! Crama & Spieksma 1992), so that a bound takes the place of a solution. Lagrangian relaxation (Held & Karp 1971): let walks share
//! experts, at a price pi for each visit,
//!
//!   stay <= sum_k max over closed walks through expert k of layer 0 [ weight - pi of its experts ] + sum pi,
//!
//! true for any prices; subgradient steps (Polyak 1969) find good ones. They begin at the prices of the assignment problems of the
//! layers' pairs, which gives the sum of their optima, and only improve on that.

use super::Exact;
use super::matching::{heaviest_matching, is_one_expert_each, price};
use crate::cost::Problem;

/// Steps at most.
const STEPS: usize = 600;
/// Steps without a better bound after which they become half as long.
const PATIENCE: usize = 12;
/// Sums of a walk's step that are weighed in a second, about.
const SUMS_A_SECOND: f64 = 5e8;

/// One step of a ring: what stays from each expert of a layer to each of the next.
struct Ring<'p> {
    experts: usize,
    /// `[L]` of `[E, E]`; the last leads back to the first layer.
    weights: Vec<&'p [f64]>,
}

/// A bound on the cost where the problem is of this form; `known` `[L, E]` is a good placement.
pub(super) fn bound(
    problem: &Problem,
    known: &[u16],
    seconds: f64,
    stop: &dyn Fn() -> bool,
) -> Option<Exact> {
    let (l, e) = (problem.layers, problem.experts);
    if l < 2 || problem.ranks != e || !is_one_expert_each(problem) {
        return None;
    }
    let next = |layer: usize| {
        let mut leaving = problem.leaving[layer].iter().map(|&at| &problem.edges[at]);
        leaving.find(|edge| edge.to == (layer + 1) % l).map(|edge| &edge.weight[..])
    };
    let ring = Ring { experts: e, weights: (0..l).map(next).collect::<Option<_>>()? };
    let cost = problem.cost(known);
    let stays = ring.stays(known);
    let steps = (seconds * SUMS_A_SECOND / (l * e * e * e) as f64) as usize;
    let most = ring.most_stays(stays, steps.min(STEPS), stop);
    // What stays is saved at the price of a move; counts that are whole make costs that are whole.
    let bound = cost - price(problem) * (most - stays).max(0.0);
    let whole =
        price(problem).fract() == 0.0 && ring.weights.iter().all(|w| w.iter().all(|n| n.fract() == 0.0));
    let bound = if whole { (bound - 1e-6 * bound.abs().max(1.0).sqrt()).ceil() } else { bound };
    Some(Exact { bound: bound.min(cost), holders: None })
}

impl Ring<'_> {
    /// Weight that stays under `[L, E]` holders.
    fn stays(&self, holders: &[u16]) -> f64 {
        let (l, e) = (self.weights.len(), self.experts);
        let of_layer = |layer: usize| -> f64 {
            let (here, there) = (&holders[layer * e..][..e], &holders[(layer + 1) % l * e..][..e]);
            let kept = |at: &usize| here[at / e] == there[at % e];
            (0..e * e).filter(kept).map(|at| self.weights[layer][at]).sum()
        };
        (0..l).map(of_layer).sum()
    }

    /// The most that can stay, at least `known`.
    fn most_stays(&self, known: f64, steps: usize, stop: &dyn Fn() -> bool) -> f64 {
        let (l, e) = (self.weights.len(), self.experts);
        let matchings: Vec<_> = self.weights.iter().map(|weight| heaviest_matching(weight, e)).collect();
        let mut least: f64 = matchings.iter().map(|m| m.rows.iter().chain(&m.columns).sum::<f64>()).sum();
        // `[L, E]`, the first layer's unused: a walk goes through one given expert of it.
        let mut prices: Vec<f64> = (0..l * e)
            .map(|at| matchings[(at / e + l - 1) % l].columns[at % e] + matchings[at / e].rows[at % e])
            .collect();
        let (mut length, mut idle) = (1.0, 0);
        for _ in 0..steps {
            if stop() || least - known < 1e-9 * least.abs() {
                break;
            }
            let (sum, visits) = self.relaxed(&prices);
            if sum < least {
                (least, idle) = (sum, 0);
            } else {
                idle += 1;
            }
            if idle > PATIENCE {
                (length, idle) = (length / 2.0, 0);
            }
            let excess: f64 = visits[e..].iter().map(|&n| (n - 1.0) * (n - 1.0)).sum();
            if excess == 0.0 {
                break;
            }
            let step = length * (sum - known).max(0.0) / excess;
            prices[e..].iter_mut().zip(&visits[e..]).for_each(|(price, n)| *price += step * (n - 1.0));
        }
        least.max(known)
    }

    /// The relaxation at `prices` `[L, E]`, and how often its walks visit each expert, `[L, E]`.
    fn relaxed(&self, prices: &[f64]) -> (f64, Vec<f64>) {
        let (l, e) = (self.weights.len(), self.experts);
        let mut visits = vec![0.0; l * e];
        let mut sum: f64 = prices[e..].iter().sum();
        let mut from = vec![0u16; l * e];
        for first in 0..e {
            // Of each expert of the layer, the best walk to it.
            let mut best = vec![f64::NEG_INFINITY; e];
            best[first] = 0.0;
            for layer in 0..l - 1 {
                let mut next = vec![f64::NEG_INFINITY; e];
                let came = &mut from[(layer + 1) * e..][..e];
                for (i, (&so_far, row)) in best.iter().zip(self.weights[layer].chunks_exact(e)).enumerate() {
                    if so_far == f64::NEG_INFINITY {
                        continue;
                    }
                    for ((next, came), weight) in next.iter_mut().zip(came.iter_mut()).zip(row) {
                        if so_far + weight > *next {
                            (*next, *came) = (so_far + weight, i as u16);
                        }
                    }
                }
                next.iter_mut().zip(&prices[(layer + 1) * e..]).for_each(|(sum, price)| *sum -= price);
                best = next;
            }
            let closed = |j: &usize| best[*j] + self.weights[l - 1][j * e + first];
            let Some(mut at) = (0..e).max_by(|a, b| closed(a).total_cmp(&closed(b))) else { continue };
            sum += closed(&at);
            for layer in (1..l).rev() {
                visits[layer * e + at] += 1.0;
                at = usize::from(from[layer * e + at]);
            }
            visits[first] += 1.0;
        }
        (sum, visits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::affinity::Affinity;
    use crate::capacity::{Balance, Capacity, Memory};
    use crate::cost::Weights;
    use crate::load::LoadTerm;
    use crate::rng::Rng;
    use crate::topology::Topology;

    /// Every order of 0..n.
    fn orders(n: usize) -> Vec<Vec<u16>> {
        (0..n as u16).fold(vec![vec![]], |orders, new| {
            let insert = |order: &Vec<u16>| -> Vec<Vec<u16>> {
                (0..=order.len()).map(|at| [&order[..at], &[new], &order[at..]].concat()).collect()
            };
            orders.iter().flat_map(insert).collect()
        })
    }

    #[test]
    fn is_never_above_the_optimum_and_often_meets_it() {
        let (layers, experts) = (3, 4);
        let (topology, rows) = (Topology::uniform(experts), orders(experts));
        let capacity = Capacity::new(layers, experts, &topology, Balance::Slots, &Memory::default()).unwrap();
        let (mut rng, mut met) = (Rng::new(3), 0);
        for _ in 0..60 {
            let mut affinity = Affinity::zeros(layers, experts);
            let mut counts = |n: usize| -> Vec<f64> { (0..n).map(|_| rng.below(40) as f64).collect() };
            affinity.transitions = counts(2 * experts * experts);
            affinity.wrap = Some(counts(experts * experts));
            let problem = Problem::new(
                &affinity,
                &topology,
                &Weights::default(),
                capacity.clone(),
                LoadTerm::default(),
            );
            let whole = |middle: &Vec<u16>, last: &Vec<u16>| [&rows[0][..], middle, last].concat();
            let all = rows.iter().flat_map(|middle| rows.iter().map(move |last| whole(middle, last)));
            let best = all.min_by(|a, b| problem.cost(a).total_cmp(&problem.cost(b))).unwrap();
            let optimum = problem.cost(&best);
            // Any placement may be the one that is known; the bound holds all the same.
            let known = if rng.below(2) == 0 { best } else { whole(&rows[1], &rows[2]) };
            let proven = bound(&problem, &known, 1.0, &|| false).unwrap().bound;
            assert!(proven <= optimum, "bound {proven}, optimum {optimum}");
            assert!(proven >= 0.9 * optimum, "bound {proven}, optimum {optimum}");
            met += usize::from(proven == optimum);
        }
        assert!(met >= 40, "met {met} of 60");
    }
}
