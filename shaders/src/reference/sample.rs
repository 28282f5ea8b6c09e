use crate::params::{Draw, Sample};

/// Draws a token for each row that wants one; `logits` `[T, stride]`, `draws` `[T]`.
pub fn sample(p: &Sample, logits: &[f32], draws: &[Draw], chosen: &mut [u32]) {
    for ((row, draw), token) in draws.iter().enumerate().zip(chosen) {
        if draw.scale > 0.0 {
            *token = drawn(&logits[row * p.stride as usize..][..p.vocab as usize], draw);
        }
    }
}

/// The token that `draw` takes from `logits` `[V]`, of which there is one at least: the definition that host and device
/// share. Likelier is who has the greater logit, among equal ones the lower id; the random number counts the likelihoods
/// of what is left in the order of ids.
pub fn drawn(logits: &[f32], draw: &Draw) -> u32 {
    let largest = logits.iter().copied().max_by(f32::total_cmp).unwrap_or(0.0);
    let at = |id: u32| likelihood(largest - logits[id as usize], draw.scale);
    let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut left: Vec<u32> = (0..logits.len() as u32).collect();
    let top_k = draw.top_k as usize;
    if top_k > 0 && top_k < left.len() {
        left.select_nth_unstable_by(top_k - 1, likelier);
        left.truncate(top_k);
    }
    let sum = |of: &[u32]| of.iter().map(|id| u64::from(at(*id))).sum::<u64>();
    if draw.top_p < 1 << 24 {
        let goal = ((sum(&left) >> 8) * u64::from(draw.top_p)) >> 16;
        left.sort_unstable_by(likelier);
        let mut reached = 0;
        let enough = |id: &u32| {
            reached += u64::from(at(*id));
            reached >= goal
        };
        let kept = left.iter().position(enough).map_or(left.len(), |last| last + 1);
        left.truncate(kept);
    }
    left.retain(|id| at(*id) >= draw.min_p);
    left.sort_unstable();
    let mut rest = ((u128::from(sum(&left)) * u128::from(draw.unit)) >> 32) as u64;
    let is_it = |id: &&u32| {
        let one = u64::from(at(**id));
        let it = rest < one;
        rest = rest.wrapping_sub(one);
        it
    };
    left.iter().find(is_it).copied().unwrap_or(0)
}

/// 2^30 * 2^-(below * scale), `below` being how far a logit is below the largest one.
fn likelihood(below: f32, scale: f32) -> u32 {
    let bits = (below * scale).to_bits();
    let exponent = bits >> 23;
    // From 32 on there is nothing left; below 2^-24 nothing is lost.
    if !(103..132).contains(&exponent) {
        return if exponent < 103 { 1 << 30 } else { 0 };
    }
    let mantissa = (bits & 0x7f_ffff) | 0x80_0000;
    // The product in 2^-24ths.
    let fixed = if exponent >= 126 { mantissa << (exponent - 126) } else { mantissa >> (126 - exponent) };
    let f = fixed << 8;
    let high = |a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32;
    // 2^-f = 1 - f (ln 2 - f (ln^2 2 / 2! - ...)), in 2^-32nds.
    let s = LN2_POWERS.iter().fold(0, |s, power| power - high(f, s));
    ((1 << 30) - (high(f, s) >> 2)) >> (fixed >> 24)
}

/// `ln(2)^n / n!` in 2^-32nds, from n = 8 to 1.
const LN2_POWERS: [u32; 8] =
    [5676, 65510, 661_577, 5_726_720, 41_309_550, 238_388_332, 1_031_764_991, 2_977_044_472];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods_fall_from_one_and_are_those_of_the_exponential() {
        let mut before = u32::MAX;
        for i in 0..200_000 {
            let below = i as f32 * 2e-4;
            let got = likelihood(below, 1.0);
            let expected = 2f64.powf(30.0 - f64::from(below));
            assert!((f64::from(got) - expected).abs() < 4.0 + 1e-6 * expected, "{below}: {got}, {expected}");
            assert!(got <= before, "{below}");
            before = got;
        }
        assert_eq!((likelihood(0.0, 1e9), likelihood(1.0, 1.0)), (1 << 30, 1 << 29));
        assert_eq!((likelihood(f32::INFINITY, 1.0), likelihood(1e30, 1e30)), (0, 0));
    }
}
