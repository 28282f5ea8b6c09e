use super::{dot, seen};
use crate::params::{ExpertDown, Pair, Tile};

/// `partial[slot] = weight * scale * (w2[expert] a[pair] (+ b2[expert]))` for the pairs of `tiles`; `w2` `[experts, H, I]`.
/// Rows of `a` are rounded to bytes where `rounds`.
pub fn expert_down(
    (p, rounds): (&ExpertDown, bool),
    pairs: &[Pair],
    tiles: &[Tile],
    a: &[f32],
    w2: &[f32],
    b2: &[f32],
    partials: &mut [f32],
) {
    let (i, h) = (p.i4 as usize * 4, p.h4 as usize * 4);
    for tile in &tiles[p.first_tile as usize..] {
        let expert = tile.expert.wrapping_sub(p.first_expert) as usize;
        if expert >= p.experts as usize {
            continue;
        }
        for index in tile.first as usize..(tile.first + tile.count) as usize {
            let (pair, input) = (&pairs[index], seen(&a[index * i..][..i], rounds));
            for column in 0..h {
                let bias = if p.has_bias != 0 { b2[expert * h + column] } else { 0.0 };
                let sum = dot(&input, &w2[(expert * h + column) * i..][..i]);
                partials[pair.slot as usize * h + column] = pair.weight * p.scale * (sum + bias);
            }
        }
    }
}
