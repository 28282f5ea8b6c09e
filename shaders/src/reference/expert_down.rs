use super::{Factors, dot};
use crate::params::{ExpertDown, Pair, Tile};

/// `partial[slot] = weight * scale * (w2[expert] a[pair] (+ b2[expert]))` for the pairs of `tiles`; `w2` `[experts, H, I]`.
/// Products are of `factors`.
pub fn expert_down(
    (p, factors): (&ExpertDown, Factors),
    pairs: &[Pair],
    tiles: &[Tile],
    a: &[f32],
    w2: &[f32],
    b2: &[f32],
    partials: &mut [f32],
) {
    let w2 = factors.weights(w2);
    let (i, h) = (p.i4 as usize * 4, p.h4 as usize * 4);
    for tile in &tiles[p.first_tile as usize..] {
        let expert = tile.expert.wrapping_sub(p.first_expert) as usize;
        if expert >= p.experts as usize {
            continue;
        }
        for index in tile.first as usize..(tile.first + tile.count) as usize {
            let (pair, input) = (&pairs[index], factors.row(&a[index * i..][..i]));
            for column in 0..h {
                let bias = if p.has_bias != 0 { b2[expert * h + column] } else { 0.0 };
                let sum = dot(&input, &w2[(expert * h + column) * i..][..i]);
                partials[pair.slot as usize * h + column] = pair.weight * p.scale * (sum + bias);
            }
        }
    }
}
