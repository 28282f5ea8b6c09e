//! The engine as many threads use it: requests that come while others run, are given up, or are too many.

use crate::common::tiny::{Folder, Tiny};
use crate::common::{Setup, request, tokens};
use exflow::engine::{
    ClusterOptions, Engine, EngineError, EngineOptions, FinishReason, NoProgress, Request, Strategy,
};
use std::time::{Duration, Instant};

fn engine(ranks: usize, max_waiting: usize) -> (Engine, Folder) {
    let folder = Tiny { layers: 3, experts: 4, seed: 5, ..Tiny::default() }.write();
    let cluster = Setup::new(folder.path(), ranks, Strategy::Coherent).start();
    let options = EngineOptions { max_waiting, ..EngineOptions::default() };
    (Engine::over(cluster, options).expect("an engine"), folder)
}

/// Waits until what the engine tells of itself is so.
fn until(engine: &Engine, what: &str, so: impl Fn(&exflow::engine::LiveStats) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !so(&engine.live()) {
        assert!(Instant::now() < deadline, "{what}: {:?}", engine.live());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn many_threads_get_what_a_batch_gets() {
    let (engine, folder) = engine(2, 64);
    let prompts: Vec<Vec<u32>> = (0..12).map(|i| vec![3 + i, 40, 7 * (i + 1)]).collect();
    let said: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let ask = |prompt: &Vec<u32>| {
            let (engine, asked) = (engine.clone(), request(prompt, 9));
            scope.spawn(move || engine.submit(asked).expect("taken").complete().expect("tokens"))
        };
        let threads: Vec<_> = prompts.iter().map(ask).collect();
        threads.into_iter().map(|t| t.join().expect("no panic").output_ids).collect()
    });
    let live = engine.live();
    assert_eq!((live.running, live.waiting), (0, 0));
    assert_eq!((live.requests.submitted, live.requests.finished), (12, 12));
    assert_eq!((live.output_tokens, live.prompt_tokens), (108, 36));
    until(&engine, "counts of the ranks", |live| live.bytes.dispatch > 0 && live.ranks[1].kv_blocks > 0);
    until(&engine, "the cache is free again", |live| live.ranks.iter().all(|r| r.kv_blocks_used == 0));
    engine.finish();
    drop(engine);

    let mut cluster = Setup::new(folder.path(), 2, Strategy::Coherent).start();
    let requests: Vec<Request> = prompts.iter().map(|prompt| request(prompt, 9)).collect();
    let run = cluster.generate(&requests, &mut |_| {}).expect("a batch");
    assert_eq!(said, tokens(&run));
}

#[test]
fn who_goes_away_frees_the_sequence() {
    let (engine, _folder) = engine(1, 4);
    let mut running = engine.submit(request(&[1, 2], 60)).expect("taken");
    assert!(running.next().expect("a token").is_ok());
    drop(running);
    until(&engine, "the request is gone", |live| live.requests.cancelled == 1 && live.running == 0);
    until(&engine, "its cache too", |live| live.ranks[0].kv_blocks > 0 && live.ranks[0].kv_blocks_used == 0);
    let done = engine.submit(request(&[1, 2], 3)).expect("taken").complete().expect("tokens");
    assert_eq!(done.output_ids.len(), 3);
}

/// One rank submits steps before it knows what those before them sampled: who comes, ends or goes away meanwhile changes nothing
/// for others.
#[test]
fn who_joins_and_leaves_changes_nobodys_tokens() {
    let (engine, folder) = engine(1, 64);
    let prompts: Vec<Vec<u32>> = (0..9).map(|i| vec![5 + i, 11, 3 * i, 60 - i]).collect();
    let lengths = [50, 3, 21, 2, 33, 1, 8, 45, 2];
    let (mut said, mut running) = (vec![Vec::new(); 9], Vec::new());
    for (at, prompt) in prompts.iter().enumerate() {
        running.push((at, engine.submit(request(prompt, lengths[at])).expect("taken")));
        // Those that were there go on for a token or two; the seventh goes away.
        for (other, asked) in running.iter_mut().filter(|(other, _)| *other < at) {
            said[*other].extend(asked.by_ref().take(1 + at % 2).map(|event| event.expect("a token").token));
        }
        running.retain(|(other, _)| at != 7 || *other != 6);
    }
    for (at, asked) in running {
        said[at].extend(asked.map(|event| event.expect("a token").token));
    }
    drop(engine);

    let mut cluster = Setup::one_rank(folder.path()).start();
    for (at, prompt) in prompts.iter().enumerate() {
        let alone = tokens(&cluster.generate(&[request(prompt, lengths[at])], &mut |_| {}).expect("alone"));
        let so_far = if at == 6 { said[at].len() } else { lengths[at] };
        assert_eq!(said[at], alone[0][..so_far], "request {at}");
        assert!(so_far > 0, "request {at}");
    }
}

#[test]
fn too_many_are_refused_and_wrong_ones_named() {
    let (engine, _folder) = engine(1, 0);
    assert!(matches!(engine.submit(request(&[1], 2)), Err(EngineError::Busy { waiting: 0, limit: 0 })));
    for (wrong, named) in [
        (request(&[], 2), "no tokens"),
        (request(&[9999], 2), "9999"),
        (request(&[1], 0), "0 tokens"),
        (request(&[1; 65], 2), "65 tokens"),
        (Request { stop: vec![String::new()], ..request(&[1], 2) }, "stop"),
    ] {
        let error = engine.submit(wrong).err().expect(named);
        assert!(error.is_input() && error.to_string().contains(named), "{error}");
    }
    assert_eq!(engine.live().requests.refused, 1);
    engine.finish();
    assert!(matches!(engine.submit(request(&[1], 2)), Err(EngineError::Stopped { .. })));
}

#[test]
fn a_shutdown_finishes_what_runs() {
    let (engine, _folder) = engine(1, 4);
    let running = engine.submit(request(&[5, 6], 40)).expect("taken");
    engine.finish();
    let done = running.complete().expect("tokens");
    assert_eq!((done.output_ids.len(), done.finish_reason), (40, FinishReason::Length));
}

#[test]
fn the_cache_is_as_large_as_the_memory_that_is_left() {
    let folder = Tiny { positions: 4096, ..Tiny::default() }.write();
    let positions = |mib: Option<u64>, ctx: Option<usize>| {
        crate::common::prepare();
        let mut options = ClusterOptions::new(folder.path());
        (options.memory, options.cache_positions) = (mib.map(|mib| mib << 20), ctx);
        Engine::start(options, EngineOptions::default(), &NoProgress).map(|engine| engine.cache_positions())
    };
    // 4 layers of 2 * 32 values of 4 bytes: a KiB a position. Weights and what a step works in are told from the first.
    let some = positions(Some(10), None).expect("room");
    assert!((4096..16_384).contains(&some), "{some}");
    assert_eq!(positions(Some(12), None).expect("room"), some + 2048);
    assert_eq!(positions(Some(1024), None).expect("room"), 16_384, "no more than is of use on a host");
    assert_eq!(positions(Some(1024), Some(100)).expect("room"), 112, "whole blocks");
    let error = positions(Some(1), None).expect_err("a context of 4,096 takes 4 MiB");
    assert!(error.to_string().contains("--memory"), "{error}");
}

#[test]
fn the_way_of_each_token_is_the_routers() {
    let (engine, folder) = engine(2, 4);
    let asked = Request { path: true, ..request(&[9, 8, 7], 6) };
    let events: Vec<_> = engine.submit(asked).expect("taken").map(|e| e.expect("a token")).collect();
    let output: Vec<u32> = events.iter().map(|event| event.token).collect();
    until(&engine, "the routes are counted", |live| live.requests.finished == 1);
    let affinity = engine.affinity();
    // Every position that was run: the prompt's three and five of the output.
    assert_eq!(affinity.tokens(), 8.0);
    let table = engine.placement();
    drop(engine);

    let ids: Vec<u32> = [9, 8, 7].into_iter().chain(output[..5].iter().copied()).collect();
    let mut cluster = Setup::new(folder.path(), 1, Strategy::Coherent).start();
    let dump = cluster.logits(&ids, exflow::engine::Feed::Prefill).expect("routes");
    for (at, event) in events.iter().enumerate() {
        assert_eq!(event.path.len(), 3, "a hop for each MoE layer");
        for (layer, hop) in event.path.iter().enumerate() {
            let expected = dump.layers[layer].experts[2 + at] as u32;
            assert_eq!((hop.layer, &hop.experts), (layer, &vec![expected]), "token {at}");
            // Coherent: it is where the expert of the layer before was. The first token's way is a prefill's, at home.
            if let (true, Some(before)) = (at > 0 && layer > 0, event.path.get(layer.wrapping_sub(1))) {
                let (l, e) = ((layer - 1).into(), (before.experts[0] as usize).into());
                assert!(table.holders(l, e).any(|rank| rank == hop.rank), "token {at}, layer {layer}");
            }
        }
    }
}
