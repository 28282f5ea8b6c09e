//! What lingering decides on made-up costs; and worlds of boards in which launches, links and lingering take (virtual) time.

use super::super::board::tests::{Kv, Wire, World, served};
use super::super::made_up::{alone, mix};
use super::*;
use exflow_placement::Strategy;
use proptest::prelude::*;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

fn ms(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

enum Event {
    Comes {
        to: usize,
        wire: Wire,
    },
    Context {
        to: usize,
        kv: Kv,
    },
    Done {
        rank: usize,
        picked: Picked,
    },
    /// Holding back comes to its end.
    Wake {
        rank: usize,
    },
}

/// What takes how long.
#[derive(Debug, Clone, Copy)]
struct Times {
    fixed: Duration,
    row: Duration,
    latency: Duration,
}

/// The ranks of a [`World`], in time.
struct Timed {
    world: World,
    times: Times,
    lingering: Vec<Lingering>,
    busy: Vec<bool>,
    now: Duration,
    order: BinaryHeap<Reverse<(Duration, u64)>>,
    events: BTreeMap<u64, Event>,
    made: u64,
    /// When each token was said.
    said: Vec<Duration>,
    /// The longest that a row was held back, and rows and launches.
    held: Duration,
    rows: usize,
    launches: usize,
}

impl Timed {
    fn new(ranks: usize, (strategy, top_k): (Strategy, usize), times: Times, linger: Linger) -> Self {
        Self {
            world: World::new(ranks, strategy, top_k, 1, false),
            times,
            lingering: (0..ranks).map(|_| Lingering::new(linger)).collect(),
            busy: vec![false; ranks],
            now: Duration::ZERO,
            order: BinaryHeap::new(),
            events: BTreeMap::new(),
            made: 0,
            said: Vec::new(),
            held: Duration::ZERO,
            rows: 0,
            launches: 0,
        }
    }

    fn at(&mut self, time: Duration, event: Event) {
        self.made += 1;
        self.order.push(Reverse((time, self.made)));
        self.events.insert(self.made, event);
    }

    /// What was sent is on its way.
    fn post(&mut self) {
        let time = self.now + self.times.latency;
        let mut all = Vec::new();
        for (&(_, to), queue) in &mut self.world.net.rows {
            all.extend(queue.drain(..).map(|wire| Event::Comes { to, wire }));
        }
        for (&(_, to), queue) in &mut self.world.net.bulk {
            all.extend(queue.drain(..).map(|kv| Event::Context { to, kv }));
        }
        all.into_iter().for_each(|event| self.at(time, event));
    }

    /// A rank that is free takes what is ready, or holds it back.
    fn look(&mut self, rank: usize, running: usize) {
        if self.busy[rank] {
            return;
        }
        let place = &mut self.world.places[rank];
        place.board.tick(self.now);
        let Some(ready) = place.ready() else { return };
        if let Some(left) = self.lingering[rank].left(&ready, running) {
            place.board.hold();
            return self.at(self.now + left, Event::Wake { rank });
        }
        let picked = place.board.take(ready);
        self.lingering[rank].launched(self.now, &picked);
        let of_units = picked.units.iter().map(|unit| unit.spent().linger);
        let longest = of_units.chain(picked.serves.iter().map(|serve| serve.held)).max();
        self.held = self.held.max(longest.unwrap_or_default());
        let seconds = self.times.fixed + self.times.row * picked.rows() as u32;
        self.lingering[rank].hopped(picked.rows(), seconds.as_secs_f64());
        (self.rows, self.launches) = (self.rows + picked.rows(), self.launches + 1);
        self.busy[rank] = true;
        self.at(self.now + seconds, Event::Done { rank, picked });
    }

    fn run(mut self, lengths: &[usize]) -> Self {
        for (sequence, &tokens) in lengths.iter().enumerate() {
            self.world.submit(sequence as u32, tokens);
        }
        self.post();
        (0..self.busy.len()).for_each(|rank| self.look(rank, lengths.len()));
        let mut events = 0;
        while let Some(Reverse((time, number))) = self.order.pop() {
            events += 1;
            assert!(events < 2_000_000, "it goes round in circles");
            self.now = time;
            let under_way = |said: &Vec<u32>, want: usize| said.len() < want;
            let rank = match self.events.remove(&number).expect("each happens once") {
                Event::Comes { to, wire } => {
                    self.world.places[to].board.tick(time);
                    self.world.arrive(to, wire);
                    to
                }
                Event::Context { to, kv } => {
                    self.world.places[to].hear(kv);
                    to
                }
                Event::Done { rank, picked } => {
                    self.world.places[rank].board.tick(time);
                    let before: usize = self.world.said.values().map(Vec::len).sum();
                    self.world.carry(rank, picked);
                    self.post();
                    self.busy[rank] = false;
                    let after: usize = self.world.said.values().map(Vec::len).sum();
                    let running = self.running(lengths, under_way);
                    for _ in before..after {
                        self.said.push(time);
                        self.lingering.iter_mut().for_each(|of| of.heard(time, running.max(1)));
                    }
                    rank
                }
                Event::Wake { rank } => rank,
            };
            let running = self.running(lengths, under_way);
            self.look(rank, running);
        }
        self
    }

    fn running(&self, lengths: &[usize], under_way: impl Fn(&Vec<u32>, usize) -> bool) -> usize {
        lengths
            .iter()
            .enumerate()
            .filter(|(s, want)| under_way(&self.world.said[&(*s as u32)], **want))
            .count()
    }

    /// Every text is that of one rank, and nothing is left.
    fn check(&self, lengths: &[usize], top_k: usize) {
        for (sequence, &tokens) in lengths.iter().enumerate() {
            let id = sequence as u32;
            assert_eq!(self.world.said[&id], alone(id, tokens, top_k), "sequence {id}");
        }
        for place in &self.world.places {
            assert!(place.board.is_empty(), "{:?} waits", place.board.waiting());
        }
    }

    /// Tokens per second of the second half of all.
    fn rate(&self) -> f64 {
        let (half, all) = (self.said.len() / 2, self.said.len() - 1);
        (all - half) as f64 / (self.said[all] - self.said[half]).as_secs_f64()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_row_is_held_back_for_longer_than_the_bound_and_every_text_is_that_of_one_rank(
        ranks in 1_usize..5,
        coherent in any::<bool>(),
        top_k in 1_usize..4,
        fixed_us in 10_u64..3000,
        row_us in 1_u64..500,
        latency_us in 1_u64..20_000,
        bound_us in proptest::option::of(0_u64..100_000),
        lengths in proptest::collection::vec(1_usize..30, 1..9),
    ) {
        let us = Duration::from_micros;
        let strategy = if coherent { Strategy::Coherent } else { Strategy::Vanilla };
        let times = Times { fixed: us(fixed_us), row: us(row_us), latency: us(latency_us) };
        let linger = bound_us.map_or(Linger::Auto, |bound| Linger::For(us(bound)));
        let world = Timed::new(ranks, (strategy, top_k), times, linger).run(&lengths);
        world.check(&lengths, top_k);
        let bound = bound_us.map_or(MOST, us);
        prop_assert!(world.held <= bound, "{:?} of {bound:?}", world.held);
    }
}

/// Whether a rank tries holding back that launches `rows` rows at a time, which the launch before missed by `late` seconds or,
/// with none, by far.
fn promises((fixed, slope): (f64, f64), rows: usize, late: Option<f64>, busy: f64) -> bool {
    let mut costs = Costs::default();
    // Launches of several sizes, around a line.
    for i in 0..200 {
        let n = 1 + i % 7;
        let noise = 1.0 + 0.1 * ((mix(&[i as u64]) % 100) as f64 / 50.0 - 1.0);
        costs.take(n, (fixed + slope * n as f64) * noise);
    }
    let line = costs.line().expect("sizes differ");
    assert!((line.0 - fixed).abs() < 0.1 * (fixed + slope), "{line:?} is not {fixed}, {slope}");
    let (mut watch, mut now) = (Watch::default(), ms(1.0));
    for _ in 0..WATCHED {
        let mut picked = Picked { stage: 1, ..Picked::default() };
        picked.serves = (0..rows).map(|_| served(1, now)).collect();
        now += ms(20.0);
        let came =
            watch.last.get(&1).map_or(now, |last| *last + Duration::from_secs_f64(late.unwrap_or(0.015)));
        picked.serves.iter_mut().for_each(|serve| serve.came = came);
        watch.launched(now, &picked, line.0);
        watch.busy += busy * 0.02;
    }
    watch.promises(now, line)
}

#[test]
fn holding_back_is_tried_where_launches_are_dear_and_just_miss_rows() {
    let (dear, cheap) = ((2e-3, 5e-5), (5e-5, 1e-3));
    assert!(promises(dear, 2, Some(4e-4), 0.9), "dear launches, missed by a little");
    assert!(!promises(dear, 2, None, 0.9), "nobody was missed");
    assert!(!promises(dear, 2, Some(4e-4), 0.3), "the rank is idle anyway");
    assert!(!promises(cheap, 2, Some(4e-4), 0.9), "a launch costs next to nothing");
}

/// Spans of a trial as they come, by the wait that is asked for; returns the wait that is kept.
fn tried(rate: impl Fn(usize, usize) -> f64, before: usize) -> (usize, usize) {
    let mut lingering = Lingering::new(Linger::Auto);
    lingering.size = 8;
    lingering.phases.insert(8, Phase::Try { rates: Rates::default(), before });
    let mut spans = 0;
    loop {
        lingering.spanned(ms(1.0), rate(lingering.wait(), spans));
        spans += 1;
        if let Some(Phase::Keep { wait, .. }) = lingering.phases.get(&8) {
            return (*wait, spans);
        }
        assert!(spans < 100, "a trial ends");
    }
}

#[test]
fn what_was_better_is_kept_and_what_was_worse_given_up_soon() {
    let noisy = |span: usize| 1.0 + 0.02 * (mix(&[span as u64]) % 100) as f64 / 100.0;
    assert_eq!(tried(|wait, span| [100.0, 110.0, 120.0][wait] * noisy(span), 0).0, 2);
    assert_eq!(tried(|wait, span| [100.0, 110.0, 90.0][wait] * noisy(span), 0).0, 1);
    let (kept, spans) = tried(|wait, span| [100.0, 90.0, 80.0][wait] * noisy(span), 0);
    assert!(kept == 0 && spans <= 3 * FIRST, "{spans} spans");
    assert_eq!(tried(|wait, span| [100.0, 102.0, 101.0][wait] * noisy(span), 0).0, 0, "not by enough");
    assert_eq!(tried(|wait, span| [100.0, 103.0, 90.0][wait] * noisy(span), 1).0, 1, "it was kept before");
    assert_eq!(tried(|wait, span| [100.0, 95.0, 90.0][wait] * noisy(span), 1).0, 0, "no more");
}

/// Tokens per second of a world of 4 ranks with 8 sequences.
fn rate(strategy: Strategy, times: Times, linger: Linger) -> f64 {
    let world = Timed::new(4, (strategy, 1), times, linger).run(&[400; 8]);
    world.check(&[400; 8], 1);
    world.rate()
}

#[test]
fn holding_back_pays_where_dear_launches_bound_a_world_and_auto_never_costs_much() {
    let (dear, cheap) = ((ms(2.0), ms(0.05)), (ms(0.4), ms(0.05)));
    let times = |(fixed, row), latency| Times { fixed, row, latency };
    let launches_bound = times(dear, ms(0.1));
    let without = rate(Strategy::Coherent, launches_bound, Linger::Off);
    let held = rate(Strategy::Coherent, launches_bound, Linger::For(ms(1.0)));
    assert!(held > 1.05 * without, "{held} tokens/s, {without} without");
    for (strategy, cost, latency) in [
        (Strategy::Coherent, dear, 0.1),
        (Strategy::Coherent, cheap, 2.0),
        (Strategy::Vanilla, cheap, 0.02),
        (Strategy::Vanilla, dear, 10.0),
    ] {
        let times = times(cost, ms(latency));
        let (auto, without) = (rate(strategy, times, Linger::Auto), rate(strategy, times, Linger::Off));
        assert!(auto > 0.97 * without, "{strategy}, {latency} ms: {auto} tokens/s, {without} without");
    }
}
