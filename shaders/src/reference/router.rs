use super::{dot, norm};
use crate::params::{Norm, Pair, Router, Tile, score};

/// The norm of each row, the scores of all experts, the choice of top-k (ties to the lower index) and their weights, largest
/// first. `constants` are the norm's weight and bias `[2, H]`, `w` `[E, H]`, then bias and correction `[2, E]`; `chosen` and
/// `weights` `[T, K]`. Where lists are wanted, there is one row, whose pairs come by expert, each in a tile of its own.
#[allow(clippy::too_many_arguments, reason = "one per binding")]
pub fn router(
    p: &Router,
    constants: &[f32],
    chosen: &mut [u32],
    weights: &mut [f32],
    pairs: &mut [Pair],
    tiles: &mut [Tile],
    launches: &mut [u32; 6],
    x: &mut [f32],
    y: &mut [f32],
) {
    let (h, experts, top_k) = (p.h4 as usize * 4, p.experts as usize, p.top_k as usize);
    let (norms, rest) = constants.split_at(2 * h);
    let (w, bias) = rest.split_at(experts * h);
    let rows = chosen.len() / top_k;
    let of_norm = Norm { width: p.width, width4: p.h4, centred: p.centred, eps: p.eps, ..Norm::default() };
    norm(&of_norm, rows, &[], &[], &[], &[], &norms[..h], &norms[h..], x, y);
    for row in 0..rows {
        let product = |e: usize| dot(&y[row * h..][..h], &w[e * h..][..h]);
        let biased = |e: usize| product(e) + if p.has_bias != 0 { bias[e] } else { 0.0 };
        let scored = |e: usize| match p.score {
            score::SIGMOID => 1.0 / (1.0 + (-biased(e)).exp()),
            _ => biased(e),
        };
        let scores: Vec<f32> = (0..experts).map(scored).collect();
        let corrected = |e: usize| scores[e] + if p.has_correction != 0 { bias[experts + e] } else { 0.0 };
        let mut choice: Vec<Option<f32>> = (0..experts).map(|e| Some(corrected(e))).collect();
        keep_best_groups(p, &mut choice);

        let mut picked: Vec<(usize, f32)> = Vec::new();
        for _ in 0..top_k {
            let best = first_largest(&choice);
            picked.push((best, weight(p, &scores, &choice, best)));
            choice[best] = None;
        }
        if p.score == score::SOFTMAX_OF_CHOSEN {
            let largest = picked[0].1;
            picked.iter_mut().for_each(|(_, weight)| *weight = (*weight - largest).exp());
        }
        let sum: f32 = picked.iter().map(|(_, weight)| weight).sum();
        let divisor = if p.renormalise != 0 || p.score == score::SOFTMAX_OF_CHOSEN { sum } else { 1.0 };
        picked.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (k, (expert, weight)) in picked.into_iter().enumerate() {
            chosen[row * top_k + k] = expert as u32;
            weights[row * top_k + k] = weight / divisor * p.scale;
        }
    }
    if p.lists != 0 {
        let mut order: Vec<usize> = (0..top_k).collect();
        order.sort_by_key(|&k| chosen[k]);
        for (at, &k) in order.iter().enumerate() {
            pairs[at] = Pair { row: 0, slot: k as u32, weight: weights[k], expert: chosen[k] };
            tiles[at] = Tile { expert: chosen[k], first: at as u32, count: 1, pad: 0 };
        }
        *launches = [p.top_k, p.up_groups, 1, p.top_k, p.down_groups, 1];
    }
}

fn first_largest(choice: &[Option<f32>]) -> usize {
    (1..choice.len()).fold(0, |best, e| if choice[e] > choice[best] { e } else { best })
}

fn keep_best_groups(p: &Router, choice: &mut [Option<f32>]) {
    if p.groups <= 1 {
        return;
    }
    let size = choice.len() / p.groups as usize;
    let of_group = |group: &[Option<f32>]| {
        let mut sorted: Vec<f32> = group.iter().flatten().copied().collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.iter().take(p.group_best as usize).sum::<f32>()
    };
    let mut groups: Vec<(usize, f32)> = choice.chunks(size).map(of_group).enumerate().collect();
    groups.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (group, _) in groups.drain(p.groups_kept as usize..) {
        choice[group * size..(group + 1) * size].fill(None);
    }
}

fn weight(p: &Router, scores: &[f32], choice: &[Option<f32>], best: usize) -> f32 {
    match p.score {
        score::SOFTMAX => {
            let largest = scores.iter().copied().fold(f32::MIN, f32::max);
            let sum: f32 = scores.iter().map(|s| (s - largest).exp()).sum();
            (scores[best] - largest).exp() / sum
        }
        score::SPARSEMIXER => {
            let largest = scores[best];
            let near = |e: &usize| (largest - scores[*e]) / scores[*e].abs().max(largest) <= p.threshold;
            let counted = (0..scores.len()).filter(|&e| choice[e].is_some()).filter(near);
            1.0 / counted.map(|e| (scores[e] - largest).exp()).sum::<f32>()
        }
        _ => scores[best],
    }
}
