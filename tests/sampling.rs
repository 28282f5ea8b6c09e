//! Drawn tokens: what a request asks for, the same text in any world, texts that stop where they are told to.

mod common;

use common::tiny::Tiny;
use common::{Setup, generate, request, root, tokens};
use exflow::engine::{
    Cluster, ClusterOptions, Feed, FinishReason, NoProgress, Request, Sampling, Schedule, Strategy,
};

fn drawn(prompt: &[u32], seed: u64) -> Request {
    let sampling =
        Sampling { temperature: 1.3, top_k: 40, top_p: 0.95, min_p: 0.01, repetition_penalty: 1.1, seed };
    Request { sampling, ..request(prompt, 12) }
}

#[test]
fn drawn_texts_are_the_same_on_one_and_on_four_ranks() {
    let shape = Tiny { seed: 71, top_k: 2, ..Tiny::default() };
    let folder = shape.write();
    let prompts: Vec<_> = [5, 17, 2].iter().map(|n| shape.prompt(*n, *n as u64)).collect();
    let requests: Vec<Request> = prompts.iter().zip(0..).map(|(p, seed)| drawn(p, seed)).collect();
    let alone = tokens(&generate(&mut Setup::one_rank(folder.path()).start(), &requests));
    for strategy in [Strategy::Vanilla, Strategy::Coherent] {
        let mut cluster = Setup::new(folder.path(), 4, strategy).start();
        assert_eq!(tokens(&generate(&mut cluster, &requests)), alone, "{strategy:?}");
    }
    // One by one, and with another seed.
    let mut cluster = Setup::one_rank(folder.path()).start();
    assert_eq!(tokens(&generate(&mut cluster, &requests[1..2])), alone[1..2]);
    let other = tokens(&generate(&mut cluster, &[drawn(&prompts[0], 9)]));
    assert_ne!(other[0], alone[0]);
    let greedy = tokens(&generate(&mut cluster, &[request(&prompts[0], 12)]));
    assert_ne!(greedy[0], alone[0]);
}

#[test]
fn host_and_device_draw_the_same_tokens() {
    let shape = Tiny { seed: 74, top_k: 2, ..Tiny::default() };
    let folder = shape.write();
    let plain = Sampling { temperature: 1.3, seed: 5, ..Sampling::default() };
    let filters = [
        Sampling { top_k: 1, ..plain.clone() },
        Sampling { top_k: 7, ..plain.clone() },
        Sampling { top_p: 0.6, ..plain.clone() },
        Sampling { min_p: 0.2, ..plain.clone() },
        Sampling { top_k: 20, top_p: 0.9, min_p: 0.02, ..plain.clone() },
        plain,
    ];
    let of = |sampling: &Sampling| Request { sampling: sampling.clone(), ..request(&shape.prompt(4, 2), 24) };
    let start = |ranks, schedule, on_device| {
        common::prepare();
        let mut options = ClusterOptions::new(folder.path());
        (options.ranks, options.schedule, options.draws_on_device) = (ranks, schedule, Some(on_device));
        Cluster::start(options, &NoProgress).expect("a cluster")
    };
    let requests = filters.each_ref().map(of);
    let mut cluster = start(1, Schedule::Rounds, true);
    let device = tokens(&generate(&mut cluster, &requests));
    assert!(device.windows(2).any(|two| two[0] != two[1]), "the filters matter");
    // A penalty is the host's to see to; the least one that there is moves no draw. A greedy text runs beside them.
    let penalty = |s: &Sampling| Sampling { repetition_penalty: 1.0 + f32::EPSILON, ..s.clone() };
    let host = filters.each_ref().map(|sampling| of(&penalty(sampling)));
    let mixed = [&host[..], &requests[..], &[request(&shape.prompt(4, 2), 24)]].concat();
    let both = tokens(&generate(&mut cluster, &mixed));
    assert_eq!(both[..6], device[..]);
    assert_eq!(both[6..12], device[..]);
    for (ranks, schedule, on_device) in [
        (1, Schedule::Rounds, false),
        (2, Schedule::Rounds, true),
        (3, Schedule::Flow, true),
        (2, Schedule::Flow, false),
    ] {
        let drawn = tokens(&generate(&mut start(ranks, schedule, on_device), &requests));
        assert_eq!(drawn, device, "{ranks} ranks, {schedule}, on the device: {on_device}");
    }
    // One by one, and with log-probabilities, which the host takes from the logits.
    for (sampling, expected) in filters.iter().zip(&device) {
        let asked = Request { logprobs: Some(2), ..of(sampling) };
        assert_eq!(tokens(&generate(&mut cluster, &[asked])), std::slice::from_ref(expected));
    }
}

#[test]
fn a_cache_that_is_too_small_for_all_changes_no_token() {
    let shape = Tiny { seed: 72, top_k: 2, ..Tiny::default() };
    let folder = shape.write();
    let requests: Vec<Request> = [5, 17, 2, 30, 9]
        .iter()
        .zip(0..)
        .map(|(&n, seed)| Request { max_tokens: 30, ..drawn(&shape.prompt(n, seed), seed) })
        .collect();
    let ample = tokens(&generate(&mut Setup::one_rank(folder.path()).start(), &requests));
    for (ranks, strategy, schedule) in [
        (1, Strategy::Coherent, Schedule::Rounds),
        (2, Strategy::Vanilla, Schedule::Rounds),
        (3, Strategy::Coherent, Schedule::Rounds),
        (2, Strategy::Vanilla, Schedule::Flow),
        (3, Strategy::Coherent, Schedule::Flow),
    ] {
        let mut options = ClusterOptions::new(folder.path());
        // Five blocks: the first two requests start with one and two of them, and end with three each.
        (options.ranks, options.strategy, options.cache_positions) = (ranks, strategy, Some(80));
        options.schedule = schedule;
        let mut cluster = Cluster::start(options, &NoProgress).expect("a cluster");
        for _ in 0..2 {
            assert_eq!(
                tokens(&generate(&mut cluster, &requests)),
                ample,
                "{ranks} ranks, {strategy:?}, {schedule}"
            );
        }
    }
}

#[test]
fn log_probabilities_are_those_of_the_logits() {
    let shape = Tiny { seed: 73, top_k: 2, ..Tiny::default() };
    let folder = shape.write();
    let asked = Request { logprobs: Some(3), ..drawn(&shape.prompt(6, 1), 4) };
    let mut alone = Setup::one_rank(folder.path()).start();
    let said = generate(&mut alone, std::slice::from_ref(&asked)).sequences.remove(0);
    let found = said.logprobs.expect("they were asked for");
    assert_eq!(found.len(), said.output_ids.len());
    let text = [&asked.prompt_ids[..], &said.output_ids].concat();
    let dump = alone.logits(&text, Feed::Decode).expect("logits");
    for (i, (&token, found)) in said.output_ids.iter().zip(&found).enumerate() {
        let row = &dump.logits[(asked.prompt_ids.len() - 1 + i) * dump.vocab..][..dump.vocab];
        let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        let expected = |id: u32| f64::from(row[id as usize]) - total.ln();
        assert!((f64::from(found.logprob) - expected(token)).abs() < 1e-4, "token {i}");
        let best = (0..row.len() as u32).max_by(|a, b| row[*a as usize].total_cmp(&row[*b as usize]));
        assert_eq!((found.top.len(), Some(found.top[0].0)), (3, best));
        assert!(found.top.iter().all(|&(id, p)| (f64::from(p) - expected(id)).abs() < 1e-4));
    }
    let mut several = Setup::new(folder.path(), 3, Strategy::Coherent).start();
    let mut told = Vec::new();
    let run = several.generate(&[asked.clone(), request(&[1, 2], 3)], &mut |event| {
        assert_eq!(event.logprobs.is_some(), event.sequence == 0, "only who asks is told");
        told.extend(event.logprobs.clone());
    });
    assert_eq!(
        run.expect("a run").sequences[0].logprobs.as_ref(),
        Some(&found),
        "the same bits on three ranks"
    );
    assert_eq!(told, found);
    let greedy = Request { logprobs: Some(21), ..asked };
    assert!(alone.generate(&[greedy], &mut |_| {}).expect_err("too many").is_input());
}

#[test]
fn what_cannot_be_drawn_by_is_refused() {
    let folder = Tiny { layers: 1, ..Tiny::default() }.write();
    let mut cluster = Setup::one_rank(folder.path()).start();
    let plain = Sampling::default();
    for (sampling, names) in [
        (Sampling { temperature: -1.0, ..plain.clone() }, "temperature"),
        (Sampling { temperature: f32::NAN, ..plain.clone() }, "temperature"),
        (Sampling { temperature: f32::INFINITY, ..plain.clone() }, "temperature"),
        (Sampling { top_p: 0.0, ..plain.clone() }, "top-p"),
        (Sampling { top_p: 1.5, ..plain.clone() }, "top-p"),
        (Sampling { min_p: f32::NAN, ..plain.clone() }, "min-p"),
        (Sampling { repetition_penalty: 0.0, ..plain }, "repetition penalty"),
    ] {
        let wrong = Request { sampling, ..request(&[1, 2], 3) };
        let error = cluster.generate(&[wrong], &mut |_| {}).expect_err(names);
        assert!(error.is_input() && error.to_string().contains(names), "{error}");
    }
}

#[test]
fn a_text_ends_before_its_stop_text() {
    let model = root().join("examples/models/gpt-moe-16e");
    for ranks in [1, 2] {
        let mut cluster = Setup::new(&model, ranks, Strategy::Coherent).start();
        let prompt = cluster.text().expect("a tokenizer").encode("In the beginning").expect("ids");
        let whole = generate(&mut cluster, &[request(&prompt, 40)]);
        let text = whole.sequences[0].text.clone();
        // A stop text that begins and ends within tokens.
        let from = text.char_indices().nth(9).expect("a text").0;
        let stop: String = text[from..].chars().take(7).collect();
        let first = text.find(&stop).expect("it is there");

        let stopped = Request { stop: vec!["\u{1}never".into(), stop.clone()], ..request(&prompt, 40) };
        let mut shown = String::new();
        let requests = [stopped, request(&prompt, 40)];
        let run = cluster.generate(&requests, &mut |event| {
            if event.sequence == 0 {
                shown += &event.text;
            }
        });
        let run = run.expect("a run");
        assert_eq!(run.sequences[0].text, text[..first], "up to {stop:?}");
        assert_eq!(shown, run.sequences[0].text, "what ran over is never shown");
        assert_eq!(run.sequences[0].finish_reason, FinishReason::Stop);
        assert!(run.sequences[0].output_ids.len() < 40);
        assert_eq!(run.sequences[1].text, text, "the other sequence goes on");
        assert_eq!(tokens(&generate(&mut cluster, &[request(&prompt, 40)])), tokens(&whole));

        let empty = Request { stop: vec![String::new()], ..request(&prompt, 4) };
        assert!(cluster.generate(&[empty], &mut |_| {}).expect_err("refused").is_input());
    }
}
