//! The lower bound against brute force: on instances small enough to try every placement, no bound lies above the
//! optimum, and the search ends within 3 % of it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use exflow_placement::{Affinity, SolveOptions, Topology, solve};
use proptest::prelude::*;
use std::time::Duration;

#[derive(Debug, Clone)]
struct Instance {
    layers: usize,
    experts: usize,
    ranks: usize,
    transitions: Vec<f64>,
    wrap: Vec<f64>,
    /// `[R, R]`, symmetric, zero diagonal.
    cost: Vec<f64>,
    /// `[R]` most experts of each layer.
    slots: Vec<usize>,
}

fn instances() -> impl Strategy<Value = Instance> {
    let shape = |layers, experts, slots: &[usize]| Just((layers, experts, slots.to_vec()));
    let shapes = prop_oneof![
        shape(3, 4, &[2, 2]),
        shape(2, 6, &[2, 2, 2]),
        shape(3, 4, &[1; 4]),
        shape(3, 6, &[3, 3]),
        shape(2, 2, &[1, 1]),
        shape(3, 5, &[3, 2]),
        shape(2, 6, &[3, 2, 1]),
        shape(3, 4, &[2, 1, 1]),
        shape(3, 5, &[4, 4]),
        shape(2, 5, &[3, 1, 2]),
    ];
    (shapes, any::<bool>()).prop_flat_map(|((layers, experts, slots), with_wrap)| {
        let counts = |n| prop::collection::vec(prop_oneof![3 => 0u32..5, 1 => 0u32..200], n);
        let (square, ranks) = (experts * experts, slots.len());
        (counts((layers - 1) * square), counts(square), prop::collection::vec(1u32..5, ranks * ranks))
            .prop_map(move |(transitions, wrap, cost)| Instance {
                layers,
                experts,
                ranks,
                transitions: transitions.into_iter().map(f64::from).collect(),
                wrap: if with_wrap { wrap.into_iter().map(f64::from).collect() } else { vec![0.0; square] },
                cost: symmetric(&cost, ranks),
                slots: slots.clone(),
            })
    })
}

fn symmetric(cost: &[u32], ranks: usize) -> Vec<f64> {
    let at = |a: usize, b: usize| if a == b { 0.0 } else { f64::from(cost[a.min(b) * ranks + a.max(b)]) };
    (0..ranks * ranks).map(|i| at(i / ranks, i % ranks)).collect()
}

impl Instance {
    /// Every way to spread one layer's experts within the slots.
    fn rows(&self) -> Vec<Vec<usize>> {
        let mut rows = vec![vec![]];
        for _ in 0..self.experts {
            rows = rows
                .into_iter()
                .flat_map(|row: Vec<usize>| {
                    (0..self.ranks).map(move |rank| [row.clone(), vec![rank]].concat())
                })
                .filter(|row| {
                    (0..self.ranks).all(|rank| row.iter().filter(|r| **r == rank).count() <= self.slots[rank])
                })
                .collect();
        }
        rows
    }

    fn pair(&self, weights: &[f64], from: &[usize], to: &[usize]) -> f64 {
        let e = self.experts;
        let term = |at: usize| weights[at] * self.cost[from[at / e] * self.ranks + to[at % e]];
        (0..e * e).map(term).sum()
    }

    /// The least cost over all placements: for each first row, dynamic programming along the chain, closed by
    /// the wrap.
    fn optimum(&self) -> f64 {
        let (rows, square) = (self.rows(), self.experts * self.experts);
        let mut best = f64::INFINITY;
        for first in &rows {
            let mut reach: Vec<f64> =
                rows.iter().map(|row| if row == first { 0.0 } else { f64::INFINITY }).collect();
            for layer in 0..self.layers - 1 {
                let weights = &self.transitions[layer * square..][..square];
                let step = |to: &Vec<usize>| {
                    let open = rows.iter().zip(&reach).filter(|(_, cost)| cost.is_finite());
                    open.map(|(from, cost)| cost + self.pair(weights, from, to)).fold(f64::INFINITY, f64::min)
                };
                reach = rows.iter().map(step).collect();
            }
            for (last, cost) in rows.iter().zip(&reach) {
                best = best.min(cost + self.pair(&self.wrap, last, first));
            }
        }
        best
    }
}

/// 150, or `PROPTEST_CASES`.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(150)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_bound_is_never_above_the_optimum_and_the_search_comes_close(instance in instances()) {
        let affinity = Affinity {
            layers: instance.layers,
            experts: instance.experts,
            transitions: instance.transitions.clone(),
            wrap: Some(instance.wrap.clone()),
            coactivation: None,
            load: None,
        };
        let mut topology = Topology::uniform(instance.ranks);
        topology.cost = instance.cost.clone();
        topology.ranks.iter_mut().zip(&instance.slots).for_each(|(rank, &slots)| rank.slots = Some(slots));
        let options = SolveOptions {
            time_limit: Duration::from_secs(20),
            max_rounds: Some(300),
            exact: false,
            ..SolveOptions::default()
        };
        let optimum = instance.optimum();
        let exact = solve(&affinity, &topology, &SolveOptions { exact: true, ..options.clone() }, &mut |_| ());
        if let Ok(table) = exact {
            let (cost, bound) = (table.cost.unwrap(), table.lower_bound.unwrap());
            prop_assert!((cost - optimum).abs() <= 1e-9 * optimum + 1e-6, "exact {cost}, optimum {optimum}");
            prop_assert!(bound == cost && table.gap == Some(0.0), "exact {cost}, bound {bound}");
        }
        let Ok(table) = solve(&affinity, &topology, &options, &mut |progress| {
            assert!(progress.lower_bound <= optimum * (1.0 + 1e-9) + 1e-6, "{progress:?} over {optimum}");
        }) else {
            // An affinity without a single count has nothing to place by, and says so.
            prop_assert!(instance.transitions.iter().sum::<f64>() == 0.0);
            return Ok(());
        };
        let cost = table.cost.unwrap();
        prop_assert!(cost >= optimum - 1e-6, "cost {cost} below the optimum {optimum}");
        prop_assert!(cost <= optimum * 1.03 + 1e-6, "cost {cost} far above the optimum {optimum}");
    }
}

#[test]
fn more_threads_do_not_find_less() {
    let experts = 8;
    let transitions = (0..5 * experts * experts).map(|i| f64::from((i * i % 97) as u32)).collect();
    let affinity = Affinity { layers: 6, experts, transitions, wrap: None, coactivation: None, load: None };
    let cost = |threads| {
        let options = SolveOptions {
            threads,
            max_rounds: Some(80),
            time_limit: Duration::from_secs(20),
            ..Default::default()
        };
        solve(&affinity, &Topology::uniform(4), &options, &mut |_| ()).unwrap().cost.unwrap()
    };
    assert!(cost(2) <= cost(1));
}
