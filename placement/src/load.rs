//! Load: tokens that each rank serves in a layer, divided by the rank's relative speed.
//!
//! Two terms: `weight` times the most loaded rank of each layer, and `price` for every token that a rank
//! serves above the layer's `bound` (the load-bounded mode raises the price until no rank is above).

/// The load terms of the objective; nothing where `weight` and `price` are 0.
#[derive(Debug, Clone, Default)]
pub(crate) struct LoadTerm {
    /// `[L, E]` tokens that chose each expert.
    pub load: Vec<f64>,
    /// `[R]` mean speed over the rank's speed: tokens on a slow rank count for more.
    pub slowness: Vec<f64>,
    /// Cost of a token on the most loaded rank of a layer.
    pub weight: f64,
    /// Cost of a token above `bound`.
    pub price: f64,
    /// `[L]` most tokens that a rank may serve in each layer.
    pub bound: Vec<f64>,
}

impl LoadTerm {
    /// Load terms of `[L, E]` load on ranks of these speeds, `[R]`.
    pub(crate) fn new(load: Vec<f64>, speeds: &[f64], weight: f64) -> Self {
        let mean = speeds.iter().sum::<f64>() / speeds.len().max(1) as f64;
        let slowness = speeds.iter().map(|speed| mean / speed).collect();
        Self { load, slowness, weight, price: 0.0, bound: Vec::new() }
    }

    /// Whether there is anything to count.
    pub(crate) fn is_active(&self) -> bool {
        self.weight > 0.0 || self.price > 0.0
    }

    /// `[R]` load of each rank in a layer whose holders are `holders` `[E]`.
    pub(crate) fn of_layer(&self, layer: usize, holders: &[u16]) -> Vec<f64> {
        let mut sums = vec![0.0; self.slowness.len()];
        let load = &self.load[layer * holders.len()..][..holders.len()];
        holders
            .iter()
            .zip(load)
            .for_each(|(&g, tokens)| sums[g as usize] += tokens * self.slowness[g as usize]);
        sums
    }

    /// Cost of one layer from its ranks' loads `[R]`.
    pub(crate) fn layer_cost(&self, layer: usize, sums: &[f64]) -> f64 {
        let mut cost = self.weight * sums.iter().copied().fold(0.0, f64::max);
        if self.price > 0.0 {
            cost += self.price * sums.iter().map(|sum| (sum - self.bound[layer]).max(0.0)).sum::<f64>();
        }
        cost
    }

    /// No placement's load terms are below this: in each layer the busiest rank has at least its share of
    /// all tokens by speed, and at least the largest expert on the fastest rank.
    pub(crate) fn lower_bound(&self, problem: &crate::cost::Problem) -> f64 {
        if self.weight <= 0.0 {
            return 0.0;
        }
        let speed: f64 = self.slowness.iter().map(|slow| 1.0 / slow).sum();
        let fastest = self.slowness.iter().copied().fold(f64::INFINITY, f64::min);
        let busiest = |tokens: &[f64]| {
            let largest = tokens.iter().copied().fold(0.0, f64::max);
            (tokens.iter().sum::<f64>() / speed).max(largest * fastest)
        };
        self.weight * self.load.chunks_exact(problem.experts).map(busiest).sum::<f64>()
    }

    /// Cost of `[L, E]` holders.
    pub(crate) fn cost(&self, assignment: &[u16], experts: usize) -> f64 {
        if !self.is_active() {
            return 0.0;
        }
        let layers = assignment.chunks_exact(experts).enumerate();
        layers.map(|(layer, holders)| self.layer_cost(layer, &self.of_layer(layer, holders))).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_ranks_count_for_more() {
        let mut term = LoadTerm::new(vec![4.0, 2.0], &[3.0, 1.0], 1.0);
        assert_eq!(term.of_layer(0, &[0, 1]), [4.0 * 2.0 / 3.0, 4.0]);
        assert_eq!(term.cost(&[0, 1], 2), 4.0);
        term.price = 10.0;
        term.bound = vec![3.0];
        assert_eq!(term.cost(&[0, 1], 2), 14.0);
    }
}
