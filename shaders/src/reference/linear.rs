use super::{Factors, dot};
use crate::params::Linear;

/// `y[t, n] = (x[t] . w[n] (+ bias[n])) * scale (+ residual[t, n])` for each of `heads` heads with its own `w`
/// `[N, K]` and its own stretches of `x` and `y`, of which products are of `factors`.
pub fn linear(
    p: &Linear,
    (heads, factors): (usize, Factors),
    x: &[f32],
    w: &[f32],
    bias: &[f32],
    residual: &[f32],
    y: &mut [f32],
) {
    let w = factors.weights(w);
    let (k, n) = (p.k4 as usize * 4, p.n4 as usize * 4);
    for row in 0..p.rows as usize {
        for head in 0..heads {
            let start = 4 * (row * p.x_stride4 as usize + head * p.x_head4 as usize);
            let input = factors.row(&x[start..][..k]);
            let out = 4 * (row * p.y_stride4 as usize + (p.y_offset4 as usize + head * p.y_head4 as usize));
            for column in 0..n {
                let mut value = dot(&input, &w[(head * n + column) * k..][..k]);
                if p.has_bias != 0 {
                    value += bias[head * n + column];
                }
                value *= p.scale;
                if p.has_residual != 0 {
                    value += residual[out + column];
                }
                y[out + column] = value;
            }
        }
    }
}
