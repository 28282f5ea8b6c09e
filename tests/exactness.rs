//! One rank computes what the model's definition says, and any split over ranks computes the same bits.

mod common;

use common::reference::{Forward, Reference};
use common::tiny::{Folder, Random, Stored, Tiny};
use common::{Setup, generate, request, tokens};
use exflow::engine::{
    Cluster, Combine, Feed, FinishReason, LogitsDump, NoProgress, PlacementSource, PlacementTable, Rank,
    Request, RunStats, Schedule, Strategy, TransportKind,
};
use exflow_placement::LayerId;
use serde_json::json;
use std::ops::Range;
use std::process::Command;

/// What the float64 reference allows the engine's float32 arithmetic.
const TOLERANCE: f64 = 2e-4;

/// Shapes that tile badly, every router rule, every storage type.
fn shapes() -> Vec<Tiny> {
    let odd = Tiny {
        hidden: 30,
        heads: 3,
        inner: 37,
        experts: 5,
        layers: 3,
        vocab: 257,
        seed: 11,
        ..Tiny::default()
    };
    vec![
        Tiny { seed: 10, ..Tiny::default() },
        odd.clone(),
        Tiny { top_k: 2, tied: true, stored: Stored::Bf16, seed: 12, ..odd.clone() },
        Tiny { top_k: 2, norm_topk_prob: Some(false), stored: Stored::F16, seed: 13, ..Tiny::default() },
        Tiny { norm_topk_prob: Some(true), hidden: 66, heads: 1, inner: 7, seed: 14, ..Tiny::default() },
        Tiny {
            top_k: 2,
            norm_topk_prob: Some(true),
            hidden: 64,
            heads: 16,
            inner: 129,
            vocab: 61,
            seed: 15,
            ..odd.clone()
        },
        Tiny { experts: 5, top_k: 5, layers: 1, tied: true, vocab: 1000, seed: 16, ..odd },
        Tiny {
            experts: 1,
            layers: 2,
            hidden: 36,
            heads: 2,
            stored: Stored::F16,
            seed: 17,
            ..Tiny::default()
        },
        Tiny { experts: 67, top_k: 3, layers: 2, stored: Stored::Bf16, seed: 100, ..Tiny::default() },
    ]
}

#[test]
fn logits_of_one_rank_match_the_float64_reference() {
    for shape in shapes() {
        let folder = shape.write();
        let reference = Reference::load(folder.path());
        let mut cluster = Setup::one_rank(folder.path()).start();
        for (length, feeds) in [(1, &[Feed::Prefill][..]), (39, &[Feed::Prefill, Feed::Decode][..])] {
            let ids = shape.prompt(length, 3);
            let truth = reference.forward(&ids);
            for feed in feeds {
                let dump = cluster.logits(&ids, *feed).unwrap_or_else(|e| panic!("{shape:?}: {e}"));
                matches_reference(&dump, &truth, &format!("{shape:?}, {feed:?}, {length} tokens"));
            }
        }
    }
}

#[test]
fn the_whole_context_can_be_used_and_no_more() {
    let shape = Tiny { positions: 130, layers: 2, top_k: 2, seed: 205, ..Tiny::default() };
    let folder = shape.write();
    let reference = Reference::load(folder.path());
    let mut cluster = Setup::one_rank(folder.path()).start();
    let ids = shape.prompt(130, 1);
    let truth = reference.forward(&ids);
    for feed in [Feed::Prefill, Feed::Decode] {
        matches_reference(&cluster.logits(&ids, feed).expect("logits"), &truth, &format!("{feed:?}"));
    }

    // A token needs a position only once it is fed: a full prompt still has one successor.
    let requests: Vec<Request> = [130, 127, 3].iter().map(|n| request(&ids[..*n], 6)).collect();
    let run = generate(&mut cluster, &requests);
    assert_eq!(run.sequences[0].output_ids, [truth.best(129).0]);
    assert_eq!(run.sequences[1].output_ids.len(), 4);
    assert_eq!(run.sequences[2].output_ids.len(), 6);
    assert!(run.sequences.iter().all(|s| s.finish_reason == FinishReason::Length));

    let long = shape.prompt(131, 1);
    for error in [
        cluster.logits(&long, Feed::Prefill).err(),
        cluster.logits(&[0, 257], Feed::Decode).err(),
        cluster.logits(&[], Feed::Prefill).err(),
        cluster.generate(&[request(&long, 1)], &mut |_| {}).err(),
        cluster.generate(&[request(&ids[..4], 1), request(&[257], 1)], &mut |_| {}).err(),
        cluster.generate(&[request(&[], 1)], &mut |_| {}).err(),
    ] {
        let error = error.expect("bad input is refused");
        assert!(error.is_input(), "{error}");
    }
    // A refusal leaves the cluster as it was.
    let again = generate(&mut cluster, &requests);
    assert_eq!(tokens(&again), tokens(&run));
}

#[test]
fn equal_router_scores_go_to_the_lower_expert() {
    for top_k in [1, 2] {
        let shape = Tiny { top_k, seed: 22, layers: 3, ..Tiny::default() };
        let folder = shape.write();
        let mut tensors = shape.tensors();
        for gate in tensors.iter_mut().filter(|t| t.name.ends_with("moe.gate.weight")) {
            // Experts 6 and 7 become copies of 1 for the router, but stay other experts.
            for copy in [6, 7] {
                gate.values.copy_within(shape.hidden..2 * shape.hidden, copy * shape.hidden);
            }
        }
        common::tiny::store(&folder.file("model.safetensors"), Stored::F32, &tensors);
        let ids = shape.prompt(40, 1);
        let truth = Reference::load(folder.path()).forward(&ids);
        let mut cluster = Setup::one_rank(folder.path()).start();
        for feed in [Feed::Prefill, Feed::Decode] {
            let dump = cluster.logits(&ids, feed).expect("logits");
            let mut ties = 0;
            for (layer, routes) in dump.layers.iter().zip(&truth.routes) {
                for (t, experts) in layer.experts.chunks(top_k).enumerate() {
                    assert_eq!(experts, as_i32(&routes.experts[t]), "top-{top_k}, {feed:?}, token {t}");
                    ties += usize::from(experts[0] == 1);
                }
            }
            assert!(ties > 3, "the text meets ties");
            assert!(worst(&dump, &truth) < TOLERANCE);
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_reference() {
    for shape in
        [Tiny { seed: 31, ..Tiny::default() }, Tiny { seed: 32, top_k: 2, tied: true, ..Tiny::default() }]
    {
        let folder = shape.write();
        let reference = Reference::load(folder.path());
        let prompts: Vec<_> = (0..4).map(|s| shape.prompt(2 + 5 * s, s as u64)).collect();
        let requests: Vec<_> = prompts.iter().map(|p| request(p, 16)).collect();
        let run = generate(&mut Setup::one_rank(folder.path()).start(), &requests);
        for (prompt, done) in prompts.iter().zip(&run.sequences) {
            let expected = reference.greedy(prompt, 16);
            assert!(expected.iter().all(|(_, lead)| *lead > 10.0 * TOLERANCE), "the seed has clear leads");
            assert_eq!(done.output_ids, expected.iter().map(|(id, _)| *id).collect::<Vec<_>>());
            assert_eq!(done.finish_reason, FinishReason::Length);
        }
        assert_eq!(run.stats.ranks, 1);
        assert_eq!(run.stats.prompt_tokens, prompts.iter().map(|p| p.len() as u64).sum::<u64>());
        assert_eq!(run.stats.output_tokens, 4 * 16);
    }
}

#[test]
fn a_sequence_stops_by_itself() {
    let shape = Tiny { seed: 403, ..Tiny::default() };
    let folder = shape.write();
    let prompts: Vec<_> = (0..3).map(|s| shape.prompt(3 + 4 * s, s as u64)).collect();
    let free = tokens(&generate(
        &mut Setup::one_rank(folder.path()).start(),
        &prompts.iter().map(|p| request(p, 14)).collect::<Vec<_>>(),
    ));
    // The end of text is what the first sequence says as its sixth token.
    let end = free[0][5];
    let stop = |ids: &[u32]| ids.iter().position(|id| *id == end);
    assert_eq!(stop(&free[0]), Some(5), "the seed says it for the first time there");
    assert!(free[1..].iter().any(|ids| stop(ids).is_none()), "another sequence runs on");
    for eos in [json!(end), json!([256, end])] {
        folder.edit_config(|config| {
            config.insert("eos_token_id".to_string(), eos);
        });
        let mut clusters = [
            Setup::one_rank(folder.path()).start(),
            Setup::new(folder.path(), 2, Strategy::Coherent).start(),
            Setup::new(folder.path(), 3, Strategy::Vanilla).start(),
        ];
        for cluster in &mut clusters {
            // The last request is the first again, told to ignore the end.
            let mut requests: Vec<_> =
                prompts.iter().map(|p| Request { ignore_eos: false, ..request(p, 14) }).collect();
            requests.push(request(&prompts[0], 14));
            let run = generate(cluster, &requests);
            for (ids, done) in free.iter().zip(&run.sequences) {
                let expected =
                    stop(ids).map_or((&ids[..], FinishReason::Length), |n| (&ids[..n], FinishReason::Stop));
                assert_eq!((&done.output_ids[..], done.finish_reason), expected);
            }
            assert_eq!(run.sequences[3].output_ids, free[0]);
            assert_eq!(run.sequences[3].finish_reason, FinishReason::Length);
        }
    }
}

#[test]
fn a_batch_gives_each_prompt_the_tokens_that_it_gets_alone() {
    let shape = Tiny { seed: 51, top_k: 2, ..Tiny::default() };
    let folder = shape.write();
    let requests: Vec<_> = [1, 33, 7, 50, 2, 16]
        .iter()
        .enumerate()
        .map(|(s, n)| request(&shape.prompt(*n, s as u64), 4 + 3 * (s % 3)))
        .collect();
    let mut clusters = [
        Setup::one_rank(folder.path()).start(),
        Setup::new(folder.path(), 3, Strategy::Coherent).start(),
        Setup::new(folder.path(), 2, Strategy::Vanilla).start(),
    ];
    let mut seen = Vec::new();
    for cluster in &mut clusters {
        let together = tokens(&generate(cluster, &requests));
        for (request, expected) in requests.iter().zip(&together) {
            assert_eq!(&tokens(&generate(cluster, std::slice::from_ref(request)))[0], expected);
        }
        seen.push(together);
    }
    assert!(seen.iter().all(|s| *s == seen[0]), "{seen:?}");
}

#[test]
fn summing_at_the_source_changes_rounding_only() {
    let shape = Tiny { seed: 61, top_k: 3, experts: 7, ..Tiny::default() };
    let folder = shape.write();
    let reference = Reference::load(folder.path());
    let prompts: Vec<_> = (0..3).map(|s| shape.prompt(4 + 6 * s, s as u64)).collect();
    for strategy in [Strategy::Vanilla, Strategy::Coherent] {
        let base = Setup::new(folder.path(), 2, strategy);
        let (mut exact, mut sum) = (base.start(), Setup { combine: Combine::Sum, ..base }.start());
        let requests: Vec<_> = prompts.iter().map(|p| request(p, 12)).collect();
        let (a, b) = (generate(&mut exact, &requests), generate(&mut sum, &requests));
        for (prompt, done) in prompts.iter().zip(&b.sequences) {
            let expected = reference.greedy(prompt, 12);
            assert!(expected.iter().all(|(_, lead)| *lead > 10.0 * TOLERANCE), "the seed has clear leads");
            assert_eq!(done.output_ids, expected.iter().map(|(id, _)| *id).collect::<Vec<_>>());
        }
        assert_eq!(tokens(&a), tokens(&b));
        let (a, b) = (a.stats.bytes.combine, b.stats.bytes.combine);
        assert!(b < a, "a rank with two of a token's three experts sends one partial, not two: {b} < {a}");
        for feed in [Feed::Prefill, Feed::Decode] {
            let ids = shape.prompt(25, 9);
            let (a, b) = (exact.logits(&ids, feed).expect("exact"), sum.logits(&ids, feed).expect("sum"));
            let apart = a.logits.iter().zip(&b.logits).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(apart < 1e-4, "{strategy:?}, {feed:?}: {apart}");
        }
    }
}

#[test]
fn top_1_in_process_every_split_gives_the_same_bits() {
    in_its_own_process("top_1_in_process_every_split_gives_the_same_bits", || {
        every_split(1, TransportKind::Local)
    });
}

#[test]
fn top_1_over_quic_every_split_gives_the_same_bits() {
    in_its_own_process("top_1_over_quic_every_split_gives_the_same_bits", || {
        every_split(1, TransportKind::Quic)
    });
}

#[test]
fn top_2_in_process_every_split_gives_the_same_bits() {
    in_its_own_process("top_2_in_process_every_split_gives_the_same_bits", || {
        every_split(2, TransportKind::Local)
    });
}

#[test]
fn top_2_over_quic_every_split_gives_the_same_bits() {
    in_its_own_process("top_2_over_quic_every_split_gives_the_same_bits", || {
        every_split(2, TransportKind::Quic)
    });
}

#[test]
fn a_profile_holds_the_routes_of_every_token() {
    for top_k in [1, 2] {
        let shape = Tiny { seed: 311, top_k, ..Tiny::default() };
        let folder = shape.write();
        let reference = Reference::load(folder.path());
        let texts: Vec<_> = [9, 64, 1, 30].iter().map(|n| shape.prompt(*n, *n as u64)).collect();
        for (ranks, strategy) in [(1, Strategy::Coherent), (3, Strategy::Coherent), (2, Strategy::Vanilla)] {
            let mut cluster = Setup::new(folder.path(), ranks, strategy).start();
            let trace = cluster.profile(&texts, &NoProgress).expect("a profile");
            assert_eq!((trace.layers(), trace.k()), (shape.layers, top_k));
            assert_eq!(trace.tokens(), texts.iter().map(Vec::len).sum::<usize>());
            let mut token = 0;
            for text in &texts {
                let truth = reference.forward(text);
                assert!(truth.router_margin() > 1e-3, "the seed's routers decide clearly");
                for t in 0..text.len() {
                    assert_eq!(trace.follows(token), t > 0, "a text begins anew");
                    for (l, routes) in truth.routes.iter().enumerate() {
                        assert_eq!(
                            trace.chosen(token, l),
                            as_i32(&routes.experts[t]),
                            "token {t}, layer {l}"
                        );
                    }
                    token += 1;
                }
            }
        }
    }
}

/// Runs `test`, the body of the test called `name`, in a process of its own.
///
/// lavapipe (Mesa 22.3) keeps some hundred memory mappings of every device that a process ever had, and Linux
/// grants 65,530: the hundred devices of one of these tests fit, those of all of them do not.
fn in_its_own_process(name: &str, test: impl FnOnce()) {
    const INSIDE: &str = "EXFLOW_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return test();
    }
    let this = std::env::current_exe().expect("the path of this test");
    let output = Command::new(this)
        .args([name, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("this test starts again");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(out.contains("test result: ok. 1 passed"), "{}\n{out}\n{err}", output.status);
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

fn matches_reference(dump: &LogitsDump, truth: &Forward, what: &str) {
    assert!(
        truth.router_margin() > 1e-3,
        "{what}: the seed's routers decide clearly: {}",
        truth.router_margin()
    );
    assert_eq!(dump.tokens, truth.logits.len(), "{what}");
    assert_eq!(dump.layers.len(), truth.routes.len(), "{what}");
    for (l, (layer, routes)) in dump.layers.iter().zip(&truth.routes).enumerate() {
        assert_eq!(layer.layer, l, "{what}");
        assert_eq!(layer.experts, as_i32(&routes.experts.concat()), "{what}: experts of layer {l}");
        for (a, b) in layer.weights.iter().zip(routes.weights.concat()) {
            assert!((f64::from(*a) - b).abs() < 2e-5, "{what}: a router weight of layer {l} is {a}, not {b}");
        }
    }
    let worst = worst(dump, truth);
    assert!(worst < TOLERANCE, "{what}: a logit is off by {worst:.2e}");
}

fn worst(dump: &LogitsDump, truth: &Forward) -> f64 {
    let truth = truth.logits.concat();
    assert_eq!(dump.logits.len(), truth.len());
    dump.logits.iter().zip(truth).fold(0.0, |worst, (a, b)| {
        assert!(a.is_finite());
        worst.max((f64::from(*a) - b).abs())
    })
}

fn as_i32(experts: &[usize]) -> Vec<i32> {
    experts.iter().map(|e| *e as i32).collect()
}
