//! Placements that know nothing of affinity, to stand beside the solver's.

use crate::cost::Problem;
use crate::rng::Rng;
use crate::solve::greedy::random_layer;

/// Name and `[L, E]` holders of each baseline, all within the capacity.
pub(crate) fn all(problem: &Problem, load: &[f64], seed: u64) -> Vec<(&'static str, Vec<u16>)> {
    let mut rng = Rng::fork(seed, 0xba5e);
    let random_row = |_| match problem.capacity.total {
        // Any number of a layer may be on any rank: an even one keeps to the ranks' totals.
        Some(_) => {
            let mut row = dealt(problem);
            rng.shuffle(&mut row);
            row
        }
        None => random_layer(problem, &mut rng),
    };
    let random = (0..problem.layers).flat_map(random_row).collect();
    let every = |row: Vec<u16>| row.repeat(problem.layers);
    vec![
        ("linear", every(linear(problem))),
        ("round_robin", every(round_robin(problem))),
        ("random", random),
        ("load_only", load_only(problem, load)),
    ]
}

/// Experts each rank holds when all are dealt one by one in turn, `[R]`.
fn dealt(problem: &Problem) -> Vec<u16> {
    let most = &problem.capacity.most;
    let mut counts = vec![0; problem.ranks];
    let mut order = Vec::with_capacity(problem.experts);
    while order.len() < problem.experts {
        let before = order.len();
        for g in 0..problem.ranks {
            if counts[g] < most[g] && order.len() < problem.experts {
                counts[g] += 1;
                order.push(g as u16);
            }
        }
        if order.len() == before {
            break;
        }
    }
    order
}

/// Expert e on rank e mod R while slots last.
pub(crate) fn round_robin(problem: &Problem) -> Vec<u16> {
    dealt(problem)
}

/// Contiguous blocks.
pub(crate) fn linear(problem: &Problem) -> Vec<u16> {
    let mut row = dealt(problem);
    row.sort_unstable();
    row
}

/// Longest processing time first: each expert, by falling load, to the rank that is least loaded for its
/// speed and has a slot (what load balancers of expert-parallel engines do).
pub(crate) fn load_only(problem: &Problem, load: &[f64]) -> Vec<u16> {
    load.chunks_exact(problem.experts).flat_map(|loads| longest_first(problem, loads)).collect()
}

fn longest_first(problem: &Problem, loads: &[f64]) -> Vec<u16> {
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by(|&a, &b| loads[b].total_cmp(&loads[a]).then(a.cmp(&b)));
    let room = dealt(problem).iter().fold(vec![0usize; problem.ranks], |mut room, &g| {
        room[g as usize] += 1;
        room
    });
    let mut left = room;
    let mut sums = vec![0.0; problem.ranks];
    let mut row = vec![0u16; loads.len()];
    for expert in order {
        let open = (0..problem.ranks).filter(|&g| left[g] > 0);
        let after = |g: usize| sums[g] + loads[expert] * problem.load.slowness[g];
        let Some(best) = open.min_by(|&a, &b| after(a).total_cmp(&after(b))) else { break };
        sums[best] = after(best);
        left[best] -= 1;
        row[expert] = best as u16;
    }
    row
}
