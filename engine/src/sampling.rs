//! How the next token is chosen from a row of logits. Random numbers are a function of seed and position, so that a
//! text is the same wherever its tokens are sampled; what is drawn with them is one function of integers, which the device
//! runs as `sample.wgsl` and the host, where a repetition penalty asks for it or devices are CPUs, as that kernel's twin.

use exflow_shaders::params::Draw;
use exflow_shaders::reference;
use serde::{Deserialize, Serialize};

/// What a request asks of the choice. The filters act in this order: repetition penalty, temperature, top-k, top-p,
/// min-p.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// What logits are divided by; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1: all.
    pub top_p: f32,
    /// Only tokens at least this likely, as a share of the likeliest one's probability; 0: all.
    pub min_p: f32,
    /// Logits of tokens that are there already are divided by it where positive, else multiplied
    /// (Keskar et al. 2019, arXiv 1909.05858); 1: none.
    pub repetition_penalty: f32,
    /// Of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// What is wrong with it and what to do about it.
    pub fn check(&self) -> Result<(), (String, &'static str)> {
        let unit = |x: f32| (0.0..=1.0).contains(&x);
        match self {
            s if !(0.0..=1e4).contains(&s.temperature) => {
                Err((format!("temperature {}", s.temperature), "use 0 or more, 1 as a rule"))
            }
            s if !unit(s.top_p) || s.top_p == 0.0 => {
                Err((format!("top-p {}", s.top_p), "use above 0, up to 1"))
            }
            s if !unit(s.min_p) => Err((format!("min-p {}", s.min_p), "use 0 to 1")),
            s if !(1e-3..=1e3).contains(&s.repetition_penalty) => {
                Err((format!("repetition penalty {}", s.repetition_penalty), "use 0.001 to 1000, 1 for none"))
            }
            _ => Ok(()),
        }
    }

    /// Whether a device can choose by itself; it knows nothing of the tokens before.
    pub(crate) fn on_device(&self) -> bool {
        self.repetition_penalty == 1.0
    }

    /// How the token for `position` is drawn; nothing is at temperature 0.
    pub(crate) fn draw(&self, position: u32) -> Draw {
        if self.temperature == 0.0 {
            return Draw::default();
        }
        let share = |of: f32, bits: u32| (f64::from(of) * f64::from(1u32 << bits)).round() as u32;
        Draw {
            // Beyond 2^60 every difference of logits is one of all or nothing.
            scale: (std::f32::consts::LOG2_E / self.temperature).min(2f32.powi(60)),
            top_k: u32::try_from(self.top_k).unwrap_or(0),
            top_p: share(self.top_p, 24).max(1),
            min_p: share(self.min_p, 30),
            unit: uniform(self.seed, position),
        }
    }

    /// The token for `position`, from its `logits` `[V]` and the ids before it.
    pub(crate) fn choose(&self, logits: &[f32], before: impl Iterator<Item = u32>, position: u32) -> u32 {
        let mut scores = logits.to_vec();
        if self.repetition_penalty != 1.0 {
            let mut seen: Vec<u32> = before.collect();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                if let Some(score) = scores.get_mut(id as usize) {
                    let penalty = self.repetition_penalty;
                    *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
                }
            }
        }
        let draw = self.draw(position);
        if draw.scale > 0.0 {
            return reference::drawn(&scores, &draw);
        }
        let likelier = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
        (0..scores.len() as u32).min_by(likelier).unwrap_or(0)
    }
}

/// How likely a token was, by the model alone: before temperature, penalty and filters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// The likeliest tokens with theirs, likeliest first, equal ones by id.
    pub top: Vec<(u32, f32)>,
}

/// Alternatives that a request may ask for with each token.
pub const MAX_LOGPROBS: usize = 20;

impl Logprobs {
    /// Of `token` and of the `top` likeliest, from `logits` `[V]`.
    pub(crate) fn of(logits: &[f32], token: u32, top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
        let normaliser = f64::from(largest) + sum.ln();
        let logprob = |id: u32| (f64::from(logits[id as usize]) - normaliser) as f32;
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let top = top.min(order.len());
        if top > 0 && top < order.len() {
            order.select_nth_unstable_by(top - 1, likelier);
        }
        order.truncate(top);
        order.sort_unstable_by(likelier);
        Self { logprob: logprob(token), top: order.into_iter().map(|id| (id, logprob(id))).collect() }
    }
}

/// A number in 0..1 for (seed, position), in 2^32nds: SplitMix64's finaliser (Steele, Lea and Flood 2014), twice.
fn uniform(seed: u64, position: u32) -> u32 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let golden = 0x9e37_79b9_7f4a_7c15u64;
    let z = mix(mix(seed.wrapping_add(golden)).wrapping_add(golden.wrapping_mul(u64::from(position) + 1)));
    (z >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -4.0];

    fn counts(sampling: &Sampling, logits: &[f32]) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        (0..20_000).for_each(|p| counts[sampling.choose(logits, std::iter::empty(), p) as usize] += 1);
        counts
    }

    #[test]
    fn at_temperature_0_the_first_of_the_likeliest_is_taken() {
        let sampling = Sampling { top_k: 1, seed: 9, ..Sampling::default() };
        assert_eq!(sampling.choose(&LOGITS, std::iter::empty(), 3), 1);
    }

    #[test]
    fn tokens_come_as_often_as_their_probabilities_say() {
        let sampling = Sampling { temperature: 2.0, seed: 4, ..Sampling::default() };
        let weights: Vec<f64> = LOGITS.iter().map(|&x| (f64::from(x) / 2.0).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts(&sampling, &LOGITS).into_iter().zip(weights) {
            let expected = 20_000.0 * weight / total;
            assert!((count as f64 - expected).abs() < 5.0 * expected.sqrt() + 5.0, "{count} for {expected}");
        }
    }

    #[test]
    fn each_filter_leaves_what_it_says() {
        let hot = Sampling { temperature: 1.0, ..Sampling::default() };
        let drawn = |sampling: Sampling| -> Vec<usize> {
            let counts = counts(&sampling, &LOGITS);
            (0..counts.len()).filter(|&id| counts[id] > 0).collect()
        };
        assert_eq!(drawn(Sampling { top_k: 3, ..hot.clone() }), [1, 2, 3]);
        assert_eq!(drawn(Sampling { top_k: 1, ..hot.clone() }), [1]);
        // Probabilities: 0.40 0.40 0.15 0.05 0.0004.
        assert_eq!(drawn(Sampling { top_p: 0.5, ..hot.clone() }), [1, 3]);
        assert_eq!(drawn(Sampling { top_p: 0.9, ..hot.clone() }), [1, 2, 3]);
        assert_eq!(drawn(Sampling { min_p: 0.3, ..hot.clone() }), [1, 2, 3]);
        assert_eq!(drawn(Sampling { min_p: 1.0, ..hot }), [1, 3]);
    }

    #[test]
    fn what_was_said_is_said_less() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(sampling.choose(&LOGITS, [1, 3, 3].into_iter(), 7), 2);
        assert_eq!(sampling.choose(&[-1.0, -1.5], [0].into_iter(), 7), 1, "negative logits sink too");
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let found = Logprobs::of(&LOGITS, 2, 3);
        let total: f64 = LOGITS.iter().map(|&x| f64::from(x).exp()).sum();
        let expected = |id: usize| (f64::from(LOGITS[id]) - total.ln()) as f32;
        assert!((found.logprob - expected(2)).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 2], "equal ones by id");
        assert!(found.top.iter().all(|&(id, p)| (p - expected(id as usize)).abs() < 1e-6));
        assert!(Logprobs::of(&LOGITS, 0, 0).top.is_empty());
        assert_eq!(Logprobs::of(&LOGITS, 0, 99).top.len(), LOGITS.len());
    }

    #[test]
    fn draws_depend_on_seed_and_position_alone() {
        let draw = |seed, p| {
            Sampling { temperature: 1.0, seed, ..Sampling::default() }.choose(
                &[0.0; 64],
                std::iter::empty(),
                p,
            )
        };
        let text = |seed| (0..40).map(|p| draw(seed, p)).collect::<Vec<_>>();
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }
}
