use super::dot;
use crate::params::Router;

/// Softmax over the experts, then the top-k, ties to the lower index; `chosen` and `weights` `[T, K]`.
pub fn router(p: &Router, x: &[f32], w: &[f32], chosen: &mut [u32], weights: &mut [f32]) {
    let (h, experts, top_k) = (p.h4 as usize * 4, p.experts as usize, p.top_k as usize);
    for row in 0..p.rows as usize {
        let mut scores: Vec<f32> = (0..experts).map(|e| dot(&x[row * h..][..h], &w[e * h..][..h])).collect();
        let largest = scores.iter().copied().fold(f32::MIN, f32::max);
        let denominator: f32 = scores.iter().map(|s| (s - largest).exp()).sum();
        let picked = &mut weights[row * top_k..][..top_k];
        for k in 0..top_k {
            let best = (1..experts).fold(0, |best, e| if scores[e] > scores[best] { e } else { best });
            chosen[row * top_k + k] = best as u32;
            picked[k] = (scores[best] - largest).exp() / denominator;
            scores[best] = f32::MIN;
        }
        if p.renormalise != 0 {
            let sum: f32 = picked.iter().sum();
            picked.iter_mut().for_each(|weight| *weight /= sum);
        }
    }
}
