//! One edge's matrix: two layers' squares, what lies across, and the border of labels.

use crate::cost::Edge;

/// Sizes of a block: E experts of either layer, and the classes of the border (0: none).
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) experts: usize,
    pub(super) border: usize,
}

impl Shape {
    /// n: rows and columns.
    pub(super) fn side(self) -> usize {
        2 * self.experts + self.border
    }

    /// The symmetric `[n, n]` matrix of two squares `[E, E]`, what lies across `[E, E]`, and labels `[E, border]`; the
    /// border's own corner is the identity.
    pub(super) fn lay_out(self, squares: [&[f64]; 2], across: &[f64], labels: [&[f64]; 2]) -> Vec<f64> {
        let (e, k, n) = (self.experts, self.border, self.side());
        let mut whole = vec![0.0; n * n];
        for i in 0..e {
            whole[i * n..][..e].copy_from_slice(&squares[0][i * e..][..e]);
            whole[i * n + e..][..e].copy_from_slice(&across[i * e..][..e]);
            whole[(e + i) * n + e..][..e].copy_from_slice(&squares[1][i * e..][..e]);
            for j in 0..e {
                whole[(e + i) * n + j] = across[j * e + i];
            }
        }
        for (layer, labels) in labels.into_iter().enumerate().filter(|_| k > 0) {
            for (i, row) in labels.chunks_exact(k).enumerate() {
                let at = layer * e + i;
                whole[at * n + 2 * e..][..k].copy_from_slice(row);
                row.iter().enumerate().for_each(|(g, x)| whole[(2 * e + g) * n + at] = *x);
            }
        }
        (2 * e..n).for_each(|at| whole[at * (n + 1)] = 1.0);
        whole
    }
}

/// One edge's matrix under ADMM.
pub(super) struct Block {
    pub(super) a: usize,
    pub(super) b: usize,
    /// `[E, E]` weights from a's experts to b's.
    pub(super) weight: Vec<f64>,
    /// `[E, E]` the off-diagonal square of Y.
    pub(super) across: Vec<f64>,
    /// `[n, n]` Z + J/k.
    pub(super) z: Vec<f64>,
    /// `[n, n]` scaled multipliers.
    pub(super) u: Vec<f64>,
    /// Eigenvalues of U above 0, on what Z does not take to 0.
    pub(super) excess: Vec<f64>,
}

impl Block {
    pub(super) fn new(shape: Shape, edge: &Edge, across: Vec<f64>) -> Self {
        let n = shape.side();
        Self {
            a: edge.from,
            b: edge.to,
            weight: edge.weight.clone(),
            across,
            z: Vec::new(),
            u: vec![0.0; n * n],
            excess: Vec::new(),
        }
    }
}

/// (I - qqᵀ) V (I - qqᵀ) for a unit vector q and a symmetric `[n, n]` V.
pub(super) fn without(v: &mut [f64], q: &[f64]) {
    let n = q.len();
    let w: Vec<f64> = v.chunks_exact(n).map(|row| super::dot(row, q)).collect();
    let s = super::dot(&w, q);
    for (i, row) in v.chunks_exact_mut(n).enumerate() {
        let (qi, wi) = (q[i], w[i]);
        row.iter_mut().zip(q.iter().zip(&w)).for_each(|(x, (q, w))| *x -= qi * w + wi * q - s * qi * q);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_out_is_gone() {
        let shape = Shape { experts: 2, border: 1 };
        let squares = [1.0, 0.5, 0.5, 1.0];
        let mut v = shape.lay_out([&squares, &squares], &[0.1, 0.2, 0.3, 0.4], [&[0.6, 0.7], &[0.8, 0.9]]);
        assert_eq!(v[4 * 5..], [0.6, 0.7, 0.8, 0.9, 1.0]);
        assert!((0..25).all(|at| v[at] == v[at % 5 * 5 + at / 5]));
        let q = [0.5f64; 4].iter().copied().chain([0.0]).collect::<Vec<_>>();
        without(&mut v, &q);
        assert!(v.chunks_exact(5).all(|row| super::super::dot(row, &q).abs() < 1e-12));
    }
}
