use super::dot;
use crate::params::Linear;

/// `y[t, n] = x[t] . w[n] (+ bias[n]) (+ residual[t, n])`; `x` `[T, K]`, `w` `[N, K]`, `y` `[T, N]`.
pub fn linear(p: &Linear, x: &[f32], w: &[f32], bias: &[f32], residual: &[f32], y: &mut [f32]) {
    let (k, n) = (p.k4 as usize * 4, p.n4 as usize * 4);
    for row in 0..p.rows as usize {
        for column in 0..n {
            let mut value = dot(&x[row * k..][..k], &w[column * k..][..k]);
            if p.has_bias != 0 {
                value += bias[column];
            }
            if p.has_residual != 0 {
                value += residual[row * n + column];
            }
            y[row * n + column] = value;
        }
    }
}
