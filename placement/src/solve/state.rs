//! A placement under change: holders, the cost of every (layer, rank, expert), and a journal to undo.

use crate::assign::Shift;
use crate::cost::{Edge, Problem};

/// A complete placement with its marginal costs.
#[derive(Debug, Clone)]
pub(crate) struct State<'p> {
    pub(crate) problem: &'p Problem,
    /// `[L, E]` holders.
    pub(crate) holders: Vec<u16>,
    /// `[L, R, E]`: pair cost of expert e on rank r, all other experts where they are.
    unary: Vec<f64>,
    /// Layers in which a neighbour has changed since they were last solved, `[L]`.
    pub(crate) dirty: Vec<bool>,
    journal: Vec<(u32, u16, u16)>,
    /// Pair cost of all, kept up to date by `shift`.
    pub(crate) cost: f64,
}

impl<'p> State<'p> {
    /// Marginal costs of `[L, E]` holders, from scratch: O(L E (E + R^2)).
    pub(crate) fn new(problem: &'p Problem, holders: Vec<u16>) -> Self {
        let (l, e, r) = (problem.layers, problem.experts, problem.ranks);
        let mut unary = vec![0.0; l * r * e];
        for edge in &problem.edges {
            let (from, to) = (&holders[edge.from * e..][..e], &holders[edge.to * e..][..e]);
            let (size, dist) = (r * e, &problem.dist);
            add_marginals(&mut unary[edge.to * size..][..size], &edge.weight, from, |g, h| dist[g * r + h]);
            add_marginals(&mut unary[edge.from * size..][..size], &edge.transposed, to, |h, g| {
                dist[g * r + h]
            });
        }
        let cost = problem.pair_cost(&holders);
        Self { problem, holders, unary, dirty: vec![true; l], journal: Vec::new(), cost }
    }

    /// `[R, E]` marginal costs of a layer.
    pub(crate) fn table(&self, layer: usize) -> &[f64] {
        let size = self.problem.ranks * self.problem.experts;
        &self.unary[layer * size..][..size]
    }

    /// `[E]` holders of a layer.
    pub(crate) fn layer(&self, layer: usize) -> &[u16] {
        &self.holders[layer * self.problem.experts..][..self.problem.experts]
    }

    /// Marginal cost of moving `expert` of `layer` to rank `to`, pair terms only.
    pub(crate) fn shift_cost(&self, layer: usize, shift: Shift) -> f64 {
        let (e, table) = (self.problem.experts, self.table(layer));
        let (expert, to) = (shift.expert as usize, shift.to as usize);
        let from = self.layer(layer)[expert] as usize;
        table[to * e + expert] - table[from * e + expert]
    }

    /// Moves one expert and keeps the neighbours' marginal costs true: O(E) per changed rank and edge.
    pub(crate) fn shift(&mut self, layer: usize, Shift { expert, to }: Shift) {
        let problem = self.problem;
        let (e, r, x) = (problem.experts, problem.ranks, expert as usize);
        let holder = &mut self.holders[layer * e + x];
        let (g, h) = (*holder as usize, to as usize);
        if g == h {
            return;
        }
        let marginal = &self.unary[layer * r * e..];
        self.cost += marginal[h * e + x] - marginal[g * e + x];
        self.journal.push((layer as u32, expert, *holder));
        *holder = to;
        let dist = &problem.dist;
        for edge in problem.leaving[layer].iter().map(|&at| &problem.edges[at]) {
            let change = |rank: usize| dist[h * r + rank] - dist[g * r + rank];
            self.add_row(edge.to, &edge.weight[x * e..][..e], change);
        }
        for edge in problem.entering[layer].iter().map(|&at| &problem.edges[at]) {
            let change = |rank: usize| dist[rank * r + h] - dist[rank * r + g];
            self.add_row(edge.from, &edge.transposed[x * e..][..e], change);
        }
    }

    fn add_row(&mut self, layer: usize, row: &[f64], change: impl Fn(usize) -> f64) {
        let (e, r) = (self.problem.experts, self.problem.ranks);
        self.dirty[layer] = true;
        for rank in 0..r {
            let factor = change(rank);
            if factor != 0.0 {
                let marginal = &mut self.unary[(layer * r + rank) * e..][..e];
                marginal.iter_mut().zip(row).for_each(|(m, count)| *m += factor * count);
            }
        }
    }

    /// Where the journal stands: for `undo_to`.
    pub(crate) fn mark(&self) -> usize {
        self.journal.len()
    }

    /// Ranks that gained or lost an expert since the journal was last committed, `[R]`.
    pub(crate) fn touched_ranks(&self) -> Vec<bool> {
        let mut touched = vec![false; self.problem.ranks];
        for &(layer, expert, from) in &self.journal {
            let to = self.layer(layer as usize)[expert as usize];
            if to != from {
                touched[from as usize] = true;
                touched[to as usize] = true;
            }
        }
        touched
    }

    /// Ranks that gained or lost an expert after `mark`.
    pub(crate) fn ranks_since(&self, mark: usize) -> Vec<usize> {
        let mut ranks: Vec<usize> = Vec::new();
        for &(layer, expert, from) in &self.journal[mark..] {
            let to = self.layer(layer as usize)[expert as usize];
            ranks.extend([usize::from(from), usize::from(to)]);
        }
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// Takes back every shift after `mark`.
    pub(crate) fn undo_to(&mut self, mark: usize) {
        while self.journal.len() > mark {
            if let Some((layer, expert, to)) = self.journal.pop() {
                self.shift(layer as usize, Shift { expert, to });
                self.journal.pop();
            }
        }
        self.dirty.fill(false);
    }

    /// Forgets how to undo.
    pub(crate) fn commit(&mut self) {
        self.journal.clear();
    }

    /// Replaces all holders.
    pub(crate) fn replace(&mut self, holders: Vec<u16>) {
        *self = Self::new(self.problem, holders);
    }

    /// Experts of a layer on each rank, `[R]`.
    pub(crate) fn counts(&self, layer: usize) -> Vec<usize> {
        let mut counts = vec![0; self.problem.ranks];
        self.layer(layer).iter().for_each(|&g| counts[g as usize] += 1);
        counts
    }
}

/// Adds to `table` `[R, E]` what rows `[E, E]` of one end's experts on ranks `ends` cost the other end.
fn add_marginals(table: &mut [f64], rows: &[f64], ends: &[u16], dist: impl Fn(usize, usize) -> f64) {
    let e = ends.len();
    let ranks = table.len() / e;
    let mut mass = vec![0.0; ranks * e];
    for (row, &g) in rows.chunks_exact(e).zip(ends) {
        mass[g as usize * e..][..e].iter_mut().zip(row).for_each(|(m, count)| *m += count);
    }
    for g in (0..ranks).filter(|g| ends.contains(&(*g as u16))) {
        for h in 0..ranks {
            let (cost, from) = (dist(g, h), &mass[g * e..][..e]);
            if cost != 0.0 {
                table[h * e..][..e].iter_mut().zip(from).for_each(|(t, m)| *t += cost * m);
            }
        }
    }
}

/// `[R, E]` marginal costs of a layer against the neighbours that `known` names, for building up.
pub(crate) fn partial_table(problem: &Problem, holders: &[u16], layer: usize, known: &[bool]) -> Vec<f64> {
    let (e, r, dist) = (problem.experts, problem.ranks, &problem.dist);
    let mut table = vec![0.0; r * e];
    let other = |edge: &Edge, end: usize| known[end] && edge.from != edge.to;
    for edge in
        problem.entering[layer].iter().map(|&at| &problem.edges[at]).filter(|edge| other(edge, edge.from))
    {
        add_marginals(&mut table, &edge.weight, &holders[edge.from * e..][..e], |g, h| dist[g * r + h]);
    }
    for edge in
        problem.leaving[layer].iter().map(|&at| &problem.edges[at]).filter(|edge| other(edge, edge.to))
    {
        add_marginals(&mut table, &edge.transposed, &holders[edge.to * e..][..e], |h, g| dist[g * r + h]);
    }
    table
}
