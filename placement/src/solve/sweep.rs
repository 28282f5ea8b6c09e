//! Sweeps: every layer is solved again given its neighbours, until none improves. Exactly where its
//! cost is linear; by swaps and shifts where co-activation or load couple its experts.

use crate::assign::{Assigner, Bounds, Shift};
use crate::solve::state::State;

/// Re-solves layers of one problem.
#[derive(Debug, Clone)]
pub(crate) struct Sweeper {
    assigner: Assigner,
    /// Gains below this are rounding.
    epsilon: f64,
    coupled: Vec<bool>,
    moved: Vec<Shift>,
}

impl Sweeper {
    pub(crate) fn new(problem: &crate::cost::Problem) -> Self {
        let load = problem.load.is_active();
        Self {
            assigner: Assigner::new(problem.ranks),
            epsilon: 1e-11 * problem.scale(),
            coupled: (0..problem.layers).map(|l| load || problem.self_coupled(l)).collect(),
            moved: Vec::new(),
        }
    }

    /// Gains below this are rounding.
    pub(crate) fn epsilon(&self) -> f64 {
        self.epsilon
    }

    /// Sweeps up and down over dirty layers until all are clean.
    pub(crate) fn settle(&mut self, state: &mut State<'_>) {
        let layers = state.problem.layers;
        let limit = 50 + 4 * layers;
        for _ in 0..limit {
            if !state.dirty.contains(&true) {
                return;
            }
            (0..layers).for_each(|layer| self.layer(state, layer));
            (0..layers).rev().for_each(|layer| self.layer(state, layer));
        }
    }

    fn layer(&mut self, state: &mut State<'_>, layer: usize) {
        if !std::mem::take(&mut state.dirty[layer]) {
            return;
        }
        if self.coupled[layer] {
            self.descend(state, layer);
        } else {
            self.exact(state, layer);
        }
    }

    fn exact(&mut self, state: &mut State<'_>, layer: usize) {
        let (least, most) = state.problem.bounds(&state.holders, layer);
        let bounds = Bounds { least: &least, most: &most };
        let mut row = state.layer(layer).to_vec();
        self.moved.clear();
        self.assigner.solve(state.table(layer), &mut row, bounds, self.epsilon, &mut self.moved);
        for at in 0..self.moved.len() {
            let shift = self.moved[at];
            // A shift that a later cycle took back needs no detour.
            if row[shift.expert as usize] == shift.to {
                state.shift(layer, shift);
            }
        }
        state.dirty[layer] = false;
    }

    /// First-improvement swaps and shifts with exact differences.
    fn descend(&mut self, state: &mut State<'_>, layer: usize) {
        let experts = state.problem.experts;
        let term = &state.problem.load;
        let mut loads = term.is_active().then(|| term.sums(layer, &state.holders, experts));
        let mut improved = true;
        while improved {
            improved = false;
            for a in 0..experts {
                improved |= self.best_shift(state, layer, a, &mut loads);
                for b in a + 1..experts {
                    improved |= self.try_swap(state, layer, a, b, &mut loads);
                }
            }
        }
        state.dirty[layer] = false;
    }

    fn best_shift(
        &self,
        state: &mut State<'_>,
        layer: usize,
        a: usize,
        loads: &mut Option<Vec<f64>>,
    ) -> bool {
        if state.problem.capacity.is_exact() {
            return false;
        }
        let (counts, from) = (state.counts(layer), state.layer(layer)[a]);
        let (least, most) = state.problem.bounds(&state.holders, layer);
        if counts[from as usize] <= least[from as usize] {
            return false;
        }
        for to in (0..state.problem.ranks as u16).filter(|&to| to != from) {
            let shift = Shift { expert: a as u16, to };
            if counts[to as usize] >= most[to as usize] {
                continue;
            }
            let gain = state.shift_cost(layer, shift) + load_change(state, layer, &[(a, to)], loads);
            if gain < -self.epsilon {
                apply(state, layer, &[(a, to)], loads);
                return true;
            }
        }
        false
    }

    fn try_swap(
        &self,
        state: &mut State<'_>,
        layer: usize,
        a: usize,
        b: usize,
        loads: &mut Option<Vec<f64>>,
    ) -> bool {
        let (g, h) = (state.layer(layer)[a], state.layer(layer)[b]);
        if g == h {
            return false;
        }
        let moves = [(a, h), (b, g)];
        let gain = swap_cost(state, layer, a, b) + load_change(state, layer, &moves, loads);
        if gain < -self.epsilon {
            apply(state, layer, &moves, loads);
            return true;
        }
        false
    }
}

/// Pair cost of exchanging the ranks of experts a and b of one layer.
pub(crate) fn swap_cost(state: &State<'_>, layer: usize, a: usize, b: usize) -> f64 {
    let (g, h) = (state.layer(layer)[a], state.layer(layer)[b]);
    let each = state.shift_cost(layer, Shift { expert: a as u16, to: h })
        + state.shift_cost(layer, Shift { expert: b as u16, to: g });
    let (e, r) = (state.problem.experts, state.problem.ranks);
    let dist = |g: u16, h: u16| state.problem.dist[g as usize * r + h as usize];
    // Both differences took the pair (a, b) as coming together; it stays apart.
    let together = |edge: &crate::cost::Edge| {
        let both = edge.weight[a * e + b] + edge.weight[b * e + a];
        if edge.to == layer { both * (dist(g, h) + dist(h, g)) } else { 0.0 }
    };
    each + state.problem.leaving[layer].iter().map(|&at| together(&state.problem.edges[at])).sum::<f64>()
}

fn apply(state: &mut State<'_>, layer: usize, moves: &[(usize, u16)], loads: &mut Option<Vec<f64>>) {
    if let Some(sums) = loads {
        *sums = moved_loads(state, layer, moves, sums);
    }
    moves.iter().for_each(|&(expert, to)| state.shift(layer, Shift { expert: expert as u16, to }));
}

/// What the load terms gain or lose by `moves`: one expert's to another rank, or two experts' that change places.
fn load_change(state: &State<'_>, layer: usize, moves: &[(usize, u16)], loads: &Option<Vec<f64>>) -> f64 {
    let Some(sums) = loads else { return 0.0 };
    let (term, experts, row) = (&state.problem.load, state.problem.experts, state.layer(layer));
    let [g, h] = [row[moves[0].0] as usize, moves[0].1 as usize];
    let leaving = term.load[layer * experts + moves[0].0];
    let entering = moves.get(1).map_or(0.0, |&(b, _)| term.load[layer * experts + b]);
    let net = leaving - entering;
    term.change(layer, sums, [g, h], [-net * term.slowness[g], net * term.slowness[h]])
}

fn moved_loads(state: &State<'_>, layer: usize, moves: &[(usize, u16)], sums: &[f64]) -> Vec<f64> {
    let (term, mut sums) = (&state.problem.load, sums.to_vec());
    for &(expert, to) in moves {
        let tokens = term.load[layer * state.problem.experts + expert];
        let from = state.layer(layer)[expert] as usize;
        sums[from] -= tokens * term.slowness[from];
        sums[to as usize] += tokens * term.slowness[to as usize];
    }
    sums
}
