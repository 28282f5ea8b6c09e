//! One rank computes what the model's definition says, and any split over ranks computes the same bits.

#[path = "../common/mod.rs"]
mod common;
mod modes;
mod moves;
mod splits;

use common::reference::{Forward, Reference};
use common::tiny::{Stored, Tiny};
use common::{Setup, generate, request, tokens};
use exflow::engine::{Combine, Feed, FinishReason, LogitsDump, NoProgress, Request, Strategy};
use serde_json::json;

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

/// A device of which one row and one head leave much idle attends to a context in splits, to several rows at once in one
/// go.
#[test]
fn a_context_of_several_splits_gives_the_same_bits_in_one_go() {
    let shape = Tiny { heads: 1, positions: 700, layers: 2, top_k: 2, seed: 120, ..Tiny::default() };
    let folder = shape.write();
    let mut cluster = Setup::one_rank(folder.path()).start();
    let ids = shape.prompt(600, 3);
    let mut bits = |feed| -> Vec<u32> {
        let dump = cluster.logits(&ids, feed).expect("logits");
        dump.logits.iter().map(|logit| logit.to_bits()).collect()
    };
    assert!(bits(Feed::Decode) == bits(Feed::Prefill));
    let requests: Vec<_> =
        [600, 255, 511].iter().map(|&length| request(&shape.prompt(length, length as u64), 12)).collect();
    let together = tokens(&generate(&mut cluster, &requests));
    for (request, beside) in requests.into_iter().zip(together) {
        assert_eq!(tokens(&generate(&mut cluster, &[request])), [beside]);
    }
}
