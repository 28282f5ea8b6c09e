//! The chordal doubly nonnegative bound: how much pair weight can stay inside classes of known sizes.
//!
//! Y[i][j] = 1 where experts i and j (of any layers) share a class, Y = X Xᵀ, X[i][g] = 1 where i is in class g. Relaxed:
//! for every edge between layers A and B the block of Y, less J/k (k classes), is positive semidefinite with bounded
//! eigenvalues; 0 <= Y <= 1, diagonal 1, rows of a layer sum to a class size. Blocks of neighbouring edges share the
//! square of their common layer. The chain of layers is chordal, so no more than these blocks is needed of "Y is
//! positive semidefinite"; sign constraints of layers apart are dropped.
//!
//! Classes of one size m: the block is [2E, 2E] and its rows sum to m, so that both layers' vectors of ones are
//! eigenvectors. Classes of different sizes m_g: X itself is carried along as a border,
//!
//!   M = [X_A; X_B; I][X_A; X_B; I]ᵀ,   M (1_A; 0; -m) = M (0; 1_B; -m) = 0,   M (0; 0; 1) = (1; 1; 1),
//!
//! the matrix lifting of graph partitioning (Sotirov 2014); M's eigenvalues are at most those of I + 2 diag(m).
//!
//! Solved by ADMM between the polyhedron (Y, X) and the spectral sets (Z). For *any* multipliers U the sum of the two
//! maxima is an upper bound on the weight kept (weak duality), so the bound holds after every iteration:
//!
//!   kept <= max over the polyhedron of <W - ρU, M>  +  Σ_edges ( <ρU, J/k> + ρ Σ_i cap_i · λ_i⁺(U) )
//!
//! (von Neumann: <U, Z> <= Σ sorted eigenvalues; interlacing: Z has k-1 of them, at most cap_i.) Right after a step U's
//! positive eigenvalues are what the projection cut off, so they cost nothing more.

mod block;
mod certificate;

use crate::bound::levels::Level;
use crate::bound::spectral::project;
use crate::cost::Problem;
use block::{Block, Shape, without};

/// Over-relaxation of the steps (Boyd et al. 2011, 3.4.3).
const RELAXATION: f64 = 1.8;

/// Seconds for each row, column and inner step of a block, about: an eigendecomposition and a product (a busy desktop core).
const SECONDS_A_CELL: f64 = 2.5e-9;

/// How long a step of a level takes, about.
pub(crate) fn step_seconds(problem: &Problem, level: &Level) -> f64 {
    let border = if level.exact.is_some() && !level.equal { level.sizes.len() } else { 0 };
    let blocks = problem.edges.iter().filter(|edge| edge.from != edge.to).count();
    let side = (2 * problem.experts + border) as f64;
    SECONDS_A_CELL * blocks as f64 * side.powi(3)
}

/// Bound of one level, refined step by step.
pub(crate) struct Chordal {
    shape: Shape,
    level: Level,
    blocks: Vec<Block>,
    /// `[L]`: how many blocks share a layer's square.
    shared: Vec<usize>,
    /// `[L][E, E]` the layers' squares of Y.
    squares: Vec<Vec<f64>>,
    /// `[L][E, border]` X, where it is carried along.
    labels: Vec<Vec<f64>>,
    /// `[L][E, E]` weights inside layers.
    inner: Vec<Vec<f64>>,
    /// Orthonormal vectors that every Z takes to 0.
    null: Vec<Vec<f64>>,
    rho: f64,
    total: f64,
    best: f64,
    steps: usize,
}

impl Chordal {
    /// The relaxation of one level; `holders` `[L, E]` is a good placement to begin from.
    pub(crate) fn new(problem: &Problem, level: &Level, holders: &[u16]) -> Self {
        let (l, e) = (problem.layers, problem.experts);
        let sizes = level.exact.as_ref().filter(|_| !level.equal);
        let shape = Shape { experts: e, border: sizes.map_or(0, Vec::len) };
        let class: Vec<usize> = holders.iter().map(|&g| level.class[g as usize]).collect();
        let same = |a: usize, b: usize| -> Vec<f64> {
            (0..e * e).map(|at| f64::from(u8::from(class[a * e + at / e] == class[b * e + at % e]))).collect()
        };
        let label = |layer: usize| -> Vec<f64> {
            let k = shape.border;
            (0..e * k).map(|at| f64::from(u8::from(class[layer * e + at / k] == at % k))).collect()
        };
        let mut blocks: Vec<Block> = Vec::new();
        let mut inner = vec![Vec::new(); l];
        for edge in &problem.edges {
            if edge.from == edge.to {
                inner[edge.from] = edge.weight.clone();
            } else {
                blocks.push(Block::new(shape, edge, same(edge.from, edge.to)));
            }
        }
        let mut shared = vec![0; l];
        blocks.iter().for_each(|block| [block.a, block.b].iter().for_each(|&layer| shared[layer] += 1));
        let total = blocks.iter().flat_map(|block| &block.weight).sum::<f64>()
            + (0..l).filter(|&layer| shared[layer] > 0).flat_map(|layer| &inner[layer]).sum::<f64>();
        let (squares, labels) =
            ((0..l).map(|layer| same(layer, layer)).collect(), (0..l).map(label).collect());
        let kept: f64 = blocks.iter().map(|b| dot(&b.weight, &b.across)).sum();
        let cells: f64 = blocks.iter().map(|b| b.across.iter().sum::<f64>()).sum();
        let rho = (kept / cells.max(1.0)).max(f64::MIN_POSITIVE);
        let (null, level) = (null_vectors(shape, level), level.clone());
        let (best, steps) = (0.0, 0);
        let mut bound =
            Self { shape, level, blocks, shared, squares, labels, inner, null, rho, total, best, steps };
        for at in 0..bound.blocks.len() {
            bound.blocks[at].z = bound.lay_out(&bound.blocks[at]);
        }
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

    /// Most eigenvalues of Z can be, falling, `[k-1]`.
    fn caps(&self) -> impl Iterator<Item = f64> {
        let own = if self.shape.border > 0 { 1.0 } else { 0.0 };
        let k = self.level.sizes.len();
        self.level.sizes[..k - 1].iter().map(move |&size| 2.0 * size as f64 + own)
    }

    fn lay_out(&self, block: &Block) -> Vec<f64> {
        let (a, b) = (block.a, block.b);
        let squares = [&self.squares[a][..], &self.squares[b][..]];
        self.shape.lay_out(squares, &block.across, [&self.labels[a], &self.labels[b]])
    }

    /// One iteration of ADMM and its certificate; gives up half-way, changing nothing, where `stop` says so.
    pub(crate) fn step(&mut self, stop: &dyn Fn() -> bool) {
        let (squares, labels, across) = (self.next_squares(), self.next_labels(), self.next_across());
        let n = self.shape.side();
        let (top, k) = (self.caps().fold(0.0, f64::max), self.level.sizes.len() as f64);
        let mut results = Vec::with_capacity(self.blocks.len());
        for (block, across) in self.blocks.iter().zip(&across) {
            if stop() {
                return;
            }
            let pair = [&squares[block.a][..], &squares[block.b][..]];
            let y = self.shape.lay_out(pair, across, [&labels[block.a], &labels[block.b]]);
            let relaxed = |(y, z): (&f64, &f64)| RELAXATION * y + (1.0 - RELAXATION) * z;
            let y = y.iter().zip(&block.z).map(relaxed);
            let mut v: Vec<f64> = y.zip(&block.u).map(|(y, u)| y + u - 1.0 / k).collect();
            let whole = v.clone();
            self.null.iter().for_each(|q| without(&mut v, q));
            let Some(projection) = project(&v, n, top) else { return };
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
        (self.squares, self.labels) = (squares, labels);
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
        let e = self.shape.experts;
        let mut sums = self.sums(e, |offset| offset);
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

    /// X of the layers: the mean over the blocks that share each, within 0 and 1.
    fn next_labels(&self) -> Vec<Vec<f64>> {
        let mut sums = self.sums(self.shape.border, |_| 2 * self.shape.experts);
        for (labels, &shared) in sums.iter_mut().zip(&self.shared) {
            labels.iter_mut().for_each(|x| *x = (*x / shared.max(1) as f64).clamp(0.0, 1.0));
        }
        sums
    }

    /// Per layer the sum over its blocks of Z - U, `[E, width]`, of the layer's rows and of the columns that begin where
    /// `column` says for the layer's offset in the block.
    fn sums(&self, width: usize, column: impl Fn(usize) -> usize) -> Vec<Vec<f64>> {
        let (e, n) = (self.shape.experts, self.shape.side());
        let mut sums = vec![vec![0.0; e * width]; self.squares.len()];
        if width == 0 {
            return sums;
        }
        for block in &self.blocks {
            for (layer, offset) in [(block.a, 0), (block.b, e)] {
                for (i, row) in sums[layer].chunks_exact_mut(width).enumerate() {
                    let from = (offset + i) * n + column(offset);
                    let (z, u) = (&block.z[from..][..width], &block.u[from..][..width]);
                    row.iter_mut().zip(z.iter().zip(u)).for_each(|(sum, (z, u))| *sum += z - u);
                }
            }
        }
        sums
    }

    fn next_across(&self) -> Vec<Vec<f64>> {
        let (e, n) = (self.shape.experts, self.shape.side());
        let next = |block: &Block| {
            let cell = |at: usize| {
                let place = at / e * n + e + at % e;
                let pull = block.weight[at] / (2.0 * self.rho);
                (block.z[place] - block.u[place] + pull).clamp(0.0, 1.0)
            };
            (0..e * e).map(cell).collect()
        };
        self.blocks.iter().map(next).collect()
    }
}

/// An orthonormal basis of what every Z takes to 0.
fn null_vectors(shape: Shape, level: &Level) -> Vec<Vec<f64>> {
    let (e, n) = (shape.experts, shape.side());
    let of_layer = |offset: usize| -> Vec<f64> {
        let mut vector = vec![0.0; n];
        vector[offset..offset + e].fill(1.0);
        if let (Some(sizes), true) = (&level.exact, shape.border > 0) {
            vector[2 * e..].iter_mut().zip(sizes).for_each(|(x, &size)| *x = -(size as f64));
        }
        vector
    };
    let mut vectors = Vec::new();
    if level.equal || shape.border > 0 {
        vectors.extend([of_layer(0), of_layer(e)]);
    }
    if shape.border > 0 {
        let mut ones = vec![0.0; n];
        ones[2 * e..].fill(1.0);
        vectors.push(ones);
    }
    let mut basis: Vec<Vec<f64>> = Vec::new();
    for mut vector in vectors {
        for q in &basis {
            let part = dot(q, &vector);
            vector.iter_mut().zip(q).for_each(|(x, q)| *x -= part * q);
        }
        let length = dot(&vector, &vector).sqrt();
        vector.iter_mut().for_each(|x| *x /= length);
        basis.push(vector);
    }
    basis
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>()
}
