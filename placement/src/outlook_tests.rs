//! Where tokens of several experts go on: never worse than by weight alone, by the counts themselves.

use super::*;
use crate::generate::Generator;
use crate::route::Strategy;
use crate::solve::{SolveOptions, solve};
use crate::table::Replica;
use crate::topology::Topology;
use crate::trace::RoutingTrace;
use proptest::prelude::*;
use std::time::Duration;

/// By the counts: partials that cross from a token on `from` to `next`, whether these wait for a row, and the next dispatch's row
/// where none of the next experts is there.
fn cost(
    table: &PlacementTable,
    counts: &Affinity,
    layer: usize,
    chosen: &[i32],
    (from, next): (Rank, Rank),
) -> f64 {
    let e = counts.experts;
    let experts: Vec<_> = chosen.iter().map(|&id| ExpertId(id as u16)).collect();
    let serving = table.route(Strategy::Vanilla, LayerId::from(layer), next, &experts, &[]).serving;
    let at_once = from != next && serving.iter().all(|rank| [from, next].contains(rank));
    let remote = serving.iter().filter(|rank| **rank != next).count() as f64 - f64::from(u8::from(at_once));
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
                    let of = |next| cost(&by_weight, &counts, layer, chosen, (from, next));
                    // Numbers are rounded to thousandths.
                    prop_assert!(of(new.next) <= of(old.next) + 2e-3, "{} for {}", of(new.next), of(old.next));
                }
            }
        }
    }
}

/// Frames over links, and one-way latencies, that a token of `text` takes; `stays`: a token stays where it is if that rank serves
/// it, else goes where its first choice is.
fn frames_and_latencies(table: &PlacementTable, text: &RoutingTrace, stays: bool) -> [f64; 2] {
    let (mut sums, mut at) = ([0.0; 2], Rank(0));
    for (token, layer) in
        (0..text.tokens()).flat_map(|token| (0..table.layers).map(move |layer| (token, layer)))
    {
        let experts: Vec<_> = text.chosen(token, layer).iter().map(|&id| ExpertId(id as u16)).collect();
        let route = table.route(Strategy::Coherent, LayerId::from(layer), at, &experts, &[]);
        let next = match (stays, route.serving.contains(&at)) {
            (false, _) => route.next,
            (true, true) => at,
            (true, false) => route.serving[0],
        };
        let rows = route.ranks().into_iter().filter(|rank| *rank != at).count();
        let partials = route.serving.iter().filter(|rank| **rank != next).count();
        let way = |rank: &Rank| u8::from(*rank != at) + u8::from(*rank != next);
        sums[0] += (rows + partials) as f64;
        sums[1] += f64::from(route.serving.iter().map(way).max().unwrap_or(0));
        at = next;
    }
    sums.map(|sum| sum / text.tokens() as f64)
}

#[test]
fn tokens_wait_less_on_text_that_was_not_counted() {
    for (k, seed) in [(2, 7), (2, 8), (2, 9), (4, 7), (4, 8), (4, 9)] {
        let generator = Generator::new(8, 16, k);
        let counts = Affinity::from_trace(&generator.trace(4000, seed, 1), 16).expect("counts");
        let text = generator.trace(2000, seed, 2);
        let options = SolveOptions { time_limit: Duration::from_millis(100), ..SolveOptions::default() };
        let solved = solve(&counts, &Topology::uniform(4), &options, &mut |_| {}).expect("a table");
        assert!(solved.outlook.is_some(), "a solved table looks ahead");
        for mut table in [solved, PlacementTable::round_robin(8, 16, 4)] {
            table.look_ahead(&counts);
            let ahead = frames_and_latencies(&table, &text, false);
            table.outlook = None;
            let [now, stays] = [false, true].map(|stays| frames_and_latencies(&table, &text, stays));
            let [sum_ahead, sum_now, sum_stays] = [ahead, now, stays].map(|[frames, waits]| frames + waits);
            assert!(ahead[1] < 0.97 * stays[1], "top-{k}, seed {seed}: {ahead:?} for {stays:?}");
            assert!(sum_ahead <= sum_now && sum_now < 0.97 * sum_stays, "{ahead:?}, {now:?}, {stays:?}");
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
