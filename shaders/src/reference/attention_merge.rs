use crate::ATTENTION_SPLIT;
use crate::params::{AttentionMerge, Query};

/// Merges `parts` `[T, heads, splits, 4 + v]`: of each split its largest score, its denominator, two numbers that nobody
/// reads, and its weighted values.
pub fn attention_merge(
    p: &AttentionMerge,
    heads: usize,
    parts: &[f32],
    queries: &[Query],
    sinks: &[f32],
    out: &mut [f32],
) {
    let sink_of = |head: usize| if p.has_sinks != 0 { sinks[head] } else { f32::MIN };
    let (v, splits) = (p.v4 as usize * 4, p.splits as usize);
    for (token, query) in queries.iter().enumerate() {
        let last = query.position as usize;
        let first = (last + 1).saturating_sub(p.window as usize);
        let count = last / ATTENTION_SPLIT - first / ATTENTION_SPLIT + 1;
        for head in 0..heads {
            let row = token * heads + head;
            let of = |split: usize| &parts[(row * splits + split) * (4 + v)..][..4 + v];
            let sink = sink_of(head);
            let largest = (0..count).map(|split| of(split)[0]).fold(sink, f32::max);
            let share = |split: usize| (of(split)[0] - largest).exp();
            let mut denominator: f32 = (0..count).map(|split| of(split)[1] * share(split)).sum();
            if p.has_sinks != 0 {
                denominator += (sink - largest).exp();
            }
            for column in 0..v {
                let sum: f32 = (0..count).map(|split| of(split)[4 + column] * share(split)).sum();
                out[row * v + column] = sum / denominator;
            }
        }
    }
}
