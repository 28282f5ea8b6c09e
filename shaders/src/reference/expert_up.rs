use super::{dot, gelu};
use crate::params::{ExpertUp, Pair, Tile};

/// `a[pair] = gelu(w1[expert] x[row] + b1[expert])` for the pairs of `tiles`; `w1` `[experts, I, H]`.
pub fn expert_up(
    p: &ExpertUp,
    pairs: &[Pair],
    tiles: &[Tile],
    x: &[f32],
    w1: &[f32],
    b1: &[f32],
    a: &mut [f32],
) {
    let (h, i) = (p.h4 as usize * 4, p.i4 as usize * 4);
    for tile in &tiles[p.first_tile as usize..] {
        let expert = tile.expert as usize;
        for index in tile.first as usize..(tile.first + tile.count) as usize {
            let input = &x[pairs[index].row as usize * h..][..h];
            for column in 0..i {
                let sum = dot(input, &w1[(expert * i + column) * h..][..h]);
                a[index * i + column] = gelu(sum + b1[expert * i + column]);
            }
        }
    }
}
