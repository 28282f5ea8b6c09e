//! Flow, played event by event: tokens on a board per rank, hops that take as long as measured, messages that take as
//! long as their links do. The board's choice is the engine's: the earliest layer first, nobody passed over for long.

mod sending;

use super::{Parts, Place, Prediction, Scene, TOKENS, UNCOUNTED, remote_partials};
use crate::options::Combine;
use crate::runtime::bounds;
use exflow_placement::{Rank, Strategy};
use sending::{Bulk, Post};
use std::collections::BinaryHeap;

/// As on the engine's board.
const PATIENCE: u64 = crate::runtime::PATIENCE;

pub(super) fn play(scene: Scene<'_>) -> Prediction {
    let mut play = Play::new(scene);
    play.run();
    play.prediction()
}

/// Something that a rank can work on.
#[derive(Clone, Copy)]
struct Item {
    sequence: usize,
    /// The layer that is entered next; the number of layers: the head.
    stage: usize,
    /// Whether the token itself is here, or this rank only serves experts of it.
    token: bool,
    /// Experts of this rank that run for it.
    choices: usize,
    /// Where partials go, of a token that is elsewhere or waits for others here.
    next: usize,
    since: u64,
    /// When it came, and when it became ready.
    came: f64,
    ready: f64,
}

/// A token between two layers, wherever it is.
#[derive(Clone, Copy, Default)]
struct Flight {
    token: usize,
    /// Partials that it waits for.
    missing: usize,
    /// Its item, where its row has come before all of its partials.
    held: Option<(usize, Item)>,
    main: Option<usize>,
    /// When its rank was done with it last.
    left: f64,
}

enum Event {
    /// A rank is done with what it picked.
    Done { rank: usize, picked: Vec<Item> },
    /// A row comes.
    Row { to: usize, item: Item },
    /// A partial comes to where the token is.
    Partial { sequence: usize, to: usize },
    /// Something may be ready here.
    Look { rank: usize },
}

/// The earliest first; of equal times the first made.
struct At(f64, u64, Event);

impl PartialEq for At {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for At {}
impl PartialOrd for At {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for At {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.0.total_cmp(&self.0).then(other.1.cmp(&self.1))
    }
}

#[derive(Default)]
struct RankState {
    board: Vec<Item>,
    busy: bool,
    /// Since when it is not.
    rests: f64,
    picks: u64,
    /// When the link is done with keys and values.
    bulk_free: f64,
    bulk: Bulk,
    /// Seconds that messages which came take of the rank before it goes on.
    owed: f64,
}

#[derive(Default)]
struct Sums {
    hops: f64,
    travel: f64,
    queue: f64,
    context: f64,
    latencies: f64,
    crossings: f64,
    moves: f64,
    stays: f64,
    dispatch: f64,
    combine: f64,
    kv: f64,
    tokens: f64,
}

struct Play<'a> {
    of: Scene<'a>,
    now: f64,
    made: u64,
    events: BinaryHeap<At>,
    ranks: Vec<RankState>,
    flights: Vec<Flight>,
    /// `[sequence][layer][rank]`: when the context made elsewhere is complete.
    contexts: Vec<f64>,
    /// `[sequence]` times of its tokens.
    times: Vec<Vec<f64>>,
    sums: Sums,
}

impl<'a> Play<'a> {
    fn new(of: Scene<'a>) -> Self {
        let (world, sequences) = (of.measured.world_size(), of.streams.sequences());
        let mut play = Self {
            of,
            now: 0.0,
            made: 0,
            events: BinaryHeap::new(),
            ranks: (0..world).map(|_| RankState::default()).collect(),
            flights: vec![Flight::default(); sequences],
            contexts: vec![0.0; sequences * of.shape.layers.len() * world],
            times: vec![Vec::new(); sequences],
            sums: Sums::default(),
        };
        (0..sequences).for_each(|sequence| play.start(sequence, sequence % world));
        play
    }

    fn run(&mut self) {
        (0..self.ranks.len()).for_each(|rank| self.pick(rank));
        while self.times.iter().any(|times| times.len() < TOKENS) {
            let Some(At(now, _, event)) = self.events.pop() else { return };
            self.now = now;
            match event {
                Event::Done { rank, picked } => self.done(rank, picked),
                Event::Row { to, item } => self.row(to, item),
                Event::Partial { sequence, to } => self.partial(sequence, to),
                Event::Look { rank } => self.pick(rank),
            }
        }
    }

    fn at(&mut self, time: f64, event: Event) {
        self.made += 1;
        self.events.push(At(time, self.made, event));
    }

    fn start(&mut self, sequence: usize, rank: usize) {
        let now = self.now;
        let item =
            Item { sequence, stage: 0, token: true, choices: 0, next: rank, since: 0, came: now, ready: now };
        self.put(rank, item);
    }

    /// Puts an item on a rank's board; a token waits there for its context.
    fn put(&mut self, rank: usize, mut item: Item) {
        item.came = self.now;
        item.ready = self.now;
        item.since = self.ranks[rank].picks;
        if item.token && item.stage < self.of.shape.layers.len() {
            let complete = self.contexts[self.context(item.sequence, item.stage, rank)];
            if complete > self.now {
                item.ready = complete;
                self.at(complete, Event::Look { rank });
            }
        }
        self.ranks[rank].board.push(item);
    }

    fn context(&self, sequence: usize, layer: usize, rank: usize) -> usize {
        (sequence * self.of.shape.layers.len() + layer) * self.ranks.len() + rank
    }

    fn row(&mut self, to: usize, item: Item) {
        let flight = &mut self.flights[item.sequence];
        if item.token && flight.missing > 0 {
            flight.held = Some((to, item));
            flight.left = self.now;
            // Experts that are here run at once.
            if item.choices > 0 {
                self.put(to, Item { token: false, ..item });
            }
        } else {
            self.put(to, item);
        }
        self.pick(to);
    }

    fn partial(&mut self, sequence: usize, to: usize) {
        let flight = &mut self.flights[sequence];
        flight.missing = flight.missing.saturating_sub(1);
        if flight.missing == 0
            && let Some((rank, item)) = flight.held.take()
        {
            self.sums.travel += self.now - flight.left;
            self.put(rank, Item { choices: 0, ..item });
        }
        self.pick(to);
    }

    /// A rank that is free takes what its board would give it.
    fn pick(&mut self, rank: usize) {
        let (now, last) = (self.now, self.of.shape.layers.len());
        let state = &mut self.ranks[rank];
        let ready = |item: &&Item| item.ready <= now;
        if state.busy {
            return;
        }
        let Some(oldest) = state.board.iter().filter(ready).min_by_key(|item| item.since) else {
            // Who rests has nothing to wait for.
            let bulk = std::mem::take(&mut state.bulk);
            return bulk.to.into_iter().for_each(|to| self.tells(rank, to));
        };
        let stage = match state.picks - oldest.since >= PATIENCE {
            true => oldest.stage,
            false => state.board.iter().filter(ready).map(|item| item.stage).min().unwrap_or(0),
        };
        state.picks += 1;
        state.busy = true;
        let (picked, left): (Vec<Item>, Vec<Item>) =
            state.board.drain(..).partition(|item| item.ready <= now && item.stage == stage);
        state.board = left;
        let tokens = picked.iter().filter(|item| item.token).count();
        let pairs: usize = picked.iter().map(|item| item.choices).sum();
        let serving = picked.len() - tokens;
        let times = &self.of.measured.ranks[rank];
        let (seconds, rows) = match (tokens, stage) {
            (0, _) => (times.serve.at(serving), serving),
            (n, 0) => (times.begin.at(n), n),
            (n, stage) if stage == last => (times.end.at(n), n),
            (n, _) => (times.hop.of(self.of.setting.strategy).at(n), n),
        };
        // Timed were rows all of whose experts were here. Of a token that waited for others' experts its own ran before.
        let timed = match stage.checked_sub(1).and_then(|before| self.of.shape.layers[before]) {
            Some(_) => (self.of.streams.top_k() * rows) as f64,
            None => 0.0,
        };
        let each = times.serve.slope() / self.of.streams.top_k() as f64;
        let seconds = (seconds + each * (pairs as f64 - timed)).max(0.0);
        let crowd = (self.working() / self.of.measured.lanes(rank)).max(1.0);
        let owed = std::mem::take(&mut self.ranks[rank].owed) * self.short_of_cores(rank, 0.0);
        let waking = times.waking.after(now - self.ranks[rank].rests);
        let seconds = (seconds + owed) * crowd + waking;
        for item in picked.iter().filter(|item| item.token) {
            self.sums.hops += seconds;
            self.sums.queue += now - item.ready;
            self.sums.context += item.ready - item.came;
        }
        self.at(now + seconds, Event::Done { rank, picked });
    }

    fn working(&self) -> f64 {
        self.ranks.iter().filter(|state| state.busy).count() as f64
    }

    fn done(&mut self, rank: usize, picked: Vec<Item>) {
        let last = self.of.shape.layers.len();
        let mut post = Post::new(self.ranks.len());
        post.sampled = picked.iter().any(|item| item.token && item.stage == last);
        for item in picked {
            if !item.token {
                // One partial for each expert, or their sum.
                let sum = self.of.setting.combine == Combine::Sum && item.next != rank;
                let partials = if sum { 1 } else { item.choices };
                post.partials[item.next].extend(std::iter::repeat_n(item.sequence, partials));
            } else if item.stage == last {
                self.sampled(rank, item.sequence);
            } else {
                self.send_on(rank, item, &mut post);
            }
        }
        self.deliver(rank, post);
    }

    fn sampled(&mut self, rank: usize, sequence: usize) {
        self.times[sequence].push(self.now);
        self.sums.tokens += 1.0;
        if self.times[sequence].len() == UNCOUNTED && self.times.iter().all(|t| t.len() >= UNCOUNTED) {
            self.sums = Sums::default();
        }
        self.flights[sequence].token += 1;
        self.start(sequence, rank);
    }

    /// A token that passed a layer's attention goes where its experts are.
    fn send_on(&mut self, rank: usize, item: Item, post: &mut Post) {
        let (sequence, layer) = (item.sequence, item.stage);
        if self.of.setting.strategy == Strategy::Coherent {
            let home = Rank::from(sequence % self.ranks.len());
            let before = self.of.shape.before(layer);
            let domain = bounds::domain(self.of.setting.groups, self.of.setting.table, before, home);
            let others = domain.into_iter().map(Rank::index).filter(|to| *to != rank);
            others.for_each(|to| post.kv[to].push((sequence, layer)));
        }
        let flight = &mut self.flights[sequence];
        flight.left = self.now;
        let Some(moe) = self.of.shape.layers[layer] else {
            return self.put(rank, Item { stage: layer + 1, choices: 0, ..item });
        };
        let place = Place { sequence, token: flight.token, moe };
        let route = self.of.streams.route(self.of.setting, place, Rank::from(rank));
        let main = route.serving[0].index();
        self.sums.moves += f64::from(u8::from(flight.main.is_some()));
        self.sums.stays += f64::from(u8::from(flight.main == Some(main)));
        flight.main = Some(main);
        self.sums.latencies += crate::runtime::latencies(Rank::from(rank), &route) as f64;
        let expects = remote_partials(&route, self.of.setting.combine);
        let next = route.next.index();
        let served = |by: usize| route.serving.iter().filter(|r| r.index() == by).count();
        // Where others' partials are waited for, the next residence's own count among them.
        flight.missing = expects + if expects > 0 { served(next) } else { 0 };
        let goes =
            |to: usize| Item { stage: layer + 1, token: to == next, choices: served(to), next, ..item };
        for to in route.ranks().into_iter().map(Rank::index).filter(|to| *to != rank) {
            post.rows[to].push(goes(to));
        }
        if next == rank {
            self.row(rank, goes(rank));
        } else if served(rank) > 0 {
            self.put(rank, Item { token: false, ..goes(rank) });
        }
    }

    fn prediction(&self) -> Prediction {
        let begin = self.times.iter().filter_map(|t| t.get(UNCOUNTED - 1)).copied().fold(0.0, f64::max);
        let end = self.times.iter().filter_map(|t| t.get(TOKENS - 1)).copied().fold(f64::INFINITY, f64::min);
        let within = |t: &&f64| **t > begin && **t <= end;
        let together = self.times.iter().flatten().filter(within).count() as f64 / (end - begin);
        // Where one is done before another has made its first token they never decode all at once: each at its own speed.
        let own = |times: &Vec<f64>| (times.len() - 1) as f64 / (times[times.len() - 1] - times[0]).max(1e-9);
        let rate = match begin < end {
            true => together,
            false => self.times.iter().filter(|times| times.len() > 1).map(own).sum(),
        };
        let (s, tokens) = (&self.sums, self.sums.tokens.max(1.0));
        Prediction {
            tokens_per_s: rate,
            ms_per_token: 1e3 * self.of.streams.sequences() as f64 / rate.max(1e-9),
            waits_per_layer: s.latencies / (tokens * self.of.shape.moe_layers().max(1.0)),
            crossings_per_token: s.crossings / tokens,
            stay_rate: s.stays / s.moves.max(1.0),
            parts: Parts {
                compute_ms: 1e3 * s.hops / tokens,
                travel_ms: 1e3 * s.travel / tokens,
                queue_ms: 1e3 * s.queue / tokens,
                context_ms: 1e3 * s.context / tokens,
            },
            dispatch_bytes: s.dispatch / tokens,
            combine_bytes: s.combine / tokens,
            kv_bytes: s.kv / tokens,
        }
    }
}
