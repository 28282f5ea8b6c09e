use crate::params::MatrixProbe;

/// `out = out + rounds * a * b` for every matrix of `side` columns of `side` rows in `out`; `factors` holds `a` and `b`.
pub fn matrix_probe(p: &MatrixProbe, side: usize, factors: &[f32], out: &mut [f32]) {
    let (a, b) = factors.split_at(side * side);
    for matrix in out.chunks_exact_mut(side * side) {
        for (index, value) in matrix.iter_mut().enumerate() {
            let (row, column) = (index % side, index / side);
            let product: f32 = (0..side).map(|k| a[row + k * side] * b[k + column * side]).sum();
            *value += p.rounds as f32 * product;
        }
    }
}
