//! Projection on matrices with bounded eigenvalues: the one place that knows how they are found.

use faer::{MatRef, Side};

/// A symmetric matrix V = Z + U with Z's eigenvalues in `[0, top]`, and those above it left in U.
pub(crate) struct Projection {
    /// `[n, n]` row-major: V's part within the bounds.
    pub(crate) inside: Vec<f64>,
    /// What V's eigenvalues exceed `top` by, falling; only those that do.
    pub(crate) excess: Vec<f64>,
}

/// Projects `matrix` `[n, n]` (symmetric). None where the eigenvalues cannot be found.
pub(crate) fn project(matrix: &[f64], n: usize, top: f64) -> Option<Projection> {
    let eigen = MatRef::from_row_major_slice(matrix, n, n).self_adjoint_eigen(Side::Lower).ok()?;
    let values: Vec<f64> = (0..n).map(|i| eigen.S()[i]).collect();
    let kept: Vec<usize> = (0..n).filter(|&i| values[i] > 0.0).collect();
    let vectors = eigen.U();
    let scaled = faer::Mat::from_fn(n, kept.len(), |i, j| vectors[(i, kept[j])] * values[kept[j]].min(top));
    let plain = faer::Mat::from_fn(n, kept.len(), |i, j| vectors[(i, kept[j])]);
    let product = scaled * plain.transpose();
    let inside = (0..n * n).map(|at| product[(at / n, at % n)]).collect();
    let mut excess: Vec<f64> = values.iter().map(|value| value - top).filter(|&over| over > 0.0).collect();
    excess.sort_by(|a, b| b.total_cmp(a));
    Some(Projection { inside, excess })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clips_eigenvalues() {
        // eigenvalues 3 (1,1) and -1 (1,-1)
        let projection = project(&[1.0, 2.0, 2.0, 1.0], 2, 2.0).unwrap();
        let expected = [1.0, 1.0, 1.0, 1.0];
        assert!(projection.inside.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12));
        assert!((projection.excess[0] - 1.0).abs() < 1e-12);
    }
}
