//! Seeded instances: routing of an invented model with planted communities, successor preference and
//! skewed popularity, top-k. For benchmarks and tests; real profiles come from models.

use crate::rng::Rng;
use crate::trace::RoutingTrace;

/// What an invented model is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generator {
    /// L.
    pub layers: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub k: usize,
    /// Groups of experts per layer that like the same tokens.
    pub communities: usize,
    /// Log-odds of the experts of a token's own community.
    pub community: f64,
    /// Log-odds of the few successors that an expert prefers.
    pub successor: f64,
    /// Standard deviation of the experts' log-popularity.
    pub skew: f64,
    /// Chance that a token changes its community from one layer to the next.
    pub wander: f64,
}

impl Generator {
    /// A model of moderate affinity: about half as many communities as it has experts per eight.
    pub fn new(layers: usize, experts: usize, k: usize) -> Self {
        let communities = (experts / 5).max(2);
        Self { layers, experts, k, communities, community: 2.0, successor: 2.5, skew: 0.7, wander: 0.1 }
    }

    /// A trace of `tokens` tokens: `model` seeds the invented model, `text` the tokens drawn from it.
    pub fn trace(&self, tokens: usize, model: u64, text: u64) -> RoutingTrace {
        let model = Model::new(self, &mut Rng::fork(model, 1));
        let mut rng = Rng::fork(text, 2);
        let mut trace = RoutingTrace::new(self.layers, self.k);
        let mut topic = 0;
        let mut last = None;
        for token in 0..tokens {
            if token % 64 == 0 {
                trace.mark_break();
                topic = rng.below(self.communities);
                last = None;
            }
            let mut ids = Vec::with_capacity(self.layers * self.k);
            for layer in 0..self.layers {
                if rng.unit() < self.wander {
                    topic = rng.below(self.communities);
                }
                let chosen = model.choose(self, layer, topic, last, &mut rng);
                last = Some(chosen[0]);
                ids.extend(chosen.iter().map(|&e| e as i32));
            }
            trace.push_token(&ids);
        }
        trace
    }
}

/// The drawn parameters: `[L, E]` log-popularity and community, `[L, E]` lists of preferred successors
/// (of the last layer: in the first layer of the next token).
struct Model {
    popularity: Vec<f64>,
    community: Vec<usize>,
    successors: Vec<Vec<usize>>,
}

impl Model {
    fn new(spec: &Generator, rng: &mut Rng) -> Self {
        let count = spec.layers * spec.experts;
        let popularity = (0..count).map(|_| spec.skew * rng.normal()).collect();
        let community = (0..count).map(|_| rng.below(spec.communities)).collect();
        let liked = (spec.experts / 12).max(1);
        let successors = (0..count).map(|_| (0..liked).map(|_| rng.below(spec.experts)).collect()).collect();
        Self { popularity, community, successors }
    }

    /// K distinct experts, likeliest first (Gumbel top-k).
    fn choose(
        &self,
        spec: &Generator,
        layer: usize,
        topic: usize,
        last: Option<usize>,
        rng: &mut Rng,
    ) -> Vec<usize> {
        let e = spec.experts;
        let mut score: Vec<(f64, usize)> = (0..e)
            .map(|x| {
                let own = self.community[layer * e + x] == topic;
                (self.popularity[layer * e + x] + if own { spec.community } else { 0.0 } + rng.gumbel(), x)
            })
            .collect();
        if let Some(from) = last {
            let previous = (layer + spec.layers - 1) % spec.layers;
            self.successors[previous * e + from].iter().for_each(|&x| score[x].0 += spec.successor);
        }
        let k = spec.k.min(e);
        score.select_nth_unstable_by(k - 1, |a, b| b.0.total_cmp(&a.0));
        score.truncate(k);
        score.sort_by(|a, b| b.0.total_cmp(&a.0));
        score.into_iter().map(|(_, x)| x).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_decide() {
        let spec = Generator::new(3, 8, 2);
        let trace = spec.trace(100, 1, 1);
        assert_eq!(trace, spec.trace(100, 1, 1));
        assert_ne!(trace, spec.trace(100, 1, 2));
        assert_ne!(trace, spec.trace(100, 2, 1));
        assert!(trace.experts() <= 8);
        assert_eq!((trace.tokens(), trace.layers(), trace.k()), (100, 3, 2));
    }
}
