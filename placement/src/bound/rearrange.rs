//! The bound at once: each expert's row of counts meets the ranks in the cheapest order.
//!
//! Let expert i sit on rank g. The experts j of the other layer fill at most `most[h]` slots of each rank h,
//! so Σ_j W[i][j]·D[g][rank of j] is at least the largest counts times the smallest costs (rearrangement
//! inequality); the least over g holds for any g. Rows and columns each give a sound sum; the larger counts.
//! For equal links this is "all but the c largest of each row", c the largest capacity.

use crate::cost::{Edge, Problem};

/// A lower bound on `Problem::pair_cost`, in the same units. O(L E R (E + R log R)).
pub(crate) fn rearrangement(problem: &Problem) -> f64 {
    problem.edges.iter().map(|edge| edge_bound(problem, edge)).sum()
}

/// The bound of one edge.
pub(crate) fn edge_bound(problem: &Problem, edge: &Edge) -> f64 {
    let r = problem.ranks;
    // A layer's own pairs leave one slot less on the expert's rank, as it holds the expert itself.
    let own = usize::from(edge.from == edge.to);
    let forward = prices(problem, own, |g, h| problem.dist[g * r + h]);
    let backward = prices(problem, own, |g, h| problem.dist[h * r + g]);
    let rows = |counts: &[f64], prices: &[Vec<f64>]| -> f64 {
        counts.chunks_exact(problem.experts).map(|row| row_bound(row, prices)).sum()
    };
    rows(&edge.weight, &forward).max(rows(&edge.transposed, &backward))
}

/// For each rank g that may hold an expert: the cost of every slot seen from g, ascending, the first E.
fn prices(problem: &Problem, own: usize, dist: impl Fn(usize, usize) -> f64) -> Vec<Vec<f64>> {
    let most = &problem.capacity.most;
    let seen_from = |g: usize| {
        let slots = |h: usize| most[h].min(problem.experts) - usize::from(h == g) * own;
        let mut costs: Vec<f64> =
            (0..problem.ranks).flat_map(|h| std::iter::repeat_n(dist(g, h), slots(h))).collect();
        costs.sort_by(f64::total_cmp);
        costs.truncate(problem.experts);
        costs
    };
    (0..problem.ranks).filter(|&g| most[g] > 0).map(seen_from).collect()
}

fn row_bound(row: &[f64], prices: &[Vec<f64>]) -> f64 {
    let mut falling = row.to_vec();
    falling.sort_by(|a, b| b.total_cmp(a));
    let from = |costs: &Vec<f64>| falling.iter().zip(costs).map(|(count, cost)| count * cost).sum();
    prices.iter().map(from).fold(f64::INFINITY, f64::min).min(f64::MAX)
}
