//! What a solve can be asked for beside the cheapest placement: bounded load, bounded memory alone, copies; each on
//! routes that an invented model makes.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use exflow_placement::{
    Affinity, Balance, Generator, Memory, PlacementTable, RoutingTrace, SolveError, SolveOptions, Topology,
    Weights, score_trace, solve,
};
use std::time::Duration;

fn options() -> SolveOptions {
    SolveOptions {
        time_limit: Duration::from_secs(20),
        max_rounds: Some(60),
        exact: false,
        ..Default::default()
    }
}

fn place(affinity: &Affinity, topology: &Topology, options: &SolveOptions) -> PlacementTable {
    solve(affinity, topology, options, &mut |_| ()).unwrap()
}

fn instance(layers: usize, experts: usize, k: usize) -> (RoutingTrace, Affinity) {
    let trace = Generator::new(layers, experts, k).trace(6000, 3, 5);
    let affinity = Affinity::from_trace(&trace, experts).unwrap();
    (trace, affinity)
}

/// `[L, R]` tokens that each rank serves.
fn served(table: &PlacementTable, load: &[f64]) -> Vec<Vec<f64>> {
    let row = |(layer, row): (usize, &Vec<exflow_placement::Rank>)| {
        let mut sums = vec![0.0; table.ranks];
        row.iter().enumerate().for_each(|(e, rank)| sums[rank.index()] += load[layer * table.experts + e]);
        sums
    };
    table.assignment.iter().enumerate().map(row).collect()
}

fn busiest(sums: &[f64]) -> f64 {
    sums.iter().copied().fold(0.0, f64::max)
}

#[test]
fn a_load_bound_is_kept_in_every_layer_for_little() {
    let (_, affinity) = instance(8, 16, 2);
    let load = affinity.load_or_derived();
    let topology = Topology::uniform(4);
    let free = place(&affinity, &topology, &options());
    let bounded = place(&affinity, &topology, &SolveOptions { load_bound: Some(1.05), ..options() });
    let even = served(&PlacementTable::round_robin(8, 16, 4), &load);
    let (free_loads, loads) = (served(&free, &load), served(&bounded, &load));
    let above = |loads: &[Vec<f64>]| {
        loads.iter().zip(&even).filter(|(mine, even)| busiest(mine) > 1.05 * busiest(even) + 1e-6).count()
    };
    assert_eq!(above(&loads), 0);
    assert!(above(&free_loads) > 0, "the bound must bind, else this shows nothing");
    let (cost, best) = (bounded.cost.unwrap(), free.cost.unwrap());
    assert!(cost < 1.1 * best, "{cost} for {best}");
    let refused = SolveOptions { load_bound: Some(0.5), ..options() };
    assert!(matches!(solve(&affinity, &topology, &refused, &mut |_| ()), Err(SolveError::LoadBound(_))));
}

#[test]
fn memory_alone_leaves_layers_off_ranks_and_crosses_less() {
    let (trace, affinity) = instance(12, 16, 1);
    let topology = Topology::uniform(3);
    let spread = place(&affinity, &topology, &SolveOptions { balance: Balance::Layer, ..options() });
    let total = place(&affinity, &topology, &SolveOptions { balance: Balance::Total, ..options() });
    let held = total.experts_per_rank();
    assert!(held.iter().all(|&n| n <= 64), "{held:?}");
    let left_off = (0..12u16).filter(|&l| total.ranks_of(exflow_placement::LayerId(l)).len() < 3).count();
    assert!(left_off > 6, "{left_off} layers are on fewer than all ranks");
    let (a, b) = (score_trace(&spread, &trace), score_trace(&total, &trace));
    assert!(b.crossings_per_token < 0.7 * a.crossings_per_token, "{a:?} {b:?}");
    let load = affinity.load_or_derived();
    let mut sums = vec![0.0; 3];
    served(&total, &load).iter().for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, n)| *sum += n));
    assert!(busiest(&sums) <= 1.15 * 1.1 * sums.iter().sum::<f64>() / 3.0, "{sums:?}");
}

#[test]
fn uneven_memory_holds_with_attention_and_contexts_counted() {
    let (_, affinity) = instance(10, 8, 1);
    let mut topology = Topology::uniform(3);
    for (rank, gb) in topology.ranks.iter_mut().zip([60.0, 30.0, 20.0]) {
        rank.memory_gb = Some(gb);
    }
    let memory = Memory { expert_bytes: 1e9, attention_bytes: 0.5e9, kv_bytes: 0.5e9 };
    let options = SolveOptions { balance: Balance::Total, memory, ..options() };
    let table = place(&affinity, &topology, &options);
    for (rank, gb) in [60.0, 30.0, 20.0].into_iter().enumerate() {
        let rank = exflow_placement::Rank::from(rank);
        let of = |l: u16| table.experts_of(exflow_placement::LayerId(l), rank).len();
        let bytes: f64 = (0..10).map(of).map(|n| if n == 0 { 0.0 } else { n as f64 + 1.0 }).sum();
        assert!(bytes <= gb, "rank {rank} holds {bytes} GB of {gb}");
    }
    topology.ranks.iter_mut().for_each(|rank| rank.memory_gb = Some(27.0));
    let tight = SolveOptions { memory: Memory { kv_bytes: 4e9, ..memory }, ..options };
    assert!(matches!(solve(&affinity, &topology, &tight, &mut |_| ()), Err(SolveError::NoRoom)));
}

#[test]
fn spare_slots_take_copies_that_save_what_was_predicted() {
    let (trace, affinity) = instance(8, 16, 1);
    let mut topology = Topology::uniform(4);
    topology.ranks.iter_mut().for_each(|rank| rank.slots = Some(6));
    let options = SolveOptions { balance: Balance::Layer, ..options() };
    let with = place(&affinity, &topology, &options);
    let without = place(&affinity, &topology, &SolveOptions { replicas: false, ..options });
    assert!(without.replicas.is_empty() && without.assignment == with.assignment);
    assert!(!with.replicas.is_empty());
    let most = |l: u16| {
        (0..4).map(|r| with.experts_of(exflow_placement::LayerId(l), exflow_placement::Rank(r)).len()).max()
    };
    assert!((0..8).all(|l| most(l).unwrap() <= 6));
    let moves = |table: &PlacementTable| score_trace(table, &trace).crossings_per_token;
    let (saved, plain) = (1.0 - moves(&with) / moves(&without), without.cost.unwrap());
    let predicted = 1.0 - with.cost_with_replicas.unwrap() / plain;
    assert!(saved > 0.1 && (saved - predicted).abs() < 0.05, "saved {saved}, predicted {predicted}");
}

#[test]
fn weights_count_what_they_name() {
    let (_, affinity) = instance(4, 8, 2);
    let topology = Topology::uniform(4);
    let together = Weights { transitions: 0.0, wrap: 0.0, coactivation: 1.0, load: 0.0 };
    let apart = |table: &PlacementTable| {
        let co = affinity.coactivation.as_ref().unwrap();
        let pairs = (0..co.len()).map(|at| {
            let (row, i, j) = (&table.assignment[at / 64], at / 8 % 8, at % 8);
            if row[i] == row[j] { 0.0 } else { co[at] / 2.0 }
        });
        pairs.sum::<f64>()
    };
    let grouped = place(&affinity, &topology, &SolveOptions { weights: together, ..options() });
    assert!((grouped.cost.unwrap() - apart(&grouped)).abs() < 1e-6);
    let chain = place(&affinity, &topology, &options());
    assert!(apart(&grouped) < apart(&chain));
    let even = Weights { load: 1.0, coactivation: 0.0, ..together };
    let balanced = place(&affinity, &topology, &SolveOptions { weights: even, ..options() });
    let load = affinity.load_or_derived();
    let worst = |table: &PlacementTable| served(table, &load).iter().map(|row| busiest(row)).sum::<f64>();
    assert!((balanced.cost.unwrap() - worst(&balanced)).abs() < 1e-6);
    assert!(
        worst(&balanced) <= worst(&chain) && worst(&balanced) <= worst(&PlacementTable::round_robin(4, 8, 4))
    );
}

#[test]
fn degenerate_instances_have_answers() {
    for (layers, experts, ranks) in [(1, 1, 1), (3, 1, 4), (4, 8, 1), (1, 8, 4), (5, 3, 7), (2, 2, 2)] {
        let affinity = Affinity::zeros(layers, experts);
        for balance in [Balance::Slots, Balance::Layer, Balance::Total] {
            for exact in [true, false] {
                let options = SolveOptions { balance, exact, max_rounds: Some(8), ..options() };
                let table = place(&affinity, &Topology::uniform(ranks), &options);
                table.check_fits(layers, experts, ranks, None).unwrap();
                assert_eq!(table.cost, Some(0.0));
            }
        }
    }
    let mut affinity = Affinity::zeros(2, 4);
    affinity.transitions = vec![9_007_199_254_740_992.0; 16];
    let table = place(&affinity, &Topology::uniform(2), &options());
    assert!(table.cost.unwrap().is_finite() && table.lower_bound.unwrap() <= table.cost.unwrap());
}
