//! The chordal doubly nonnegative bound: how much pair weight can stay inside equal classes.
//!
//! Y[i][j] = 1 where experts i and j (of any layers) share a class, Y = X Xᵀ. Relaxed: for every edge between
//! layers A and B the 2E x 2E block of Y, less J/k (k classes), is positive semidefinite with eigenvalues at
//! most twice the class sizes; 0 <= Y <= 1, diagonal 1, rows of a layer sum to a class size. Blocks of
//! neighbouring edges share the square of their common layer. The chain of layers is chordal, so no
//! more than these blocks is needed of "Y is positive semidefinite"; sign constraints of layers apart are dropped.
//!
//! Solved by ADMM between the polyhedron (Y) and the spectral sets (Z). For *any* multipliers U the sum of the
//! two maxima is an upper bound on the weight kept (weak duality), so the bound holds after every iteration:
//!
//!   kept <= max over the polyhedron of <W - ρU, Y>  +  Σ_edges ( <ρU, J/k> + ρ Σ_i 2·size_i · λ_i⁺(U) )
//!
//! (von Neumann: <U, Z> <= Σ sorted eigenvalues; interlacing: Z has k-1 of them, at most 2·size_i.) Right after a
//! step U's positive eigenvalues are what the projection cut off, so they cost nothing more.

use crate::bound::levels::Level;
use crate::bound::polyhedron::Rows;
use crate::bound::spectral::project;
use crate::cost::Problem;

/// Bound of one level, refined step by step.
pub(crate) struct Chordal {
    experts: usize,
    level: Level,
    blocks: Vec<Block>,
    /// `[L]`: how many blocks share a layer's square.
    shared: Vec<usize>,
    /// `[L][E, E]` the layers' squares of Y.
    squares: Vec<Vec<f64>>,
    /// `[L][E, E]` weights inside layers.
    inner: Vec<Vec<f64>>,
    rho: f64,
    total: f64,
    best: f64,
    steps: usize,
}

/// One edge's 2E x 2E block.
struct Block {
    a: usize,
    b: usize,
    /// `[E, E]` weights from a's experts to b's.
    weight: Vec<f64>,
    /// `[E, E]` the off-diagonal square of Y.
    across: Vec<f64>,
    /// `[2E, 2E]` Z + J/k.
    z: Vec<f64>,
    /// `[2E, 2E]` scaled multipliers.
    u: Vec<f64>,
    /// Eigenvalues of U above 0.
    excess: Vec<f64>,
}

impl Chordal {
    /// The relaxation of one level; `holders` `[L, E]` is a good placement to begin from.
    pub(crate) fn new(problem: &Problem, level: &Level, holders: &[u16]) -> Self {
        let (l, e) = (problem.layers, problem.experts);
        let class: Vec<usize> = holders.iter().map(|&g| level.class[g as usize]).collect();
        let same = |a: usize, b: usize| -> Vec<f64> {
            (0..e * e).map(|at| f64::from(u8::from(class[a * e + at / e] == class[b * e + at % e]))).collect()
        };
        let mut blocks: Vec<Block> = Vec::new();
        let mut inner = vec![Vec::new(); l];
        for edge in &problem.edges {
            if edge.from == edge.to {
                inner[edge.from] = edge.weight.clone();
            } else {
                let across = same(edge.from, edge.to);
                let (u, z) = (vec![0.0; 4 * e * e], vec![0.0; 4 * e * e]);
                blocks.push(Block {
                    a: edge.from,
                    b: edge.to,
                    weight: edge.weight.clone(),
                    across,
                    z,
                    u,
                    excess: vec![],
                });
            }
        }
        let mut shared = vec![0; l];
        blocks.iter().for_each(|block| [block.a, block.b].iter().for_each(|&layer| shared[layer] += 1));
        let total = blocks.iter().flat_map(|block| &block.weight).sum::<f64>()
            + (0..l).filter(|&layer| shared[layer] > 0).flat_map(|layer| &inner[layer]).sum::<f64>();
        let squares: Vec<Vec<f64>> = (0..l).map(|layer| same(layer, layer)).collect();
        let kept: f64 = blocks.iter().map(|b| dot(&b.weight, &b.across)).sum();
        let cells: f64 = blocks.iter().map(|b| b.across.iter().sum::<f64>()).sum();
        let rho = (kept / cells.max(1.0)).max(f64::MIN_POSITIVE);
        let level = level.clone();
        let mut bound =
            Self { experts: e, level, blocks, shared, squares, inner, rho, total, best: 0.0, steps: 0 };
        bound.blocks.iter_mut().for_each(|block| block.z = assemble(e, block, &bound.squares));
        bound.best = bound.certificate();
        bound
    }

    /// Best bound so far on the weight that is parted, times the level's weight.
    pub(crate) fn bound(&self) -> f64 {
        (self.best * self.level.weight).max(0.0)
    }

    /// Steps done.
    pub(crate) fn steps(&self) -> usize {
        self.steps
    }

    /// One iteration of ADMM and its certificate; gives up half-way, changing nothing, where `stop` says so.
    pub(crate) fn step(&mut self, stop: &dyn Fn() -> bool) {
        let (squares, across) = (self.next_squares(), self.next_across());
        let e = self.experts;
        let top = 2.0 * self.level.sizes[0] as f64;
        let k = self.level.sizes.len() as f64;
        let mut results = Vec::with_capacity(self.blocks.len());
        for (block, across) in self.blocks.iter().zip(&across) {
            if stop() {
                return;
            }
            let y = lay_out(e, &squares[block.a], across, &squares[block.b]);
            let mut v: Vec<f64> = y.iter().zip(&block.u).map(|(y, u)| y + u - 1.0 / k).collect();
            let whole = v.clone();
            if self.level.equal {
                center(&mut v, e);
            }
            let Some(projection) = project(&v, 2 * e, top) else { return };
            let z: Vec<f64> = projection.inside.iter().map(|z| z + 1.0 / k).collect();
            let u: Vec<f64> = whole.iter().zip(&projection.inside).map(|(v, z)| v - z).collect();
            results.push((z, u, projection.excess));
        }
        let (mut primal, mut dual) = (0.0, 0.0);
        for ((block, across), (z, u, excess)) in self.blocks.iter_mut().zip(across).zip(results) {
            primal += distance(&u, &block.u);
            dual += distance(&z, &block.z);
            (block.across, block.z, block.u, block.excess) = (across, z, u, excess);
        }
        self.squares = squares;
        self.steps += 1;
        self.best = self.best.max(self.certificate());
        self.adapt(primal, dual);
    }

    /// Keeps primal and dual residuals within a factor of each other (Boyd et al. 2011, 3.4.1).
    fn adapt(&mut self, primal: f64, dual: f64) {
        if !self.steps.is_multiple_of(8) {
            return;
        }
        let factor = if primal > 4.0 * dual {
            1.4
        } else if dual > 4.0 * primal {
            1.0 / 1.4
        } else {
            return;
        };
        self.rho *= factor;
        for block in &mut self.blocks {
            block.u.iter_mut().for_each(|u| *u /= factor);
            block.excess.iter_mut().for_each(|over| *over /= factor);
        }
    }

    /// The layers' squares: the mean over the blocks that share each, within 0 and 1, diagonal 1.
    fn next_squares(&self) -> Vec<Vec<f64>> {
        let e = self.experts;
        let mut sums = vec![vec![0.0; e * e]; self.squares.len()];
        for block in &self.blocks {
            for (layer, at) in [(block.a, 0), (block.b, e)] {
                for i in 0..e {
                    let row = &mut sums[layer][i * e..][..e];
                    let from = (at + i) * 2 * e + at;
                    let (z, u) = (&block.z[from..][..e], &block.u[from..][..e]);
                    row.iter_mut().zip(z.iter().zip(u)).for_each(|(sum, (z, u))| *sum += z - u);
                }
            }
        }
        for (layer, square) in sums.iter_mut().enumerate() {
            let count = self.shared[layer].max(1) as f64;
            for (at, y) in square.iter_mut().enumerate() {
                let weight =
                    self.inner[layer].get(at).map_or(0.0, |w| w + self.inner[layer][at % e * e + at / e]);
                *y = ((*y + weight / (2.0 * self.rho)) / count).clamp(0.0, 1.0);
            }
            (0..e).for_each(|i| square[i * (e + 1)] = 1.0);
        }
        sums
    }

    fn next_across(&self) -> Vec<Vec<f64>> {
        let e = self.experts;
        let next = |block: &Block| {
            let cell = |at: usize| {
                let place = at / e * 2 * e + e + at % e;
                let pull = block.weight[at] / (2.0 * self.rho);
                (block.z[place] - block.u[place] + pull).clamp(0.0, 1.0)
            };
            (0..e * e).map(cell).collect()
        };
        self.blocks.iter().map(next).collect()
    }

    /// A lower bound on the weight parted, from the present multipliers.
    fn certificate(&self) -> f64 {
        let (e, rho) = (self.experts, self.rho);
        let across = Rows::across(&self.level, e);
        let within = Rows::within(&self.level, e);
        let mut inside: Vec<Vec<f64>> = self.inner.clone();
        let mut kept = 0.0;
        for block in &self.blocks {
            let slope = |at: usize| block.weight[at] - 2.0 * rho * block.u[at / e * 2 * e + e + at % e];
            kept += across.most(&(0..e * e).map(slope).collect::<Vec<_>>());
            kept += self.spectral_part(block);
            for (layer, at) in [(block.a, 0), (block.b, e)] {
                inside[layer].resize(e * e, 0.0);
                for (cell, value) in inside[layer].iter_mut().enumerate() {
                    *value -= rho * block.u[(at + cell / e) * 2 * e + at + cell % e];
                }
            }
        }
        kept +=
            (0..inside.len()).filter(|&l| self.shared[l] > 0).map(|l| within.most(&inside[l])).sum::<f64>();
        // Rounding of sums and eigenvalues: far below, and on the safe side.
        self.total - kept - 1e-9 * self.total
    }

    fn spectral_part(&self, block: &Block) -> f64 {
        let k = self.level.sizes.len();
        let mean: f64 = block.u.iter().sum::<f64>() / k as f64;
        let caps = self.level.sizes[..k - 1].iter().map(|&size| 2.0 * size as f64);
        self.rho * (mean + block.excess.iter().zip(caps).map(|(over, cap)| over * cap).sum::<f64>())
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>()
}

fn assemble(e: usize, block: &Block, squares: &[Vec<f64>]) -> Vec<f64> {
    lay_out(e, &squares[block.a], &block.across, &squares[block.b])
}

/// The symmetric `[2E, 2E]` matrix of two squares and what lies across.
fn lay_out(e: usize, first: &[f64], across: &[f64], second: &[f64]) -> Vec<f64> {
    let mut whole = vec![0.0; 4 * e * e];
    for i in 0..e {
        whole[i * 2 * e..][..e].copy_from_slice(&first[i * e..][..e]);
        whole[i * 2 * e + e..][..e].copy_from_slice(&across[i * e..][..e]);
        whole[(e + i) * 2 * e + e..][..e].copy_from_slice(&second[i * e..][..e]);
        for j in 0..e {
            whole[(e + i) * 2 * e + j] = across[j * e + i];
        }
    }
    whole
}

/// Takes the means of rows and columns out of each of the four squares: for classes of equal size Z has none.
fn center(v: &mut [f64], e: usize) {
    let n = 2 * e;
    for i in 0..n {
        for half in [0, e] {
            let row = &mut v[i * n + half..][..e];
            let mean = row.iter().sum::<f64>() / e as f64;
            row.iter_mut().for_each(|x| *x -= mean);
        }
    }
    for half in [0, e] {
        let mut means = vec![0.0; n];
        for i in half..half + e {
            means.iter_mut().zip(&v[i * n..][..n]).for_each(|(mean, x)| *mean += x / e as f64);
        }
        for i in half..half + e {
            v[i * n..][..n].iter_mut().zip(&means).for_each(|(x, mean)| *x -= mean);
        }
    }
}
