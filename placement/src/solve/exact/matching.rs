//! One expert of each layer on a rank, equal links: ranks can be named after the first layer's experts, every
//! further layer after the one before it, so that each pair of layers is an assignment problem by itself.

use crate::cost::Problem;

/// Whether a problem is of this form.
pub(super) fn is_one_expert_each(problem: &Problem) -> bool {
    let r = problem.ranks;
    let equal = (0..r * r).all(|at| at / r == at % r || problem.dist[at] == price(problem));
    let single = problem.capacity.most.iter().all(|&most| most == 1);
    let load_counts = problem.load.is_active() && problem.load.slowness.windows(2).any(|s| s[0] != s[1]);
    equal && single && r >= problem.experts && !load_counts
}

/// What a move costs where all links are equal.
pub(super) fn price(problem: &Problem) -> f64 {
    problem.dist.get(1).copied().unwrap_or(0.0)
}

/// `[L, E]` holders of a cheapest placement, where the problem is of this form and the layers form a chain.
pub(crate) fn one_expert_each(problem: &Problem) -> Option<Vec<u16>> {
    let (l, e) = (problem.layers, problem.experts);
    if !is_one_expert_each(problem) || problem.has_wrap() {
        return None;
    }
    let mut holders: Vec<u16> = (0..e as u16).collect();
    for layer in 0..l - 1 {
        let edge = problem.leaving[layer].iter().map(|&at| &problem.edges[at]).find(|e| e.to == layer + 1);
        let partner =
            edge.map_or_else(|| (0..e).collect(), |edge| heaviest_matching(&edge.weight, e).partner);
        let before = holders[layer * e..].to_vec();
        let mut row = vec![0u16; e];
        partner.iter().enumerate().for_each(|(i, &j)| row[j] = before[i]);
        holders.extend(row);
    }
    Some(holders)
}

/// A permutation of most weight, and the prices that prove it: `weight[i][j] <= rows[i] + columns[j]`, with equality
/// where i is matched to j.
pub(super) struct Matching {
    /// `[n]` the column of each row.
    pub(super) partner: Vec<usize>,
    /// `[n]`
    pub(super) rows: Vec<f64>,
    /// `[n]`
    pub(super) columns: Vec<f64>,
}

/// The permutation of most weight: shortest augmenting paths with potentials (Kuhn and Munkres; the form of
/// Jonker and Volgenant 1987). O(n³).
pub(super) fn heaviest_matching(weight: &[f64], n: usize) -> Matching {
    // Rows 1..=n, columns 1..=n; column 0 is where an augmenting path begins.
    let (mut u, mut v) = (vec![0.0; n + 1], vec![0.0; n + 1]);
    let mut row_of = vec![0usize; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        let (mut column, mut way) = (0, vec![0usize; n + 1]);
        let (mut slack, mut done) = (vec![f64::INFINITY; n + 1], vec![false; n + 1]);
        while row_of[column] != 0 {
            done[column] = true;
            let i = row_of[column];
            let (mut least, mut next) = (f64::INFINITY, 0);
            for j in (1..=n).filter(|&j| !done[j]) {
                let reduced = -weight[(i - 1) * n + j - 1] - u[i] - v[j];
                if reduced < slack[j] {
                    (slack[j], way[j]) = (reduced, column);
                }
                if slack[j] < least {
                    (least, next) = (slack[j], j);
                }
            }
            for j in 0..=n {
                if done[j] {
                    u[row_of[j]] += least;
                    v[j] -= least;
                } else {
                    slack[j] -= least;
                }
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[way[column]];
            column = way[column];
        }
    }
    let mut partner = vec![0; n];
    (1..=n).for_each(|j| partner[row_of[j] - 1] = j - 1);
    let negative = |prices: &[f64]| prices[1..].iter().map(|price| -price).collect();
    Matching { partner, rows: negative(&u), columns: negative(&v) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn brute(weight: &[f64], n: usize, row: usize, used: &mut Vec<bool>) -> f64 {
        if row == n {
            return 0.0;
        }
        let mut best = f64::NEG_INFINITY;
        for column in 0..n {
            if !std::mem::replace(&mut used[column], true) {
                best = best.max(weight[row * n + column] + brute(weight, n, row + 1, used));
                used[column] = false;
            }
        }
        best
    }

    #[test]
    fn equals_brute_force() {
        let mut rng = Rng::new(5);
        for n in [1, 2, 5, 6] {
            for _ in 0..40 {
                let weight: Vec<f64> = (0..n * n).map(|_| rng.below(30) as f64).collect();
                let Matching { partner, rows, columns } = heaviest_matching(&weight, n);
                let within = |at: usize| weight[at] <= rows[at / n] + columns[at % n];
                assert!((0..n * n).all(within));
                let mut seen = partner.clone();
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<_>>());
                let sum: f64 = partner.iter().enumerate().map(|(i, &j)| weight[i * n + j]).sum();
                assert_eq!(sum, brute(&weight, n, 0, &mut vec![false; n]));
            }
        }
    }
}
