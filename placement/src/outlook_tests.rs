//! Where tokens of several experts go on: never worse than by weight alone, by the counts themselves.

use super::*;
use crate::generate::Generator;
use crate::route::Strategy;
use crate::simulate::{SimulateOptions, simulate};
use crate::solve::{SolveOptions, solve};
use crate::table::Replica;
use crate::topology::Topology;
use crate::trace::RoutingTrace;
use proptest::prelude::*;
use std::time::Duration;

/// By the counts: partials that cross to `next`, and the next dispatch's row where none of the next experts is there.
fn cost(table: &PlacementTable, counts: &Affinity, layer: usize, chosen: &[i32], next: Rank) -> f64 {
    let e = counts.experts;
    let experts: Vec<_> = chosen.iter().map(|&id| ExpertId(id as u16)).collect();
    let serving = table.route(Strategy::Vanilla, LayerId::from(layer), next, &experts, &[]).serving;
    let remote = serving.iter().filter(|rank| **rank != next).count() as f64;
    let (after, square) = match layer + 1 == counts.layers {
        true => (0, counts.wrap.as_ref().expect("counted").as_slice()),
        false => (layer + 1, counts.transition(layer)),
    };
    let held =
        |expert: usize| table.holders(LayerId::from(after), ExpertId::from(expert)).any(|rank| rank == next);
    let load = counts.load.as_ref().expect("counted");
    let mass: f64 = chosen
        .iter()
        .map(|&from| {
            let row = &square[from as usize * e..][..e];
            let sum: f64 = (0..e).filter(|&to| held(to)).map(|to| row[to]).sum();
            sum / load[layer * e + from as usize]
        })
        .sum();
    remote + (-mass / chosen.len() as f64).exp()
}

fn crossings(table: &PlacementTable, trace: &RoutingTrace) -> f64 {
    let options = SimulateOptions {
        strategy: Strategy::Coherent,
        batch: 1,
        row_bytes: 1.0,
        kv_bytes: 0.0,
        combine_sum: false,
    };
    let replay = simulate(table, trace, &Topology::uniform(table.ranks), &options).expect("it fits");
    replay.dispatch_bytes + replay.combine_bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_next_residence_is_never_worse_by_the_counts(
        ranks in 2_usize..5,
        k in 2_usize..4,
        seed in any::<u64>(),
        copies in proptest::collection::vec((0_u16..4, 0_u16..8, 0_u16..4), 0..6),
    ) {
        let trace = Generator::new(4, 8, k).trace(400, seed, seed ^ 1);
        let counts = Affinity::from_trace(&trace, 8).expect("counts");
        let mut by_weight = PlacementTable::round_robin(4, 8, ranks);
        let copies = copies.iter().filter(|(_, _, rank)| usize::from(*rank) < ranks);
        let copy = |&(l, e, r): &(u16, u16, u16)| {
            Replica { layer: LayerId(l), expert: ExpertId(e), rank: Rank(r) }
        };
        by_weight.set_replicas(copies.map(copy).collect());
        let mut ahead = by_weight.clone();
        ahead.look_ahead(&counts);
        prop_assert!(ahead.outlook.is_some() && ahead.check().is_ok());
        for token in 0..trace.tokens() {
            for layer in 0..4 {
                let chosen = trace.chosen(token, layer);
                let experts: Vec<_> = chosen.iter().map(|&id| ExpertId(id as u16)).collect();
                let from = Rank::from((token + layer) % ranks);
                let route = |table: &PlacementTable| {
                    table.route(Strategy::Coherent, LayerId::from(layer), from, &experts, &[])
                };
                let (old, new) = (route(&by_weight), route(&ahead));
                prop_assert_eq!(&old.serving, &new.serving);
                prop_assert!(new.serving.contains(&new.next));
                // Copies make what is served depend on where a token is: they are held as from here.
                if by_weight.replicas.is_empty() {
                    let of = |next| cost(&by_weight, &counts, layer, chosen, next);
                    // Numbers are rounded to thousandths.
                    prop_assert!(of(new.next) <= of(old.next) + 2e-3, "{} for {}", of(new.next), of(old.next));
                }
            }
        }
    }
}

#[test]
fn fewer_frames_cross_on_text_that_was_not_counted() {
    for k in [2, 4] {
        let generator = Generator::new(8, 16, k);
        let counts = Affinity::from_trace(&generator.trace(4000, 7, 1), 16).expect("counts");
        let text = generator.trace(2000, 7, 2);
        let options = SolveOptions { time_limit: Duration::from_millis(300), ..SolveOptions::default() };
        let solved = solve(&counts, &Topology::uniform(4), &options, &mut |_| {}).expect("a table");
        assert!(solved.outlook.is_some(), "a solved table looks ahead");
        for (mut table, share) in [(solved, 0.995), (PlacementTable::round_robin(8, 16, 4), 0.99)] {
            table.outlook = None;
            let before = crossings(&table, &text);
            table.look_ahead(&counts);
            let after = crossings(&table, &text);
            // A solved table keeps most tokens of two experts where they are anyway.
            assert!(after < share * before, "top-{k}: {after} for {before}");
        }
    }
}

#[test]
fn tables_carry_what_lies_ahead_and_top_1_needs_none() {
    let generator = Generator::new(3, 6, 2);
    let counts = Affinity::from_trace(&generator.trace(300, 1, 1), 6).expect("counts");
    let mut table = PlacementTable::linear(3, 6, 3);
    table.look_ahead(&counts);
    let text = serde_json::to_string(&table).expect("JSON");
    let read: PlacementTable = serde_json::from_str(&text).expect("a table");
    assert_eq!(read, table);
    assert!(read.check().is_ok());
    let short = PlacementTable { outlook: Some(Outlook { held: vec![0; 3] }), ..table.clone() };
    assert!(
        short.check().expect_err("too few numbers").to_string().contains("54"),
        "3 layers, 6 experts, 3 ranks"
    );
    // Other copies, other numbers.
    table.set_replicas(vec![Replica { layer: LayerId(1), expert: ExpertId(0), rank: Rank(2) }]);
    assert_eq!(table.outlook, None);
    // Without a rank, by the counts that are at hand, or by weight.
    let room = vec![usize::MAX; 3];
    let without = |affinity| table.without(&[Rank(1)], &room, affinity).expect("room");
    assert!(without(Some(&counts)).outlook.is_some() && without(None).outlook.is_none());
    let one = Affinity::from_trace(&Generator::new(3, 6, 1).trace(300, 1, 1), 6).expect("counts");
    table.look_ahead(&one);
    assert_eq!(table.outlook, None, "the next residence is where the one expert is");
}
