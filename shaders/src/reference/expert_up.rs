use super::{Factors, activate, dot};
use crate::Activation;
use crate::params::{ExpertUp, Pair, Tile};

/// `a[pair] = activation(w1[expert] x[row] (+ b1[expert]))` for the pairs of `tiles`; `w1` `[experts, matrices, I, H]`.
/// Products are of `factors`.
#[allow(clippy::too_many_arguments, reason = "one per binding")]
pub fn expert_up(
    p: &ExpertUp,
    (activation, factors): (Activation, Factors),
    pairs: &[Pair],
    tiles: &[Tile],
    x: &[f32],
    w1: &[f32],
    b1: &[f32],
    a: &mut [f32],
) {
    let w1 = factors.weights(w1);
    let (h, i, matrices) = (p.h4 as usize * 4, p.i4 as usize * 4, activation.matrices());
    for tile in &tiles[p.first_tile as usize..] {
        let expert = tile.expert.wrapping_sub(p.first_expert);
        if expert >= p.experts {
            continue;
        }
        for index in tile.first as usize..(tile.first + tile.count) as usize {
            let input = factors.row(&x[pairs[index].row as usize * h..][..h]);
            for column in 0..i {
                let product = |matrix: usize| {
                    let row = (expert as usize * matrices + matrix) * i + column;
                    dot(&input, &w1[row * h..][..h]) + if p.has_bias != 0 { b1[row] } else { 0.0 }
                };
                a[index * i + column] = activate(activation, p.limit, product(0), product(matrices - 1));
            }
        }
    }
}
