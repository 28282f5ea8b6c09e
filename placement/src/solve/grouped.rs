//! Starts where only a rank's total is bounded: the ranks in groups, each group a run of layers, the experts of a layer
//! spread over its group. One group is expert parallel, one rank a group is a layer split.

use crate::assign::{Assigner, Bounds};
use crate::cost::Problem;
use crate::solve::state::partial_table;

/// A rank takes its part of all experts by speed, more only where layers would not fit: so much more.
const SLACK: [f64; 4] = [1.0, 1.05, 1.1, f64::INFINITY];

/// `[L, E]` holders for every number of groups that fits.
pub(crate) fn all(problem: &Problem) -> Vec<Vec<u16>> {
    let order = tour(problem);
    let of_groups = |groups: usize| {
        let tries = SLACK.iter().filter_map(|&slack| grouped(problem, &order, groups, slack));
        tries.into_iter().find(|holders| problem.fits(holders))
    };
    (1..=problem.ranks).filter_map(of_groups).collect()
}

/// The ranks in an order in which neighbours are near: from each rank on to the nearest left, the shortest of these
/// rings.
fn tour(problem: &Problem) -> Vec<usize> {
    let r = problem.ranks;
    let far = |a: usize, b: usize| problem.dist[a * r + b];
    let from = |start: usize| {
        let (mut order, mut left) = (vec![start], (0..r).filter(|&g| g != start).collect::<Vec<_>>());
        while let Some(at) = (0..left.len()).min_by(|&a, &b| {
            let here = order[order.len() - 1];
            far(here, left[a]).total_cmp(&far(here, left[b]))
        }) {
            order.push(left.remove(at));
        }
        order
    };
    let length = |order: &Vec<usize>| (0..r).map(|at| far(order[at], order[(at + 1) % r])).sum::<f64>();
    (0..r).map(from).min_by(|a, b| length(a).total_cmp(&length(b))).unwrap_or_default()
}

/// Holders with the ranks of `order` in so many groups of about the same memory; none where a layer finds no room.
fn grouped(problem: &Problem, order: &[usize], groups: usize, slack: f64) -> Option<Vec<u16>> {
    let (l, e) = (problem.layers, problem.experts);
    let total = problem.capacity.total.as_ref()?;
    let mut left = shares(problem, total, slack);
    let members: Vec<&[usize]> =
        (0..groups).map(|k| &order[k * order.len() / groups..(k + 1) * order.len() / groups]).collect();
    let (mut holders, mut known) = (vec![0u16; l * e], vec![false; l]);
    let mut assigner = Assigner::new(problem.ranks);
    let mut group = 0;
    for layer in 0..l {
        let mut counts = vec![0; problem.ranks];
        let mut missing = e;
        while missing > 0 {
            missing -= deal(problem, members.get(group)?, missing, &mut counts, &mut left);
            // The rest of a layer that a full group has no room for begins the next one.
            group += usize::from(missing > 0);
        }
        let cost = partial_table(problem, &holders, layer, &known);
        let mut row: Vec<u16> =
            counts.iter().enumerate().flat_map(|(g, &n)| std::iter::repeat_n(g as u16, n)).collect();
        let epsilon = 1e-9 * cost.iter().copied().fold(0.0, f64::max);
        let bounds = Bounds { least: &counts, most: &counts };
        assigner.solve(&cost, &mut row, bounds, epsilon, &mut Vec::new());
        holders[layer * e..][..e].copy_from_slice(&row);
        known[layer] = true;
    }
    Some(holders)
}

/// `[R]` what each rank takes in all: its part by speed with some slack, as far as its memory goes.
fn shares(problem: &Problem, total: &[usize], slack: f64) -> Vec<f64> {
    let all = (problem.layers * problem.experts) as f64;
    let speed = |rank: usize| problem.load.slowness.get(rank).map_or(1.0, |slow| 1.0 / slow);
    let whole: f64 = (0..problem.ranks).map(speed).sum();
    let besides = problem.capacity.domain * problem.layers as f64;
    let share = |rank: usize| (all * speed(rank) / whole * slack).ceil() + besides;
    (0..problem.ranks).map(|rank| share(rank).min(total[rank] as f64)).collect()
}

/// Deals up to `missing` experts of a layer one by one to the members with most room; how many found some.
fn deal(
    problem: &Problem,
    members: &[usize],
    missing: usize,
    counts: &mut [usize],
    left: &mut [f64],
) -> usize {
    let capacity = &problem.capacity;
    let price = |counts: &[usize], g: usize| capacity.taken(counts[g] + 1) - capacity.taken(counts[g]);
    for dealt in 0..missing {
        let open = members
            .iter()
            .copied()
            .filter(|&g| left[g] + 1e-9 >= price(counts, g) && counts[g] < capacity.most[g]);
        // Within a group all ranks have the same run of layers before them: the one with most room next.
        let Some(g) = open.max_by(|&a, &b| left[a].total_cmp(&left[b]).then(b.cmp(&a))) else { return dealt };
        left[g] -= price(counts, g);
        counts[g] += 1;
    }
    missing
}
