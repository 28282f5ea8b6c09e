//! Starts: a random layer is dealt at random, the others are solved one after another against the
//! neighbours already placed.

use crate::cost::Problem;
use crate::rng::Rng;
use crate::solve::assign::{Assigner, Bounds};
use crate::solve::state::partial_table;

/// `[E]` holders dealt at random within the bounds.
pub(crate) fn random_layer(problem: &Problem, rng: &mut Rng) -> Vec<u16> {
    let (least, most) = (&problem.capacity.least, &problem.capacity.most);
    let mut slots: Vec<u16> = repeat(least.iter().copied());
    let mut spare: Vec<u16> = repeat(most.iter().zip(least).map(|(most, least)| most - least));
    rng.shuffle(&mut spare);
    slots.extend(spare);
    slots.truncate(problem.experts);
    rng.shuffle(&mut slots);
    slots
}

/// Rank g as often as the g-th count says.
fn repeat(counts: impl Iterator<Item = usize>) -> Vec<u16> {
    counts.enumerate().flat_map(|(g, n)| std::iter::repeat_n(g as u16, n)).collect()
}

/// `[L, E]` holders: a chain from layer `start` outwards.
pub(crate) fn chain(problem: &Problem, start: usize, rng: &mut Rng) -> Vec<u16> {
    let (l, e) = (problem.layers, problem.experts);
    let mut holders = vec![0u16; l * e];
    let mut known = vec![false; l];
    let mut assigner = Assigner::new(problem.ranks);
    for layer in (start..l).chain((0..start).rev()) {
        let mut row = random_layer(problem, rng);
        if layer != start {
            let cost = partial_table(problem, &holders, layer, &known);
            let bounds = Bounds { least: &problem.capacity.least, most: &problem.capacity.most };
            let epsilon = 1e-9 * cost.iter().copied().fold(0.0, f64::max);
            assigner.solve(&cost, &mut row, bounds, epsilon, &mut Vec::new());
        }
        holders[layer * e..][..e].copy_from_slice(&row);
        known[layer] = true;
    }
    holders
}
