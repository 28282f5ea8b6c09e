use super::dot;
use crate::KV_BLOCK;
use crate::params::{Attention, Query};

/// Causal attention of each token over its own context in the paged cache; softmax over all positions at once.
pub fn attention(
    p: &Attention,
    q: &[f32],
    cache: &[f32],
    queries: &[Query],
    block_table: &[u32],
    out: &mut [f32],
) {
    let (heads, d) = (p.heads as usize, p.d4 as usize * 4);
    let kv = heads * d;
    for (token, query) in queries.iter().enumerate() {
        let table = &block_table[(query.table_row * p.table_stride) as usize..];
        let slot = |position: usize| table[position / KV_BLOCK] as usize * KV_BLOCK + position % KV_BLOCK;
        for head in 0..heads {
            let q_row = &q[token * p.q_stride4 as usize * 4 + head * d..][..d];
            let scores: Vec<f32> = (0..=query.position as usize)
                .map(|i| dot(q_row, &cache[slot(i) * 2 * kv + head * d..][..d]) * p.scale)
                .collect();
            let largest = scores.iter().copied().fold(f32::MIN, f32::max);
            let denominator: f32 = scores.iter().map(|s| (s - largest).exp()).sum();
            for column in 0..d {
                let sum: f32 = scores
                    .iter()
                    .enumerate()
                    .map(|(i, s)| (s - largest).exp() * cache[(slot(i) * 2 + 1) * kv + head * d + column])
                    .sum();
                out[token * kv + head * d + column] = sum / denominator;
            }
        }
    }
}
