//! Predictions that can be worked out by hand, and what must hold of all of them.

use super::streams::{DRAWS, stretches};
use super::*;

const LAYERS: usize = 4;
const ALPHA: f64 = 0.010;
const HOP: f64 = 0.001;

/// Four layers, four experts, so that expert e of a linear table of two ranks is on rank e / 2.
fn shape() -> Shape {
    Shape { layers: (0..LAYERS).map(Some).collect(), hidden_bytes: 384.0, kv_bytes: 768.0 }
}

fn measured(ranks: usize, bytes_per_s: f64) -> Measurements {
    let flat = Curve(vec![(1, HOP), (16, HOP)]);
    let both = ByStrategy { vanilla: flat.clone(), coherent: flat.clone() };
    let times = RankTimes {
        hop: both.clone(),
        serve: flat.clone(),
        begin: flat.clone(),
        end: flat.clone(),
        attend: both.clone(),
        work: both,
        sample: flat,
        crowded: 1.0,
        waking: Waking::default(),
    };
    let link = LinkTime { latency_s: ALPHA, bytes_per_s, message_s: 0.0 };
    let (ranks, links) = (vec![times; ranks], vec![vec![link; ranks]; ranks]);
    Measurements { ranks, links, exchange_s: ALPHA, loads: Vec::new() }
}

/// Every token takes these experts.
fn always(experts: [i32; LAYERS]) -> RoutingTrace {
    let mut trace = RoutingTrace::new(LAYERS, 1);
    (0..64).for_each(|_| trace.push_token(&experts));
    trace
}

/// Drawn routes in which the next expert is the last one more often than not.
fn drawn(top_k: usize) -> RoutingTrace {
    let mut dice = exflow_placement::Rng::new(5);
    let mut trace = RoutingTrace::new(LAYERS, top_k);
    for _ in 0..200 {
        let mut at = dice.below(4) as i32;
        let mut ids = Vec::new();
        for _ in 0..LAYERS {
            at = if dice.below(3) > 0 { at } else { dice.below(4) as i32 };
            ids.extend((0..top_k as i32).map(|k| (at + k) % 4));
        }
        trace.push_token(&ids);
    }
    trace
}

fn run(trace: &RoutingTrace, strategy: Strategy, schedule: Schedule, sequences: usize) -> Prediction {
    run_in(&measured(2, 1e12), trace, strategy, schedule, sequences)
}

fn run_in(
    measured: &Measurements,
    trace: &RoutingTrace,
    strategy: Strategy,
    schedule: Schedule,
    sequences: usize,
) -> Prediction {
    let table = PlacementTable::linear(LAYERS, 4, 2);
    let setting = Setting { strategy, schedule, combine: Combine::Exact, table: &table, groups: &[] };
    predict(measured, &shape(), Workload { routes: trace, sequences }, setting)
}

fn near(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-3 * b.abs().max(1e-9), "{a} is not {b}");
}

#[test]
fn a_step_in_rounds_is_added_up() {
    // Attention and experts of each layer, head; an exchange per layer, or two. Ids are gathered behind the next step.
    let trace = always([0, 1, 2, 3]);
    let work = 1e3 * HOP * (2 * LAYERS + 1) as f64;
    let coherent = run(&trace, Strategy::Coherent, Schedule::Rounds, 1);
    near(coherent.ms_per_token, work + 1e3 * ALPHA * LAYERS as f64);
    near(coherent.waits_per_layer, 1.0);
    let vanilla = run(&trace, Strategy::Vanilla, Schedule::Rounds, 1);
    near(vanilla.ms_per_token, work + 1e3 * ALPHA * (2 * LAYERS) as f64);
    near(vanilla.parts.travel_ms, 1e3 * ALPHA * (2 * LAYERS) as f64);
    // With nothing that grows by the row, more sequences cost nothing.
    near(run(&trace, Strategy::Vanilla, Schedule::Rounds, 8).tokens_per_s, 8.0 * vanilla.tokens_per_s);
}

#[test]
fn a_token_in_flow_pays_for_its_own_crossings() {
    // 0, 1 on rank 0, then 2, 3 on rank 1: one crossing within the token, one from it to its successor.
    let trace = always([0, 1, 2, 3]);
    let hops = 1e3 * HOP * (LAYERS + 1) as f64;
    let coherent = run(&trace, Strategy::Coherent, Schedule::Flow, 1);
    near(coherent.ms_per_token, hops + 2e3 * ALPHA);
    near(coherent.crossings_per_token, 2.0);
    near(coherent.stay_rate, 0.5);
    near(coherent.parts.travel_ms, 2e3 * ALPHA);
    // At home on rank 0, layers 2 and 3 are there and back, each with a hop that serves.
    let vanilla = run(&trace, Strategy::Vanilla, Schedule::Flow, 1);
    near(vanilla.ms_per_token, hops + 2e3 * HOP + 4e3 * ALPHA);
    near(vanilla.waits_per_layer, 1.0);
    // Where nothing crosses, both do the same.
    let here = always([0, 1, 0, 1]);
    near(run(&here, Strategy::Coherent, Schedule::Flow, 1).ms_per_token, hops);
    near(run(&here, Strategy::Vanilla, Schedule::Flow, 1).ms_per_token, hops);
}

#[test]
fn a_hop_takes_as_long_as_the_experts_that_run_in_it() {
    const EACH: f64 = 1e-4;
    let with = |trace: &RoutingTrace, strategy| {
        let mut measured = measured(2, 1e12);
        let serve = Curve(vec![(1, HOP), (16, HOP + 15.0 * EACH)]);
        measured.ranks.iter_mut().for_each(|rank| rank.serve = serve.clone());
        run_in(&measured, trace, strategy, Schedule::Flow, 1).ms_per_token
            - run(trace, strategy, Schedule::Flow, 1).ms_per_token
    };
    // Rank 1 serves the last two layers, and rank 0 goes on without experts of its own.
    near(with(&always([0, 1, 2, 3]), Strategy::Vanilla), -2e3 * EACH);
    near(with(&always([0, 1, 0, 1]), Strategy::Vanilla), 0.0);
    near(with(&always([0, 1, 2, 3]), Strategy::Coherent), 0.0);
    // Two experts a token, at each layer one of either rank: a row is timed with both of its experts, each serves one, and
    // the token goes on with neither.
    let mut apart = RoutingTrace::new(LAYERS, 2);
    (0..64).for_each(|_| apart.push_token(&[0, 2, 0, 2, 0, 2, 0, 2]));
    near(with(&apart, Strategy::Coherent), -1e3 * LAYERS as f64 * (0.5 + 1.0) * EACH);
}

#[test]
fn who_rested_takes_longer_once() {
    let trace = always([0, 1, 2, 3]);
    let more = |strategy, schedule| {
        let mut measured = measured(2, 1e12);
        let awake = run_in(&measured, &trace, strategy, schedule, 1).ms_per_token;
        // Half of it after a latency's rest, all of it after two.
        measured.ranks.iter_mut().for_each(|rank| rank.waking = Waking(vec![(2.0 * ALPHA, 4e-3)]));
        run_in(&measured, &trace, strategy, schedule, 1).ms_per_token - awake
    };
    // After each exchange.
    near(more(Strategy::Coherent, Schedule::Rounds), 2.0 * LAYERS as f64);
    near(more(Strategy::Vanilla, Schedule::Rounds), 4.0 * LAYERS as f64);
    // A token comes to rank 1 and back to rank 0, whose last one left longer than two latencies ago.
    near(more(Strategy::Coherent, Schedule::Flow), 2.0 * 4.0);
    // Rank 1 serves twice, and rank 0 goes on after two latencies and the hop that served each time.
    near(more(Strategy::Vanilla, Schedule::Flow), 4.0 * 4.0);
}

#[test]
fn messages_take_of_cores_that_are_short() {
    let trace = always([0, 1, 2, 3]);
    let with = |message_s: f64, crowded: f64| {
        let mut measured = measured(2, 1e12);
        measured.ranks.iter_mut().for_each(|rank| rank.crowded = crowded);
        measured.links.iter_mut().flatten().for_each(|link| link.message_s = message_s);
        run_in(&measured, &trace, Strategy::Coherent, Schedule::Flow, 1).ms_per_token
    };
    // From each rank goes a row. On one core for both who gets it works the longer next time. What keys and values have waited
    // goes while both rest; and where a token ends, its successor begins while either end handles which one it was.
    near(with(1e-4, 2.0) - with(0.0, 2.0), 0.1 * 4.0);
    // On a core of each other threads are not in the way.
    near(with(1e-4, 1.0), with(0.0, 1.0));
}

#[test]
fn crossings_are_those_that_a_replay_of_the_trace_counts() {
    let (trace, table) = (drawn(1), PlacementTable::linear(LAYERS, 4, 2));
    let played = run(&trace, Strategy::Coherent, Schedule::Flow, 1).crossings_per_token;
    // The tokens that are played and counted, and the way to the first of them.
    let counted = |draw: Streams<'_>| trace.slice(draw.token(0, UNCOUNTED)..draw.token(0, TOKENS - 1) + 1);
    let score = |draw| exflow_placement::score_trace(&table, &counted(draw)).crossings_per_token;
    let replayed: Vec<f64> = Streams::draws(&trace, 1).map(score).collect();
    assert_eq!(replayed.len(), DRAWS.1, "one for each {} tokens", trace.tokens() / DRAWS.1);
    let replayed = replayed.iter().sum::<f64>() / DRAWS.1 as f64;
    assert!((played - replayed).abs() <= 1.5 / (TOKENS - UNCOUNTED) as f64, "{played}, {replayed}");
    let rounds = run(&trace, Strategy::Coherent, Schedule::Rounds, 1).crossings_per_token;
    assert!((played - rounds).abs() < 1e-9, "{played}, {rounds}");
}

#[test]
fn every_token_of_every_setting_gets_done() {
    for (top_k, sequences) in [(1, 1), (1, 8), (2, 1), (2, 8), (3, 33)] {
        let trace = drawn(top_k);
        for strategy in [Strategy::Vanilla, Strategy::Coherent] {
            for schedule in [Schedule::Rounds, Schedule::Flow] {
                let p = run(&trace, strategy, schedule, sequences);
                assert!(p.tokens_per_s > 1.0 && p.tokens_per_s.is_finite(), "{strategy} {schedule}: {p:?}");
                let all = p.parts.compute_ms + p.parts.travel_ms + p.parts.queue_ms + p.parts.context_ms;
                assert!(all <= 1.1 * p.ms_per_token, "{strategy} {schedule} {top_k} {sequences}: {p:?}");
                assert_eq!(p.kv_bytes > 0.0, strategy == Strategy::Coherent);
            }
        }
    }
}

#[test]
fn ranks_that_share_a_core_take_turns() {
    let (trace, table) = (drawn(1), PlacementTable::linear(LAYERS, 4, 2));
    let play = |crowded: f64, schedule: Schedule| {
        let mut measured = measured(2, 1e12);
        measured.ranks.iter_mut().for_each(|rank| rank.crowded = crowded);
        measured.exchange_s = 0.0;
        measured.links.iter_mut().flatten().for_each(|link| link.latency_s = 0.0);
        let setting = Setting {
            strategy: Strategy::Vanilla,
            schedule,
            combine: Combine::Exact,
            table: &table,
            groups: &[],
        };
        predict(&measured, &shape(), Workload { routes: &trace, sequences: 32 }, setting).tokens_per_s
    };
    near(play(1.0, Schedule::Rounds) / play(2.0, Schedule::Rounds), 2.0);
    let flow = play(1.0, Schedule::Flow) / play(2.0, Schedule::Flow);
    assert!((1.7..2.1).contains(&flow), "{flow}");
}

#[test]
fn keys_and_values_cannot_be_faster_than_the_link() {
    let (trace, table) = (drawn(1), PlacementTable::linear(LAYERS, 4, 2));
    let bytes_per_s = 100_000.0;
    for schedule in [Schedule::Rounds, Schedule::Flow] {
        let setting = Setting {
            strategy: Strategy::Coherent,
            schedule,
            combine: Combine::Exact,
            table: &table,
            groups: &[],
        };
        let work = Workload { routes: &trace, sequences: 8 };
        let p = predict(&measured(2, bytes_per_s), &shape(), work, setting);
        // Two links carry them.
        let most = 2.0 * bytes_per_s / p.kv_bytes;
        assert!(p.tokens_per_s < 1.15 * most, "{schedule}: {} of at most {most}", p.tokens_per_s);
        assert!(p.parts.context_ms > 0.0, "{schedule}: {p:?}");
    }
}

fn tried(tokens_per_s: f64) -> Tried {
    Tried { tokens_per_s, waits: None }
}

#[test]
fn a_trial_says_how_much_later_messages_come() {
    let (trace, table) = (drawn(1), PlacementTable::linear(LAYERS, 4, 2));
    let replicated = PlacementTable::round_robin(LAYERS, 4, 2);
    for strategy in [Strategy::Vanilla, Strategy::Coherent] {
        let of = |table| Setting {
            strategy,
            schedule: Schedule::Flow,
            combine: Combine::Exact,
            table,
            groups: &[],
        };
        let work = Workload { routes: &trace, sequences: 4 };
        let mut alone = measured(2, 1e12);
        let mut busy = alone.clone();
        busy.links.iter_mut().flatten().for_each(|link| link.latency_s += 3.0 * HOP);
        let truth = predict(&busy, &shape(), work, of(&table));
        let count = truth.waits_per_layer * LAYERS as f64;
        let waits = Waits { count, each_s: 1e-3 * truth.parts.travel_ms / count };
        let seen = Tried { tokens_per_s: truth.tokens_per_s, waits: Some(waits) };
        let load = Load::of(&alone, &shape(), work, of(&table), seen);
        assert!((load.delay_s - 3.0 * HOP).abs() < 0.3 * HOP, "{strategy}: {load:?}");
        assert!((load.factor - 1.0).abs() < 0.2, "{strategy}: the links', not the ranks': {load:?}");
        // A text that waits half as often again is not taken for slow ranks.
        let longer = truth.ms_per_token * 1e-3 + 0.5 * count * waits.each_s;
        let far = Waits { count: 1.5 * count, ..waits };
        let seen = Tried { tokens_per_s: work.sequences as f64 / longer, waits: Some(far) };
        let other = Load::of(&alone, &shape(), work, of(&table), seen);
        assert!((other.factor / load.factor - 1.0).abs() < 0.01, "{strategy}: {other:?}");
        alone.loads.push(load);
        let [says, does] =
            [&alone, &busy].map(|world| predict(world, &shape(), work, of(&replicated)).tokens_per_s);
        assert!((says / does - 1.0).abs() < 0.05, "{strategy}: {says} of {does}");
    }
}

#[test]
fn a_trial_says_how_much_longer_the_ranks_take() {
    let (trace, table) = (drawn(1), PlacementTable::linear(LAYERS, 4, 2));
    let other = PlacementTable::round_robin(LAYERS, 4, 2);
    let apart = |seconds: f64| {
        let mut apart = Measurements { exchange_s: seconds, ..measured(2, 1e12) };
        apart.links.iter_mut().flatten().for_each(|link| link.latency_s = seconds);
        apart
    };
    for (strategy, schedule) in [
        (Strategy::Vanilla, Schedule::Rounds),
        (Strategy::Coherent, Schedule::Rounds),
        (Strategy::Vanilla, Schedule::Flow),
        (Strategy::Coherent, Schedule::Flow),
    ] {
        let setting = |table| Setting { strategy, schedule, combine: Combine::Exact, table, groups: &[] };
        let (work, mut alone) = (Workload { routes: &trace, sequences: 8 }, apart(0.1 * HOP));
        let mut slow = alone.clone();
        slow.ranks.iter_mut().for_each(|times| times.stretch(3.0));
        let truth = |table| predict(&slow, &shape(), work, setting(table));
        let trial = Load::of(&alone, &shape(), work, setting(&table), tried(truth(&table).tokens_per_s));
        // A little nearer to 1; and in flow an order of events more or less makes a rate that two factors share.
        let off = if schedule == Schedule::Rounds { 0.1 } else { 0.3 };
        assert!((trial.factor - 3.0).abs() < off, "{strategy} {schedule}: {trial:?}");
        // A trial with another number of sequences is nearer to other numbers of them alone.
        let far = Load { sequences: 100, factor: 9.0, ..trial };
        let vain = Load { schedule: Schedule::Flow, strategy: Strategy::Vanilla, factor: 7.0, ..trial };
        let mine = (strategy, schedule) == (vain.strategy, vain.schedule);
        alone.loads = vec![far, trial];
        alone.loads.extend((!mine).then_some(vain));
        let predicted = predict(&alone, &shape(), work, setting(&other)).tokens_per_s;
        let off = (predicted / truth(&other).tokens_per_s - 1.0).abs();
        let most = if schedule == Schedule::Rounds { 0.03 } else { 0.05 };
        assert!(off < most, "{strategy} {schedule}: {off}");
    }
    // Where links take nearly all of the time, a text that is a tenth slower does not make the ranks out to be slow.
    let factor = |world: Measurements| {
        let (strategy, schedule) = (Strategy::Coherent, Schedule::Flow);
        let setting = Setting { strategy, schedule, combine: Combine::Exact, table: &table, groups: &[] };
        let work = Workload { routes: &trace, sequences: 1 };
        let rate = predict(&world, &shape(), work, setting).tokens_per_s;
        Load::of(&world, &shape(), work, setting, tried(rate / 1.1)).factor
    };
    let (near_by, far_off) = (factor(apart(0.0)), factor(apart(100.0 * HOP)));
    assert!((near_by - 1.1).abs() < 0.01, "{near_by}");
    assert!(far_off < 1.3, "{far_off}: to explain a tenth would take a large one");
    // What no rank can make up for is not looked for for ever.
    let setting = Setting {
        strategy: Strategy::Vanilla,
        schedule: Schedule::Flow,
        combine: Combine::Exact,
        table: &table,
        groups: &[],
    };
    let work = Workload { routes: &trace, sequences: 8 };
    let least = Load::of(&measured(2, 1e12), &shape(), work, setting, tried(1e9));
    assert!(least.factor < 0.26 && least.factor > 0.2, "{least:?}");
}

#[test]
fn a_bounded_sequence_sends_less_and_crosses_back() {
    let (trace, table) = (drawn(1), PlacementTable::linear(LAYERS, 4, 4));
    for schedule in [Schedule::Rounds, Schedule::Flow] {
        let play = |groups: &[u16]| {
            let strategy = Strategy::Coherent;
            let setting = Setting { strategy, schedule, combine: Combine::Exact, table: &table, groups };
            predict(&measured(4, 1e12), &shape(), Workload { routes: &trace, sequences: 4 }, setting)
        };
        let (world, pair) = (play(&[]), play(&[0, 0, 1, 1]));
        assert!(pair.kv_bytes < 0.4 * world.kv_bytes, "{schedule}: one peer, not three");
        assert!(pair.crossings_per_token > world.crossings_per_token, "{schedule}");
        assert!(pair.combine_bytes > 0.0, "{schedule}: what is outside comes back");
        // Alone in its group, a sequence does what vanilla does.
        let alone = play(&[0, 1, 2, 3]);
        assert!(alone.kv_bytes == 0.0 && alone.combine_bytes > pair.combine_bytes, "{schedule}");
    }
}

#[test]
fn a_stream_is_of_one_text() {
    // Texts of 40, 10 and 60 tokens: one stretch from the middle, one that runs on, two.
    let mut trace = RoutingTrace::new(LAYERS, 1);
    for tokens in [40, 10, 60] {
        trace.mark_break();
        (0..tokens).for_each(|_| trace.push_token(&[0; LAYERS]));
    }
    assert_eq!(stretches(&trace), [8, 40, 53, 83]);
    let begins = |sequences| Streams::draws(&trace, sequences).map(|draw| draw.begins).collect::<Vec<_>>();
    assert_eq!(
        begins(2),
        [[8, 40], [53, 83], [52, 65], [95, 20]],
        "later and at home elsewhere in their second turn"
    );
    assert_eq!(begins(64).len(), DRAWS.0);
}

#[test]
fn a_text_that_stays_makes_its_sequence_quick() {
    // Two sequences at home on ranks 0 and 1, both of whose texts stay on rank 0.
    let text = |trace: &mut RoutingTrace| (0..TOKENS).for_each(|_| trace.push_token(&[0; LAYERS]));
    let mut trace = RoutingTrace::new(LAYERS, 1);
    text(&mut trace);
    trace.mark_break();
    text(&mut trace);
    let vanilla = run(&trace, Strategy::Vanilla, Schedule::Flow, 2);
    // Until the quick one is done, it makes nearly all of the tokens.
    let quick = 1e-3 * HOP.recip() * 1e3 / (LAYERS + 1) as f64;
    assert!(
        (0.9 * quick..1.2 * quick).contains(&vanilla.tokens_per_s),
        "{} of {quick}",
        vanilla.tokens_per_s
    );
}

#[test]
fn a_play_is_the_mean_of_several_parts_of_the_trace() {
    // For 24 tokens nothing crosses, for the next 24 everything does.
    let (table, mut trace) = (PlacementTable::linear(LAYERS, 4, 2), RoutingTrace::new(LAYERS, 1));
    for token in 0..2 * TOKENS {
        trace.push_token(if token < TOKENS { &[0, 0, 1, 1] } else { &[0, 2, 0, 2] });
    }
    assert_eq!(Streams::draws(&trace, 1).map(|draw| draw.token(0, 0)).collect::<Vec<_>>(), [0, TOKENS]);
    for (strategy, schedule) in [
        (Strategy::Coherent, Schedule::Flow),
        (Strategy::Vanilla, Schedule::Flow),
        (Strategy::Coherent, Schedule::Rounds),
    ] {
        let setting = Setting { strategy, schedule, combine: Combine::Exact, table: &table, groups: &[] };
        let of = |routes: &RoutingTrace| {
            predict(&measured(2, 1e12), &shape(), Workload { routes, sequences: 1 }, setting)
        };
        let halves = [of(&trace.slice(0..TOKENS)), of(&trace.slice(TOKENS..2 * TOKENS))];
        let (both, apart) = (of(&trace), halves.map(|half| half.ms_per_token));
        near(both.ms_per_token, (apart[0] + apart[1]) / 2.0);
        near(both.tokens_per_s, 1e3 / both.ms_per_token);
        near(both.parts.travel_ms, (halves[0].parts.travel_ms + halves[1].parts.travel_ms) / 2.0);
        assert!(schedule == Schedule::Rounds || apart[1] > 2.0 * apart[0], "{apart:?}");
    }
}
