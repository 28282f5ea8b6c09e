use super::dot;
use crate::KV_BLOCK;
use crate::params::{Attention, Query};

/// Causal attention of each token over its own context in the paged cache; softmax over all positions of the window
/// (and the head's sink) at once.
#[allow(clippy::too_many_arguments, reason = "one per binding")]
pub fn attention(
    p: &Attention,
    heads: usize,
    q: &[f32],
    cache: &[f32],
    queries: &[Query],
    block_table: &[u32],
    sinks: &[f32],
    out: &mut [f32],
) {
    let (d, v) = (p.d4 as usize * 4, p.v4 as usize * 4);
    for (token, query) in queries.iter().enumerate() {
        let table = &block_table[(query.table_row * p.table_stride) as usize..];
        let row = |position: usize| {
            let slot = table[position / KV_BLOCK] as usize * KV_BLOCK + position % KV_BLOCK;
            &cache[slot * p.cache_stride4 as usize * 4..][..p.cache_stride4 as usize * 4]
        };
        let last = query.position as usize;
        let seen = (last + 1).saturating_sub(p.window as usize)..=last;
        for head in 0..heads {
            let key_head = head / p.group as usize;
            let value = 4 * (p.v_offset4 as usize + key_head * p.v_head4 as usize);
            let q_row = &q[token * p.q_stride4 as usize * 4 + head * d..][..d];
            let scores: Vec<f32> =
                seen.clone().map(|i| dot(q_row, &row(i)[key_head * d..][..d]) * p.scale).collect();
            let sink = if p.has_sinks != 0 { sinks[head] } else { f32::MIN };
            let largest = scores.iter().copied().fold(sink, f32::max);
            let mut denominator: f32 = scores.iter().map(|s| (s - largest).exp()).sum();
            if p.has_sinks != 0 {
                denominator += (sink - largest).exp();
            }
            for column in 0..v {
                let weighted = scores.iter().zip(seen.clone());
                let sum: f32 = weighted.map(|(s, i)| (s - largest).exp() * row(i)[value + column]).sum();
                out[(token * heads + head) * v + column] = sum / denominator;
            }
        }
    }
}
