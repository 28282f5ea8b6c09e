//! Disturbances for the iterated local search: large enough to leave a local optimum, small enough to
//! keep most of a good placement. All respect the capacity.

use crate::assign::Shift;
use crate::rng::Rng;
use crate::solve::state::State;

/// Disturbs a run of layers; returns its first layer and its length.
pub(crate) fn disturb(state: &mut State<'_>, rng: &mut Rng) -> (usize, usize) {
    let layers = state.problem.layers;
    let first = rng.below(layers);
    let length = (1 + rng.below(5)).min(layers);
    if state.problem.capacity.total.is_some() && rng.below(2) == 0 {
        return trade(state, rng);
    }
    match rng.below(8) {
        0..4 => scramble(state, rng, first, 1 + length / 3),
        4..6 => relabel(state, rng, first, length),
        6 => rotate(state, rng, first, length),
        _ => exchange_hosts(state, rng, first, length),
    }
    (first, length)
}

/// Deals all experts of all layers anew.
pub(crate) fn deal_anew(state: &mut State<'_>, rng: &mut Rng) {
    let ranks = some_ranks(state.problem.ranks, state.problem.ranks, rng);
    deal(state, rng, &ranks, 0, state.problem.layers);
}

/// Deals the experts of two or three ranks anew among them.
fn scramble(state: &mut State<'_>, rng: &mut Rng, first: usize, length: usize) {
    let ranks = some_ranks(state.problem.ranks, 2 + rng.below(2), rng);
    deal(state, rng, &ranks, first, length);
}

/// Deals the experts of some ranks anew among them; where their numbers are open, those as well.
fn deal(state: &mut State<'_>, rng: &mut Rng, ranks: &[u16], first: usize, length: usize) {
    for layer in run(state, first, length) {
        let row = state.layer(layer);
        let experts: Vec<u16> = (0..row.len() as u16).filter(|&x| ranks.contains(&row[x as usize])).collect();
        let mut holders: Vec<u16> = experts.iter().map(|&x| row[x as usize]).collect();
        let capacity = &state.problem.capacity;
        if capacity.total.is_none() && !capacity.is_exact() {
            holders = numbers(ranks, experts.len(), &capacity.least, &capacity.most, rng);
        }
        rng.shuffle(&mut holders);
        experts.iter().zip(holders).for_each(|(&expert, to)| state.shift(layer, Shift { expert, to }));
    }
}

/// Each of `ranks` as often as it may hold experts, `count` in all, at random within the bounds.
fn numbers(ranks: &[u16], count: usize, least: &[usize], most: &[usize], rng: &mut Rng) -> Vec<u16> {
    let mut held: Vec<u16> = ranks.iter().flat_map(|&g| std::iter::repeat_n(g, least[g as usize])).collect();
    let mut spare: Vec<u16> = ranks
        .iter()
        .flat_map(|&g| std::iter::repeat_n(g, most[g as usize].min(count) - least[g as usize].min(count)))
        .collect();
    rng.shuffle(&mut spare);
    held.extend(spare);
    held.truncate(count);
    held
}

/// Two ranks trade experts of different layers, as many one way as the other: how much of which layer a rank holds is
/// open where only its total is bounded.
fn trade(state: &mut State<'_>, rng: &mut Rng) -> (usize, usize) {
    let layers = state.problem.layers;
    let (a, span) = (rng.below(layers), 1 + rng.below(3).min(layers - 1));
    let b = (a + span) % layers;
    let ranks = some_ranks(state.problem.ranks, 2, rng);
    if let ([g, h], true) = (&ranks[..], a != b) {
        let on = |state: &State<'_>, layer: usize, rank: u16| -> Vec<u16> {
            let row = state.layer(layer);
            (0..row.len() as u16).filter(|&x| row[x as usize] == rank).collect()
        };
        let (mut out, mut back) = (on(state, a, *g), on(state, b, *h));
        rng.shuffle(&mut out);
        rng.shuffle(&mut back);
        let most = out.len().min(back.len());
        let number = if rng.below(2) == 0 { most } else { most.min(1 + rng.below(4)) };
        let mark = state.mark();
        for (&x, &y) in out.iter().zip(&back).take(number) {
            state.shift(a, Shift { expert: x, to: *h });
            state.shift(b, Shift { expert: y, to: *g });
        }
        if !state.problem.fits(&state.holders) {
            state.undo_to(mark);
        }
    }
    (a, span + 1)
}

/// Two ranks exchange all their experts.
fn relabel(state: &mut State<'_>, rng: &mut Rng, first: usize, length: usize) {
    let ranks = some_ranks(state.problem.ranks, 2, rng);
    if let [g, h] = ranks[..] {
        rename(state, first, length, &|rank| {
            if rank == g {
                h
            } else if rank == h {
                g
            } else {
                rank
            }
        });
    }
}

/// Three ranks pass all their experts round.
fn rotate(state: &mut State<'_>, rng: &mut Rng, first: usize, length: usize) {
    let ranks = some_ranks(state.problem.ranks, 3, rng);
    if ranks.len() == 3 {
        let next = |rank: u16| ranks.iter().position(|&r| r == rank).map_or(rank, |at| ranks[(at + 1) % 3]);
        rename(state, first, length, &next);
    }
}

/// Two hosts exchange all their experts, rank by rank.
fn exchange_hosts(state: &mut State<'_>, rng: &mut Rng, first: usize, length: usize) {
    let host = &state.problem.host;
    let (a, b) = (host[rng.below(host.len())], host[rng.below(host.len())]);
    let members =
        |of: usize| -> Vec<u16> { (0..host.len()).filter(|&g| host[g] == of).map(|g| g as u16).collect() };
    let (left, mut right) = (members(a), members(b));
    if a == b {
        return relabel(state, rng, first, length);
    }
    rng.shuffle(&mut right);
    let partner = |rank: u16| -> u16 {
        let forward = left.iter().zip(&right).find(|(l, _)| **l == rank).map(|(_, r)| *r);
        let back = || left.iter().zip(&right).find(|(_, r)| **r == rank).map(|(l, _)| *l);
        forward.or_else(back).unwrap_or(rank)
    };
    rename(state, first, length, &partner);
}

/// Renames ranks in a run of layers, where the counts allow it.
fn rename(state: &mut State<'_>, first: usize, length: usize, name: &dyn Fn(u16) -> u16) {
    for layer in run(state, first, length) {
        let (least, most) = state.problem.bounds(&state.holders, layer);
        let counts = state.counts(layer);
        let fits = |g: usize| {
            let to = name(g as u16) as usize;
            (least[to]..=most[to]).contains(&counts[g])
        };
        if !(0..counts.len()).all(fits) {
            continue;
        }
        let row = state.layer(layer).to_vec();
        row.iter()
            .enumerate()
            .for_each(|(x, &g)| state.shift(layer, Shift { expert: x as u16, to: name(g) }));
    }
}

fn some_ranks(ranks: usize, count: usize, rng: &mut Rng) -> Vec<u16> {
    let mut all: Vec<u16> = (0..ranks as u16).collect();
    rng.shuffle(&mut all);
    all.truncate(count);
    all
}

fn run(state: &State<'_>, first: usize, length: usize) -> Vec<usize> {
    let layers = state.problem.layers;
    (0..length).map(|t| (first + t) % layers).collect()
}
