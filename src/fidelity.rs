//! How well logits predict a text, and how far two sets of them are apart. Logits are rows of V values, as
//! [`LogitsDump`](exflow_engine::LogitsDump) has them.

use serde::Serialize;

/// Prediction of a text.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Prediction {
    /// Tokens that were predicted from those before them.
    pub tokens: usize,
    /// Mean negative log-likelihood in nats per token.
    pub nats_per_token: f64,
    /// `exp` of it.
    pub perplexity: f64,
}

/// Kullback-Leibler divergence of logits from those of a reference, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Divergence {
    /// Over all positions.
    pub mean_kl: f64,
    /// Of the worst position.
    pub max_kl: f64,
    /// Share of positions at which both find the same token likeliest.
    pub same_top: f64,
}

/// Adds up predictions over passages.
#[derive(Debug, Clone, Default)]
pub struct PredictionSum {
    tokens: usize,
    nats: f64,
}

/// Adds up divergences over passages.
#[derive(Debug, Clone, Default)]
pub struct DivergenceSum {
    rows: usize,
    sum: f64,
    max: f64,
    same: usize,
}

impl PredictionSum {
    /// `logits` `[T, vocab]` of `ids` `[T]`: row t predicts id t + 1.
    pub fn add(&mut self, ids: &[u32], logits: &[f32], vocab: usize) {
        for (row, &next) in logits.chunks_exact(vocab).zip(ids.iter().skip(1)) {
            self.nats += log_sum(row) - f64::from(row[next as usize]);
            self.tokens += 1;
        }
    }

    /// The mean; zeros before anything was added.
    pub fn mean(&self) -> Prediction {
        let nats_per_token = self.nats / self.tokens.max(1) as f64;
        Prediction { tokens: self.tokens, nats_per_token, perplexity: nats_per_token.exp() }
    }
}

impl DivergenceSum {
    /// Both `[T, vocab]`.
    pub fn add(&mut self, reference: &[f32], logits: &[f32], vocab: usize) {
        for (p, q) in reference.chunks_exact(vocab).zip(logits.chunks_exact(vocab)) {
            let (p_sum, q_sum) = (log_sum(p), log_sum(q));
            let term = |(p, q): (&f32, &f32)| {
                let log_p = f64::from(*p) - p_sum;
                log_p.exp() * (log_p - (f64::from(*q) - q_sum))
            };
            // Rounding may leave a sum just below zero, which no divergence is.
            let kl = p.iter().zip(q).map(term).sum::<f64>().max(0.0);
            self.sum += kl;
            self.max = self.max.max(kl);
            self.same += usize::from(likeliest(p) == likeliest(q));
            self.rows += 1;
        }
    }

    /// Mean and worst; zeros before anything was added.
    pub fn result(&self) -> Divergence {
        let rows = self.rows.max(1) as f64;
        Divergence { mean_kl: self.sum / rows, max_kl: self.max, same_top: self.same as f64 / rows }
    }
}

/// `ln Σ exp`.
fn log_sum(row: &[f32]) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - largest).exp()).sum();
    f64::from(largest) + sum.ln()
}

fn likeliest(row: &[f32]) -> usize {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_predict_by_chance_and_differ_from_nothing() {
        let mut sum = PredictionSum::default();
        sum.add(&[0, 3, 1], &[0.5; 12], 4);
        assert_eq!(sum.mean().tokens, 2);
        assert!((sum.mean().perplexity - 4.0).abs() < 1e-12);
        let mut divergence = DivergenceSum::default();
        divergence.add(&[1.0, 2.0, -3.0], &[2.0, 3.0, -2.0], 3);
        assert!(divergence.result().mean_kl < 1e-12 && divergence.result().same_top == 1.0);
    }

    #[test]
    fn a_divergence_is_what_its_definition_says() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 / 2 + ln(2/3) / 2.
        let mut sum = DivergenceSum::default();
        sum.add(&[0.0, 0.0], &[0.0, 3f32.ln()], 2);
        let expected = 0.5 * (2f64.ln() + (2.0f64 / 3.0).ln());
        assert!((sum.result().mean_kl - expected).abs() < 1e-7);
        assert_eq!(sum.result().same_top, 0.0);
        assert_eq!(sum.result().max_kl, sum.result().mean_kl);
    }
}
