use crate::params::{ExpertPermute, Pair, Tile};

/// Sorts the `T * K` pairs by expert, cuts them into tiles of `tile_rows`, and sizes the two expert launches.
/// Returns how many tiles there are.
pub fn expert_permute(
    p: &ExpertPermute,
    tile_rows: usize,
    chosen: &[u32],
    weights: &[f32],
    pairs: &mut [Pair],
    tiles: &mut [Tile],
    launches: &mut [u32; 6],
) -> usize {
    let mut next = 0;
    let mut tile = 0;
    for expert in 0..p.experts {
        let first = next;
        for i in (0..p.pairs as usize).filter(|&i| chosen[i] == expert) {
            pairs[next] = Pair { row: i as u32 / p.top_k, slot: i as u32, weight: weights[i], expert };
            next += 1;
        }
        for start in (first..next).step_by(tile_rows) {
            let count = tile_rows.min(next - start) as u32;
            tiles[tile] = Tile { expert, first: start as u32, count, pad: 0 };
            tile += 1;
        }
    }
    *launches = [tile as u32, p.up_groups, 1, tile as u32, p.down_groups, 1];
    tile
}
