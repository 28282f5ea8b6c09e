//! Experts that move while requests run: no token and no logit changes, whenever they move.

use crate::common::tiny::{Folder, Random, Tiny};
use crate::common::{Setup, request};
use exflow::engine::{
    Cluster, ClusterOptions, Completion, Engine, EngineOptions, KvDtype, KvWire, LiveStats, NoProgress,
    PlacementSource, PlacementTable, Rank, Request, Schedule, Strategy, Tokens, TransportKind,
};
use exflow::placement::Replica;
use std::time::{Duration, Instant};

const RANKS: usize = 3;

fn until(engine: &Engine, what: &str, so: impl Fn(&LiveStats) -> bool) {
    running_until(engine, what, so, || ());
}

/// Waits with requests under way, however long it takes: calls `submit` when hardly any are left.
fn running_until(engine: &Engine, what: &str, so: impl Fn(&LiveStats) -> bool, mut submit: impl FnMut()) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let live = engine.live();
        if so(&live) {
            return;
        }
        if live.running + live.waiting < 2 {
            submit();
        }
        assert!(engine.ended().is_none(), "{what}: {:?}", engine.ended());
        assert!(Instant::now() < deadline, "{what}: {:?}", engine.live());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A random table. Some layers are on one rank or two alone, so that contexts have to follow; of some experts there are
/// copies.
fn anywhere(shape: &Tiny, random: &mut Random) -> PlacementTable {
    let layer = |_| {
        let (first, ranks) = (random.below(RANKS), 1 + random.below(RANKS));
        (0..shape.experts).map(|_| Rank::from((first + random.below(ranks)) % RANKS)).collect()
    };
    let assignment: Vec<Vec<Rank>> = (0..shape.layers).map(layer).collect();
    let mut copies = Vec::new();
    for (l, e) in (0..shape.layers).flat_map(|l| (0..shape.experts).map(move |e| (l, e))) {
        let rank = Rank::from(random.below(3 * RANKS));
        if rank.index() < RANKS && rank != assignment[l][e] {
            copies.push(Replica { layer: l.into(), expert: e.into(), rank });
        }
    }
    assert!(!copies.is_empty());
    let mut table = PlacementTable::from_assignment(assignment, RANKS).expect("a table");
    table.set_replicas(copies);
    table
}

/// Prompts of several lengths; of some the likeliest tokens with their probabilities are told, which are all of the logits
/// that matters.
fn requests(shape: &Tiny) -> Vec<Request> {
    let one = |(s, length): (usize, &usize)| Request {
        logprobs: (s % 2 == 0).then_some(20),
        ..request(&shape.prompt(*length, s as u64), 90 + 5 * s)
    };
    [5, 1, 40, 8, 17].iter().enumerate().map(one).collect()
}

/// A model, requests for it, and what one rank makes of them.
struct Told {
    shape: Tiny,
    folder: Folder,
    requests: Vec<Request>,
    expected: Vec<Completion>,
}

impl Told {
    fn of(shape: Tiny, requests: fn(&Tiny) -> Vec<Request>) -> Self {
        let (folder, requests) = (shape.write(), requests(&shape));
        let mut one = Setup::one_rank(folder.path()).start();
        let expected = one.generate(&requests, &mut |_| {}).expect("one rank").sequences;
        Self { shape, folder, requests, expected }
    }

    fn submit(&self, engine: &Engine) -> Vec<Tokens> {
        self.requests.iter().map(|request| engine.submit(request.clone()).expect("taken")).collect()
    }

    /// Waits for what was submitted, which must say the same.
    fn check(&self, running: Vec<Tokens>) {
        for (running, expected) in running.into_iter().zip(&self.expected) {
            assert_eq!(running.complete().expect("tokens").output_ids, expected.output_ids);
        }
    }
}

fn over(cluster: Cluster) -> Engine {
    Engine::over(cluster, EngineOptions::default()).expect("an engine")
}

fn same(done: &[Completion], expected: &[Completion], what: &str) {
    for (s, (done, expected)) in done.iter().zip(expected).enumerate() {
        assert_eq!(done.output_ids, expected.output_ids, "{what}: tokens of {s}");
        assert!(done.logprobs == expected.logprobs, "{what}: a probability of {s}");
        assert_eq!(done.logprobs.is_some(), s % 2 == 0);
    }
}

#[test]
fn in_rounds_no_bit_changes_whenever_experts_move() {
    for (n, strategy) in [Strategy::Coherent, Strategy::Vanilla].into_iter().enumerate() {
        moves(1, Schedule::Rounds, strategy, TransportKind::Local, n as u64);
        moves(2, Schedule::Rounds, strategy, TransportKind::Local, 10 + n as u64);
    }
}

#[test]
fn in_flow_no_bit_changes_whenever_experts_move() {
    for (n, strategy) in [Strategy::Coherent, Strategy::Vanilla].into_iter().enumerate() {
        moves(1, Schedule::Flow, strategy, TransportKind::Local, 20 + n as u64);
        moves(2, Schedule::Flow, strategy, TransportKind::Local, 30 + n as u64);
    }
}

#[test]
fn over_quic_no_bit_changes_whenever_experts_move() {
    moves(2, Schedule::Rounds, Strategy::Coherent, TransportKind::Quic, 40);
    moves(2, Schedule::Flow, Strategy::Coherent, TransportKind::Quic, 50);
}

/// Moves experts again and again while requests come and run, each time after a random number of tokens.
fn moves(top_k: usize, schedule: Schedule, strategy: Strategy, transport: TransportKind, seed: u64) {
    let what = format!("top-{top_k}, {schedule}, {strategy:?}, {transport}, seed {seed}");
    let shape = Tiny { top_k, positions: 160, layers: 5, seed: 300 + top_k as u64, ..Tiny::default() };
    let told = Told::of(shape, requests);
    let Told { shape, folder, requests, expected } = &told;

    let mut random = Random::new(seed);
    let first = anywhere(shape, &mut random);
    let setup = Setup { schedule, transport, ..Setup::new(folder.path(), RANKS, strategy) };
    let setup = Setup { placement: PlacementSource::Table(first), ..setup };
    let engine = over(setup.start());
    let (mut while_running, mut last) = (0, None);
    for round in 0..2 {
        // The first runs along; the others come when it has some tokens.
        let mut watched = engine.submit(requests[0].clone()).expect("taken");
        let mut others = Vec::new();
        let mut heard = Vec::new();
        let mut take = |watched: &mut Tokens, count: usize| {
            heard.extend(watched.take(count).map(|event| event.expect("a token")));
        };
        let submit = |s: usize| (s, engine.submit(requests[s].clone()).expect("taken"));
        for step in 0..3 {
            take(&mut watched, 1 + random.below(18));
            if step == 0 {
                others.extend((1..requests.len()).map(submit));
            }
            let table = anywhere(shape, &mut random);
            engine.move_to(table.clone()).expect("it fits");
            let asked = engine.live().moves.asked;
            let ended = |live: &LiveStats| live.moves.done + live.moves.refused == asked;
            running_until(&engine, &what, ended, || others.push(submit(2)));
            assert_eq!(engine.placement().assignment, table.assignment, "{what}");
            assert_eq!(engine.placement().replicas, table.replicas, "{what}");
            while_running += usize::from(engine.live().running > 0);
            last = Some(table);
        }
        let rest: Vec<_> = watched.map(|event| event.expect("a token")).collect();
        heard.extend(rest);
        let ids: Vec<u32> = heard.iter().map(|event| event.token).collect();
        assert_eq!(ids, expected[0].output_ids, "{what}: tokens of 0 in round {round}");
        let heard: Vec<_> = heard.into_iter().filter_map(|event| event.logprobs).collect();
        assert!(expected[0].logprobs.as_ref() == Some(&heard), "{what}: a probability of 0");
        for (s, tokens) in others {
            let (done, expected) = (tokens.complete().expect("tokens"), &expected[s]);
            assert_eq!(done.output_ids, expected.output_ids, "{what}, round {round}");
            assert!(done.logprobs == expected.logprobs, "{what}, round {round}: a probability");
        }
    }
    let moves = engine.live().moves;
    assert_eq!((moves.asked, moves.done, moves.refused), (6, 6, 0), "{what}: {:?}", moves.why);
    assert!(moves.experts > 0 && while_running >= 4, "{what}: {while_running} of 6 ended while requests ran");
    // Between two steps a rank takes in one layer, so that requests go on while experts are read: in rounds all of them with
    // each layer, in flow at least some.
    let least = if schedule == Schedule::Rounds { shape.layers as u64 - 1 } else { 1 };
    assert!(moves.tokens >= 4 * least, "{what}: {moves:?}");
    // With nothing under way, too; and what is not on a rank any more is not asked of it.
    assert!(last.is_some());
    engine.move_to(anywhere(shape, &mut random)).expect("it fits");
    until(&engine, &what, |live| live.moves.done == 7);
    let again: Vec<Completion> = requests
        .iter()
        .map(|request| engine.submit(request.clone()).expect("taken").complete().expect("tokens"))
        .collect();
    same(&again, expected, &what);
    engine.finish();
}

#[test]
fn a_cache_of_any_type_is_passed_on_as_it_is() {
    let shape = Tiny { positions: 160, seed: 320, ..Tiny::default() };
    let folder = shape.write();
    let requests = requests(&shape);
    for (n, kv_dtype) in [KvDtype::F16, KvDtype::Q8].into_iter().enumerate() {
        let options = |ranks| ClusterOptions { ranks, kv_dtype, ..ClusterOptions::new(folder.path()) };
        let mut one = Cluster::start(options(1), &NoProgress).expect("one rank");
        let expected = one.generate(&requests, &mut |_| {}).expect("one rank").sequences;
        let cluster = Cluster::start(options(RANKS), &NoProgress).expect("a cluster");
        let engine = over(cluster);
        let mut random = Random::new(60 + n as u64);
        // All of it is on one rank, then on another: nobody has anything but from there.
        for rank in [1, 2] {
            let submit = |s: usize| (s, engine.submit(requests[s].clone()).expect("taken"));
            let mut running: Vec<_> = (0..requests.len()).map(submit).collect();
            let first: Vec<_> = running[0].1.by_ref().take(5 + random.below(20)).collect();
            let all = vec![vec![Rank::from(rank); shape.experts]; shape.layers];
            let told_before = engine.live().moves.tokens;
            engine.move_to(PlacementTable::from_assignment(all, RANKS).expect("a table")).expect("it fits");
            let ended = |live: &LiveStats| live.moves.done == rank as u64;
            running_until(&engine, "a move", ended, || running.push(submit(2)));
            assert!(engine.live().moves.tokens > told_before, "while requests run");
            let rest: Vec<_> = running.remove(0).1.collect();
            let told = first.into_iter().chain(rest).map(|event| event.expect("a token").token);
            assert_eq!(told.collect::<Vec<_>>(), expected[0].output_ids, "{kv_dtype}, rank {rank}");
            for (s, running) in running {
                let (done, expected) = (running.complete().expect("tokens"), &expected[s]);
                assert_eq!(done.output_ids, expected.output_ids, "{kv_dtype}, rank {rank}");
                assert!(done.logprobs == expected.logprobs, "{kv_dtype}, rank {rank}: a probability");
            }
        }
        assert!(engine.move_to(PlacementTable::linear(shape.layers, shape.experts, RANKS + 1)).is_err());
        assert!(engine.move_to(PlacementTable::linear(shape.layers + 1, shape.experts, RANKS)).is_err());
    }
}

#[test]
fn what_a_context_was_made_from_is_not_passed_on() {
    let told = Told::of(Tiny { seed: 340, ..Tiny::default() }, requests_of_20);
    let shape = &told.shape;
    let options =
        ClusterOptions { ranks: RANKS, kv_wire: KvWire::Hidden, ..ClusterOptions::new(told.folder.path()) };
    let engine = over(Cluster::start(options, &NoProgress).expect("a cluster"));
    let running = told.submit(&engine);
    // Everything is where everything was before, or on fewer ranks; then one of them would have to learn.
    let two = PlacementTable::linear(shape.layers, shape.experts, 2).assignment;
    let two = PlacementTable::from_assignment(two, RANKS).expect("a table");
    for (n, table) in
        [PlacementTable::linear(shape.layers, shape.experts, RANKS), two].into_iter().enumerate()
    {
        engine.move_to(table).expect("it fits");
        until(&engine, "no new rank", |live| live.moves.done == n as u64 + 1);
    }
    let again = told.submit(&engine);
    engine.move_to(PlacementTable::round_robin(shape.layers, shape.experts, RANKS)).expect("it fits");
    until(&engine, "a refusal", |live| live.moves.refused == 1);
    let why = engine.live().moves.why.expect("a reason");
    assert!(why.contains("rank 2 holds no context of layer 0") && why.contains("--kv-wire"), "{why}");
    [running, again].into_iter().for_each(|running| told.check(running));
}

fn requests_of_20(shape: &Tiny) -> Vec<Request> {
    (0..3).map(|s| request(&shape.prompt(4 + 7 * s, s as u64), 20)).collect()
}

#[test]
fn a_rank_without_room_for_both_tables_is_named_and_all_go_on() {
    let told = Told::of(Tiny { seed: 330, ..Tiny::default() }, requests_of_20);
    let (shape, folder) = (&told.shape, &told.folder);
    let options = |memory: u64| ClusterOptions {
        ranks: 2,
        memory: Some(memory),
        cache_positions: Some(512),
        ..ClusterOptions::new(folder.path())
    };
    // The least that the ranks start with, within a KiB: no room for anything that is to come.
    let (mut small, mut enough) = (0, 64 << 20);
    while enough - small > 1024 {
        let middle = (small + enough) / 2;
        match Cluster::start(options(middle), &NoProgress) {
            Ok(_) => enough = middle,
            Err(error) => {
                assert!(error.to_string().contains("are missing"), "{error}");
                small = middle;
            }
        }
    }
    let cluster = Cluster::start(options(enough), &NoProgress).expect("it started before");
    let before = cluster.placement().clone();
    let engine = over(cluster);
    let running = told.submit(&engine);
    engine.move_to(PlacementTable::linear(shape.layers, shape.experts, 2)).expect("it fits the model");
    until(&engine, "a refusal", |live| live.moves.refused == 1);
    let why = engine.live().moves.why.expect("a reason");
    assert!(why.contains("rank ") && why.contains("experts beside") && why.contains("are missing"), "{why}");
    assert_eq!(engine.placement().assignment, before.assignment);
    told.check(running);
}

#[test]
fn memory_is_left_for_moves_where_that_is_asked_for() {
    let told = Told::of(Tiny { seed: 350, ..Tiny::default() }, requests_of_20);
    let (shape, folder) = (&told.shape, &told.folder);
    let start = |memory: u64, room_for_moves: bool| {
        let options = ClusterOptions {
            ranks: 2,
            memory: Some(memory),
            room_for_moves,
            ..ClusterOptions::new(folder.path())
        };
        let cluster = Cluster::start(options, &NoProgress).ok()?;
        Some(over(cluster))
    };
    let positions = |memory| start(memory, false).map_or(0, |engine| engine.cache_positions());
    // So much that the cache takes what is left, and no more than that.
    let (mut small, mut large) = (0, 64 << 20);
    let memory = loop {
        let middle = (small + large) / 2;
        match positions(middle) / shape.positions {
            0..10 => small = middle,
            10..15 => break middle,
            _ => large = middle,
        }
        assert!(large - small > 1024, "no memory of which the cache takes the rest");
    };
    let engine = start(memory, true).expect("a cluster");
    // Once more the matrices of a rank's experts, at the bytes that keys and values of a position take.
    let experts = 4 * shape.layers * shape.experts / 2 * 2 * shape.hidden * shape.inner;
    let position = 4 * shape.layers * 2 * shape.hidden;
    let (left, all) = (engine.cache_positions(), positions(memory));
    assert!(left + experts / position <= all && left >= shape.positions, "{left} of {all} positions");
    let running = told.submit(&engine);
    engine.move_to(PlacementTable::linear(shape.layers, shape.experts, 2)).expect("it fits the model");
    until(&engine, "a move", |live| live.moves.done == 1);
    told.check(running);
}
