//! Any split over ranks computes the bits of one rank, and counts what it did as its routes and its table say.

use crate::common::tiny::{Folder, Random, Tiny};
use crate::common::{Setup, generate, request, tokens};
use exflow::engine::{
    Cluster, Feed, LogitsDump, PlacementSource, PlacementTable, Rank, Request, RunStats, Schedule, Strategy,
    TransportKind,
};
use exflow_placement::LayerId;
use std::ops::Range;

#[test]
fn top_1_in_process_every_split_gives_the_same_bits() {
    every_split(1, TransportKind::Local);
}

#[test]
fn top_1_over_quic_every_split_gives_the_same_bits() {
    every_split(1, TransportKind::Quic);
}

#[test]
fn top_2_in_process_every_split_gives_the_same_bits() {
    every_split(2, TransportKind::Local);
}

#[test]
fn top_2_over_quic_every_split_gives_the_same_bits() {
    every_split(2, TransportKind::Quic);
}

/// What one rank says, to compare with.
struct Baseline {
    shape: Tiny,
    folder: Folder,
    requests: Vec<Request>,
    tokens: Vec<Vec<u32>>,
    ids: Vec<u32>,
    logits: [LogitsDump; 2],
    /// Per request: the experts of every token that was fed, prompt and all outputs but the last.
    routes: Vec<LogitsDump>,
}

const FEEDS: [Feed; 2] = [Feed::Prefill, Feed::Decode];

fn baseline(top_k: usize) -> Baseline {
    let shape = Tiny { seed: 70 + top_k as u64, top_k, layers: 5, experts: 7, ..Tiny::default() };
    let folder = shape.write();
    let mut cluster = Setup::one_rank(folder.path()).start();
    let requests: Vec<_> =
        [5, 1, 19, 8].iter().enumerate().map(|(s, n)| request(&shape.prompt(*n, s as u64), 11)).collect();
    let run = generate(&mut cluster, &requests);
    let tokens = tokens(&run);
    assert!(tokens.iter().all(|ids| ids.len() == 11));
    assert_eq!(
        run.stats.bytes.dispatch + run.stats.bytes.combine + run.stats.bytes.kv,
        0,
        "one rank sends nothing"
    );
    assert_eq!(run.stats.traffic, [[0]]);
    assert_eq!(run.stats.exchanges_per_layer, 0.0);
    assert_eq!(run.stats.stay_rate, 1.0);
    let routes = requests
        .iter()
        .zip(&tokens)
        .map(|(request, out)| {
            let fed = [&request.prompt_ids[..], &out[..out.len() - 1]].concat();
            cluster.logits(&fed, Feed::Decode).expect("logits")
        })
        .collect();
    let ids = shape.prompt(23, 99);
    let logits = FEEDS.map(|feed| cluster.logits(&ids, feed).expect("logits"));
    Baseline { shape, folder, requests, tokens, ids, logits, routes }
}

fn every_split(top_k: usize, transport: TransportKind) {
    let base = baseline(top_k);
    for ranks in 2..=4 {
        let placements = placements(base.shape.layers, base.shape.experts, ranks);
        for (n, (name, placement)) in placements.into_iter().enumerate() {
            let both = [Strategy::Vanilla, Strategy::Coherent];
            // Over QUIC the strategies take turns: what differs there is the transport, not the plan.
            let turn = (n + ranks + top_k) % 2;
            let (this, other) = (both[turn], both[1 - turn]);
            let settings = match transport {
                TransportKind::Quic => vec![(this, Schedule::Rounds), (other, Schedule::Flow)],
                TransportKind::Local => {
                    vec![(this, Schedule::Rounds), (other, Schedule::Rounds), (this, Schedule::Flow)]
                }
            };
            for (strategy, schedule) in settings {
                let what =
                    format!("top-{top_k}, {ranks} ranks, {transport}, {strategy:?}, {schedule}, {name}");
                let setup = Setup {
                    transport,
                    schedule,
                    placement: placement.clone(),
                    ..Setup::new(base.folder.path(), ranks, strategy)
                };
                let mut cluster = setup.start();
                let used = &cluster.placement().assignment;
                match &placement {
                    PlacementSource::Table(table) => assert_eq!(*used, table.assignment, "{what}"),
                    PlacementSource::RoundRobin => {
                        assert!(used.iter().all(|layer| layer[ranks - 1].index() == ranks - 1))
                    }
                    _ => assert!(used.iter().all(|layer| layer.is_sorted() && layer[0].index() == 0)),
                }
                same_as_one_rank(&mut cluster, &base, strategy, &what);
            }
        }
    }
}

fn same_as_one_rank(cluster: &mut Cluster, base: &Baseline, strategy: Strategy, what: &str) {
    for some in [0..base.requests.len(), 2..3] {
        let run = generate(cluster, &base.requests[some.clone()]);
        assert_eq!(tokens(&run), base.tokens[some.clone()], "{what}");
        counted_as_it_went(&run.stats, base, some, cluster.placement(), strategy, what);
    }
    for (feed, expected) in FEEDS.iter().zip(&base.logits) {
        let dump = cluster.logits(&base.ids, *feed).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(bits(&dump.logits), bits(&expected.logits), "{what}, {feed:?}: logits");
        assert_eq!(dump.layers.len(), expected.layers.len());
        for (a, b) in dump.layers.iter().zip(&expected.layers) {
            assert_eq!((a.layer, a.k, &a.experts), (b.layer, b.k, &b.experts), "{what}, {feed:?}");
            assert_eq!(bits(&a.weights), bits(&b.weights), "{what}, {feed:?}, layer {}", a.layer);
        }
    }
}

/// The figures of a run are what its routes and its table say.
fn counted_as_it_went(
    stats: &RunStats,
    base: &Baseline,
    some: Range<usize>,
    table: &PlacementTable,
    strategy: Strategy,
    what: &str,
) {
    let (layers, ranks, k) = (base.shape.layers, stats.ranks, base.shape.top_k);
    let rank_of = |l: usize, e: i32| table.assignment[l][e as usize].index();
    let mut decoded = 0;
    let (mut stays, mut crossings, mut nearest_home) = (0, 0, 0);
    let mut load = vec![0; ranks];
    let mut sent = (some.len() == 1).then(|| Sent::by(strategy, base.shape.hidden, stats));
    for s in some {
        let dump = &base.routes[s];
        let at = |t: usize, l: usize| &dump.layers[l].experts[t * k..(t + 1) * k];
        for t in 0..dump.tokens {
            for l in 0..layers {
                at(t, l).iter().for_each(|e| load[rank_of(l, *e)] += 1);
            }
        }
        let steps = base.requests[s].prompt_ids.len()..dump.tokens;
        decoded += steps.len();
        let mut away = vec![0; ranks];
        for t in steps {
            for l in 0..layers {
                let here = rank_of(l, at(t, l)[0]);
                if let Some(sent) = &mut sent {
                    sent.layer(at(t, l).iter().map(|e| rank_of(l, *e)));
                }
                if l > 0 {
                    let stayed = rank_of(l - 1, at(t, l - 1)[0]) == here;
                    stays += usize::from(stayed);
                    crossings += usize::from(!stayed);
                }
                away.iter_mut().enumerate().for_each(|(home, rows)| *rows += usize::from(home != here));
            }
        }
        nearest_home += away.iter().min().expect("a rank");
    }
    let expected = stays as f64 / (stays + crossings) as f64;
    assert!((stats.stay_rate - expected).abs() < 1e-9, "{what}: stay rate {} is {expected}", stats.stay_rate);
    assert_eq!(stats.expert_load, load, "{what}: rows worked on");

    // Exchanges: two a layer where tokens go home, one where they stay.
    let flow = stats.schedule == "flow";
    match (strategy, k) {
        _ if flow => {
            let waits = stats.exchanges_per_layer;
            assert!((0.0..=2.0).contains(&waits), "{what}: {waits} latencies a layer");
        }
        (Strategy::Vanilla, _) => assert_eq!(stats.exchanges_per_layer, 2.0, "{what}"),
        (Strategy::Coherent, 1) => assert_eq!(stats.exchanges_per_layer, 1.0, "{what}"),
        (Strategy::Coherent, _) => {
            assert!(
                (1.0..=2.0).contains(&stats.exchanges_per_layer),
                "{what}: {}",
                stats.exchanges_per_layer
            );
        }
    }

    // Bytes: every class that the protocol uses, and no other; rows cannot be fewer than the crossings.
    let (all, each) = (&stats.bytes, &stats.decode_bytes_per_token);
    let row = (4 * base.shape.hidden) as f64;
    let dispatched = each.dispatch * decoded as f64;
    // A sequence that is alone begins on rank 0 and shares no frame; for k > 1, a token's next residence is its own test.
    if let Some(sent) = sent.filter(|_| !flow && (strategy == Strategy::Vanilla || k == 1)) {
        let measured = [dispatched, each.combine * decoded as f64].map(f64::round);
        assert_eq!(measured, [sent.dispatch, sent.combine], "{what}: bytes are those of the routes");
    }
    match strategy {
        Strategy::Vanilla => {
            assert_eq!(all.kv, 0, "{what}: K/V stays at home");
            assert!(dispatched >= row * nearest_home as f64, "{what}: {dispatched} bytes dispatched");
            assert!(each.combine > 0.0, "{what}");
        }
        Strategy::Coherent => {
            // Where every layer lives on one rank, that is a layer split: its contexts need no keeping.
            if (0..layers - 1).any(|l| table.ranks_of(LayerId::from(l)).len() > 1) {
                assert!(each.kv > 0.0, "{what}: contexts are kept coherent");
            }
            // In flow, tokens return home until their prompt has reached all.
            if k == 1 && !flow {
                assert_eq!(each.combine, 0.0, "{what}: nothing to combine");
                assert!(dispatched >= row * crossings as f64, "{what}: {dispatched} bytes dispatched");
            }
        }
    }
    assert!(each.ids > 0.0, "{what}: sampled ids are announced");
    let by_pair: u64 = stats.traffic.iter().flatten().sum();
    assert_eq!(
        by_pair,
        all.dispatch + all.combine + all.kv + all.ids + all.control,
        "{what}: two counts of one run"
    );
    assert!((0..ranks).all(|r| stats.traffic[r][r] == 0), "{what}: a rank sends itself nothing");
}

/// Bytes that a lone sequence sends in rounds, as its routes and the frames' layout say.
struct Sent {
    strategy: Strategy,
    residual: usize,
    ranks: usize,
    /// Of every frame; memory has none.
    header: usize,
    residence: usize,
    dispatch: f64,
    combine: f64,
}

impl Sent {
    fn by(strategy: Strategy, hidden: usize, stats: &RunStats) -> Self {
        let header = if stats.transport == "quic" { 40 } else { 0 };
        let (residual, ranks) = (4 * hidden, stats.ranks);
        Self { strategy, residual, ranks, header, residence: 0, dispatch: 0.0, combine: 0.0 }
    }

    /// One layer, whose choices are served by these ranks.
    fn layer(&mut self, serving: impl Iterator<Item = usize>) {
        let mut choices = vec![0; self.ranks];
        serving.for_each(|rank| choices[rank] += 1);
        let away = choices.iter().enumerate().filter(|(rank, n)| *rank != self.residence && **n > 0);
        let away: Vec<(usize, usize)> = away.map(|(rank, n)| (rank, *n)).collect();
        // Each rank sends each other one a frame, be it empty.
        let frames = self.header * self.ranks * (self.ranks - 1);
        let rows: usize = away.iter().map(|(_, n)| 18 + 8 * n + self.residual).sum();
        self.dispatch += (frames + rows) as f64;
        match self.strategy {
            Strategy::Vanilla => {
                let partials: usize = away.iter().map(|(_, n)| n * (10 + self.residual)).sum();
                self.combine += (frames + partials) as f64;
            }
            Strategy::Coherent => self.residence = away.first().map_or(self.residence, |(rank, _)| *rank),
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn placements(layers: usize, experts: usize, ranks: usize) -> Vec<(&'static str, PlacementSource)> {
    let mut random = Random::new(ranks as u64);
    let make = |rule: &mut dyn FnMut(usize, usize) -> usize| {
        let layer = |l| (0..experts).map(|e| Rank::from(rule(l, e))).collect();
        let assignment = (0..layers).map(layer).collect();
        PlacementSource::Table(PlacementTable::from_assignment(assignment, ranks).expect("a sound table"))
    };
    let first = ranks / 2;
    vec![
        ("round robin", PlacementSource::RoundRobin),
        ("linear", PlacementSource::Linear),
        // Half of the draws go to the last rank.
        ("uneven", make(&mut |_, _| (ranks - 1).min(random.below(2 * ranks - 1)))),
        // Even layers on the first ranks, odd layers on the others.
        (
            "disjoint layers",
            make(&mut |l, e| if l % 2 == 0 { e % first } else { first + e % (ranks - first) }),
        ),
        ("a layer on one rank", make(&mut |l, e| if l == 1 { ranks - 1 } else { (e + l) % ranks })),
    ]
}
