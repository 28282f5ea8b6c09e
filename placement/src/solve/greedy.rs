//! Starts: a random layer is dealt at random, the others are solved one after another against the
//! neighbours already placed.

use crate::assign::{Assigner, Bounds};
use crate::cost::Problem;
use crate::rng::Rng;
use crate::solve::state::{State, partial_table};
use crate::solve::sweep::Sweeper;

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

/// `[L, E]` holders: hosts are chosen first, then ranks within them. None where that is no restriction.
pub(crate) fn host_first(problem: &Problem, start: usize, rng: &mut Rng) -> Option<Vec<u16>> {
    let coarse = problem.by_host()?;
    let hosts = chain(&coarse, start, rng);
    let mut state = State::new(&coarse, hosts);
    Sweeper::new(&coarse).settle(&mut state);
    Some(within_hosts(problem, &state.holders, start, rng))
}

/// A chain whose experts stay on the hosts `[L, E]` given.
fn within_hosts(problem: &Problem, hosts: &[u16], start: usize, rng: &mut Rng) -> Vec<u16> {
    let (l, e) = (problem.layers, problem.experts);
    let away = 4.0 * problem.scale() + 1.0;
    let mut holders = vec![0u16; l * e];
    let mut known = vec![false; l];
    let mut assigner = Assigner::new(problem.ranks);
    for layer in (start..l).chain((0..start).rev()) {
        let wanted = &hosts[layer * e..][..e];
        let mut row = deal_within(problem, wanted, rng);
        if layer != start {
            let mut cost = partial_table(problem, &holders, layer, &known);
            let foreign = |at: usize| problem.host[at / e] != wanted[at % e] as usize;
            cost.iter_mut().enumerate().filter(|(at, _)| foreign(*at)).for_each(|(_, cost)| *cost += away);
            let bounds = Bounds { least: &problem.capacity.least, most: &problem.capacity.most };
            assigner.solve(&cost, &mut row, bounds, 1e-9 * away, &mut Vec::new());
        }
        holders[layer * e..][..e].copy_from_slice(&row);
        known[layer] = true;
    }
    holders
}

/// `[E]` holders within the bounds, each expert on its host while that has room.
fn deal_within(problem: &Problem, wanted: &[u16], rng: &mut Rng) -> Vec<u16> {
    let mut left = random_layer(problem, rng);
    let mut row = vec![u16::MAX; wanted.len()];
    for (holder, &host) in row.iter_mut().zip(wanted) {
        if let Some(at) = left.iter().position(|&g| problem.host[g as usize] == host as usize) {
            *holder = left.swap_remove(at);
        }
    }
    let open = row.iter_mut().filter(|holder| **holder == u16::MAX);
    open.zip(left).for_each(|(holder, g)| *holder = g);
    row
}
