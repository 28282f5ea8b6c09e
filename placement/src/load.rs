//! Load: tokens that each rank serves in a layer, divided by the rank's relative speed.
//!
//! Two terms: `weight` times the most loaded rank of each layer, and `price` for every token that a rank
//! serves above the layer's `bound` (the load-bounded mode raises the price until no rank is above). Where layers may
//! be left off ranks, a layer's own spread says nothing: both terms then look at a rank's load over all layers.

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
    /// `[L]` most tokens that a rank may serve in each layer; where `over_all`, `[1]` in all.
    pub bound: Vec<f64>,
    /// Whether a rank's load is counted over all layers together.
    pub over_all: bool,
}

impl LoadTerm {
    /// Load terms of `[L, E]` load on ranks of these speeds, `[R]`.
    pub(crate) fn new(load: Vec<f64>, speeds: &[f64], weight: f64) -> Self {
        let mean = speeds.iter().sum::<f64>() / speeds.len().max(1) as f64;
        let slowness = speeds.iter().map(|speed| mean / speed).collect();
        Self { load, slowness, weight, price: 0.0, bound: Vec::new(), over_all: false }
    }

    /// Whether there is anything to count.
    pub(crate) fn is_active(&self) -> bool {
        self.weight > 0.0 || self.price > 0.0
    }

    /// `[R]` load of each rank in a layer whose holders are `holders` `[E]`.
    pub(crate) fn of_layer(&self, layer: usize, holders: &[u16]) -> Vec<f64> {
        let mut sums = vec![0.0; self.slowness.len()];
        self.add_layer(layer, holders, &mut sums);
        sums
    }

    fn add_layer(&self, layer: usize, holders: &[u16], sums: &mut [f64]) {
        let load = &self.load[layer * holders.len()..][..holders.len()];
        holders
            .iter()
            .zip(load)
            .for_each(|(&g, tokens)| sums[g as usize] += tokens * self.slowness[g as usize]);
    }

    /// `[R]` the loads that decide about `layer` under `[L, E]` holders: its own, or those over all layers.
    pub(crate) fn sums(&self, layer: usize, holders: &[u16], experts: usize) -> Vec<f64> {
        if !self.over_all {
            return self.of_layer(layer, &holders[layer * experts..][..experts]);
        }
        let mut sums = vec![0.0; self.slowness.len()];
        let layers = holders.chunks_exact(experts).enumerate();
        layers.for_each(|(layer, holders)| self.add_layer(layer, holders, &mut sums));
        sums
    }

    /// Load terms for these loads, `[R]`.
    pub(crate) fn layer_cost(&self, layer: usize, sums: &[f64]) -> f64 {
        let mut cost = 0.0;
        if self.weight > 0.0 {
            cost += self.weight * sums.iter().copied().fold(0.0, f64::max);
        }
        if self.price > 0.0 {
            cost += self.price * self.above(layer, sums);
        }
        cost
    }

    /// Tokens above the bound.
    fn above(&self, layer: usize, sums: &[f64]) -> f64 {
        let bound = self.bound[if self.over_all { 0 } else { layer }];
        sums.iter().map(|sum| (sum - bound).max(0.0)).sum()
    }

    /// Tokens above the bounds under `[L, E]` holders.
    pub(crate) fn excess(&self, holders: &[u16], experts: usize) -> f64 {
        let layers = if self.over_all { 1 } else { holders.len() / experts };
        (0..layers).map(|layer| self.above(layer, &self.sums(layer, holders, experts))).sum()
    }

    /// How the terms change when rank `g`'s load grows by `dg` and rank `h`'s by `dh`.
    pub(crate) fn change(&self, layer: usize, sums: &[f64], [g, h]: [usize; 2], [dg, dh]: [f64; 2]) -> f64 {
        let mut change = 0.0;
        if self.price > 0.0 {
            let bound = self.bound[if self.over_all { 0 } else { layer }];
            let over = |load: f64| (load - bound).max(0.0);
            let after = over(sums[g] + dg) + over(sums[h] + dh);
            change += self.price * (after - over(sums[g]) - over(sums[h]));
        }
        if self.weight > 0.0 {
            let (mut before, mut after) = (0.0f64, 0.0f64);
            for (rank, &load) in sums.iter().enumerate() {
                let added = if rank == g { dg } else { 0.0 } + if rank == h { dh } else { 0.0 };
                (before, after) = (before.max(load), after.max(load + added));
            }
            change += self.weight * (after - before);
        }
        change
    }

    /// No placement's load terms are below this: the busiest rank (of each layer, or over all) has at least its share
    /// of all tokens by speed, and at least the largest expert on the fastest rank.
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
        let counted = if self.over_all { self.load.len() } else { problem.experts };
        self.weight * self.load.chunks_exact(counted).map(busiest).sum::<f64>()
    }

    /// Cost of `[L, E]` holders.
    pub(crate) fn cost(&self, assignment: &[u16], experts: usize) -> f64 {
        if !self.is_active() {
            return 0.0;
        }
        let layers = if self.over_all { 1 } else { assignment.len() / experts };
        (0..layers).map(|layer| self.layer_cost(layer, &self.sums(layer, assignment, experts))).sum()
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
        let sums = term.of_layer(0, &[0, 1]);
        let moved = term.change(0, &sums, [0, 1], [2.0, -2.0]);
        let expected = term.layer_cost(0, &[sums[0] + 2.0, sums[1] - 2.0]) - term.layer_cost(0, &sums);
        assert!((moved - expected).abs() < 1e-12);
    }

    #[test]
    fn loads_are_counted_over_all_layers_where_layers_may_be_left_off_ranks() {
        let mut term = LoadTerm::new(vec![4.0, 2.0, 3.0, 3.0], &[1.0, 1.0], 1.0);
        assert_eq!(term.cost(&[0, 0, 1, 1], 2), 12.0);
        term.over_all = true;
        assert_eq!(term.cost(&[0, 0, 1, 1], 2), 6.0);
        term.bound = vec![5.0];
        assert_eq!(term.excess(&[0, 0, 1, 1], 2), 2.0);
    }
}
