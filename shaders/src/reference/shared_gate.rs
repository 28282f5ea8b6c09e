use super::dot;
use crate::params::{Pair, SharedGate};

/// `weight = sigmoid(x[row] . w)` for `count` pairs from `first` on.
pub fn shared_gate(p: &SharedGate, x: &[f32], w: &[f32], pairs: &mut [Pair]) {
    let h = p.h4 as usize * 4;
    for pair in &mut pairs[p.first as usize..(p.first + p.count) as usize] {
        let value = dot(&x[pair.row as usize * h..][..h], &w[..h]);
        pair.weight = 1.0 / (1.0 + (-value).exp());
    }
}
