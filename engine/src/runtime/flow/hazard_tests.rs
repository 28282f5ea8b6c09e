//! A world of ranks without devices, over the scheduler, sequences, blocks, notes and watermarks that run in earnest:
//! caches too small for all texts, blocks that are freed and given to others while frames for them are on their way,
//! requests that end at any moment. Cache slots hold numbers, so that whoever writes into a block that is not its own
//! changes somebody's tokens. Nothing may hang, and tokens must be those of one rank.

use super::depart::{self, Departure};
use super::made_up::{EXPERTS, LAYERS, Link, Net, Next, PROMPT};
use super::made_up::{alone, attend, entering, made, routed, sample, served_values};
use super::*;
use crate::options::Combine;
use crate::runtime::coherence::Coherence;
use crate::runtime::frames::{PartialFrame, RowFrame};
use crate::runtime::scheduler::Scheduler;
use crate::runtime::sequence::{Admission, BLOCK, Order, Sampled, Sequences};
use crate::runtime::tables::Edition;
use crate::runtime::worker::Directive;
use board::Token;
use exflow_placement::{PlacementTable, Strategy};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};

const CONTEXT: usize = 64;

/// On the stream of rows.
enum Wire {
    Row(u16, bool, RowFrame),
    Partial(u16, PartialFrame),
    Note(Note),
}

/// Layer, sequence, position, value.
type Kv = (u16, u32, u32, f32);

struct Place {
    board: Board<Waiting>,
    notes: Notes,
    sequences: Sequences,
    coherence: Coherence,
    unplaced: Vec<(u16, Arrived)>,
    /// What the device's cache holds, by layer and slot.
    cache: HashMap<(usize, u32), f32>,
}

struct World {
    places: Vec<Place>,
    scheduler: Scheduler,
    changed: bool,
    table: PlacementTable,
    strategy: Strategy,
    top_k: usize,
    net: Net<Wire, Kv>,
    /// By request.
    said: BTreeMap<u32, Vec<u32>>,
    preempted: usize,
}

impl World {
    fn new(ranks: usize, blocks: usize, strategy: Strategy, top_k: usize, seed: u64, starve: bool) -> Self {
        let place = |rank| Place {
            board: Board::new(Rank::from(rank)),
            notes: Notes::new(Rank::from(rank)),
            sequences: Sequences::new(blocks, CONTEXT, Vec::new()),
            coherence: Coherence::default(),
            unplaced: Vec::new(),
            cache: HashMap::new(),
        };
        Self {
            places: (0..ranks).map(place).collect(),
            scheduler: Scheduler::new((0..ranks).map(Rank::from).collect(), 64),
            changed: false,
            table: PlacementTable::round_robin(LAYERS, EXPERTS, ranks),
            strategy,
            top_k,
            net: Net::new(seed, starve),
            said: BTreeMap::new(),
            preempted: 0,
        }
    }

    fn submit(&mut self, request: u32, tokens: usize) {
        self.said.insert(request, Vec::new());
        self.scheduler.submit(Admission {
            request,
            prompt: (0..PROMPT).map(|position| request * 7 + position).collect(),
            max_tokens: tokens as u32,
            ..Admission::default()
        });
        self.changed = true;
    }

    fn cancel(&mut self, request: u32) {
        self.scheduler.cancel(request);
        self.changed = true;
    }

    fn tell_all(&mut self, from: usize, note: &Note) {
        let others = (0..self.places.len()).filter(|to| *to != from);
        others.for_each(|to| self.net.tell(from, to, Wire::Note(note.clone())));
    }

    /// Rank 0 looks at what happened and orders.
    fn order(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let orders = self.scheduler.plan(&self.places[0].sequences);
        if !orders.is_empty() {
            self.preempted += orders.iter().filter(|order| matches!(order, Order::Preempt(_))).count();
            let directives: Vec<_> = orders.into_iter().map(Directive::Order).collect();
            self.tell_all(0, &Note::Orders(directives.clone()));
            directives.into_iter().for_each(|directive| self.obey(0, directive));
        }
    }

    fn obey(&mut self, at: usize, directive: Directive) {
        let Directive::Order(order) = directive else { return };
        let ranks: Vec<Rank> = (0..self.places.len()).map(Rank::from).collect();
        let place = &mut self.places[at];
        if let Some(gone) = place.sequences.apply(order.clone()).expect("rank 0 knows what there is room for")
        {
            place.coherence.forget(gone.start.id);
            if at == 0 && matches!(order, Order::Preempt(_)) {
                self.scheduler.put_back(gone);
                self.changed = true;
            }
        }
        let place = &mut self.places[at];
        match order {
            Order::Admit(start) => {
                place.notes.admit(start.id, start.home, &ranks);
                for waiting in place.board.admit(start.id) {
                    match waiting {
                        Waiting::Kv(layer, arrived) => self.keep(at, layer, arrived),
                        Waiting::Note(from, note) => self.heed(at, from.index(), note),
                    }
                }
            }
            Order::Grant { .. } => {
                for (layer, arrived) in std::mem::take(&mut place.unplaced) {
                    self.keep(at, layer, arrived);
                }
            }
            Order::Prefill { sequence, .. } => self.prefill(at, sequence),
            Order::End(id) | Order::Preempt(id) => {
                place.board.end(id);
                place.notes.end(id);
                place.unplaced.retain(|(_, arrived)| arrived.sequence != id);
            }
        }
        self.places[at].sequences.check();
    }

    fn prefill(&mut self, at: usize, id: u32) {
        let place = &mut self.places[at];
        let Some(sequence) = place.sequences.running.get(&id) else { return };
        let chunk = sequence.chunk();
        if sequence.start.home.index() != at || chunk.is_empty() || place.board.prefills(id) {
            return;
        }
        let token =
            |position: u32| Token::new(id, position, sequence.start.prompt[position as usize], Edition(0));
        place.board.start(true, chunk.map(token).collect());
    }

    /// Keys and values of a sequence that runs.
    fn keep(&mut self, at: usize, layer: u16, arrived: Arrived) {
        let place = &mut self.places[at];
        let Some(sequence) = place.sequences.running.get(&arrived.sequence) else { return };
        if sequence.slot(arrived.position).is_none() {
            place.unplaced.push((layer, arrived));
            return;
        }
        let (id, home) = (arrived.sequence, sequence.start.home.index());
        let of_prompt = arrived.position < PROMPT;
        place.coherence.receive(layer, arrived);
        let whole = |layer| place.coherence.is_complete(layer as u16, id, PROMPT);
        if of_prompt && place.notes.owes(id) && (0..LAYERS).all(whole) {
            place.notes.acknowledged(id);
            self.net.tell(at, home, Wire::Note(Note::Holds(id)));
        }
    }

    fn heed(&mut self, at: usize, from: usize, note: Note) {
        let place = &mut self.places[at];
        match note {
            Note::Orders(directives) => directives.into_iter().for_each(|d| self.obey(at, d)),
            Note::Holds(id) => place.notes.holds(id, Rank::from(from)),
            Note::Sampled(ref sampled, index) => {
                let id = sampled.sequence;
                if place.board.standing(id) != Standing::Running {
                    place.board.other(id, Waiting::Note(Rank::from(from), note));
                    return;
                }
                place.notes.sampled(sampled.clone(), index);
                while let Some(running) = self.places[at].sequences.running.get(&id) {
                    let next = running.output.len() as u32;
                    let Some(sampled) = self.places[at].notes.next(id, next) else { return };
                    self.count(at, &sampled);
                }
            }
            _ => unreachable!("nobody sends others here"),
        }
    }

    fn count(&mut self, at: usize, sampled: &Sampled) {
        let counted = self.places[at].sequences.sampled(sampled.sequence, sampled.token);
        if at == 0 {
            self.changed = true;
            if let Some(counted) = counted.filter(|counted| counted.new) {
                self.said.get_mut(&counted.request).expect("it was submitted").push(counted.token);
            }
        }
    }

    /// One random thing happens; false where nothing can.
    fn happen(&mut self) -> bool {
        self.order();
        for next in self.net.next(self.places.len()) {
            match next {
                Next::Row(link) => {
                    let wire = self.net.row(link);
                    self.arrive(link, wire);
                    return true;
                }
                Next::Kv(link) => {
                    self.hear(link);
                    return true;
                }
                Next::Work(rank) if self.work(rank) => return true,
                Next::Work(_) => {}
            }
        }
        self.changed
    }

    fn hear(&mut self, (from, to): Link) {
        let (layer, sequence, position, value) = self.net.kv((from, to));
        let arrived = Arrived { sequence, position, values: vec![value] };
        let waiting = Waiting::Kv(layer, arrived);
        if let Some(Waiting::Kv(layer, arrived)) = self.places[to].board.other(sequence, waiting) {
            self.keep(to, layer, arrived);
        }
    }

    fn arrive(&mut self, (from, to): Link, wire: Wire) {
        match wire {
            Wire::Row(layer, prefill, frame) => self.places[to].board.row(layer, prefill, frame),
            Wire::Partial(layer, frame) => self.places[to].board.partial(layer, frame),
            Wire::Note(note) => self.heed(to, from, note),
        }
    }

    fn work(&mut self, rank: usize) -> bool {
        let Place { board, sequences, coherence, .. } = &mut self.places[rank];
        let Some(picked) = board.pick(|unit| lack(sequences, coherence, LAYERS, unit)) else { return false };
        let me = Rank::from(rank);
        if let Some(layer) = picked.stage.checked_sub(1) {
            let values = served_values(layer, &picked.serves);
            for (to, frame) in depart::partials(me, &picked.serves, &values, (1, 1), Combine::Exact) {
                match to == me {
                    true => self.places[rank].board.partial(layer as u16, frame),
                    false => self.net.tell(rank, to.index(), Wire::Partial(layer as u16, frame)),
                }
            }
        }
        if picked.stage < LAYERS && !picked.units.is_empty() {
            self.write_arrived(rank, picked.stage);
        }
        for unit in picked.units {
            self.advance(rank, picked.stage, unit);
        }
        true
    }

    /// What has come for a layer goes into the cache.
    fn write_arrived(&mut self, rank: usize, layer: usize) {
        let place = &mut self.places[rank];
        for arrived in place.coherence.take(layer as u16) {
            let sequence = &place.sequences.running[&arrived.sequence];
            let slot = sequence.slot(arrived.position).expect("it was granted");
            place.cache.insert((layer, slot), arrived.values[0]);
        }
    }

    fn advance(&mut self, rank: usize, stage: usize, mut unit: Unit) {
        let me = Rank::from(rank);
        let mut stays = true;
        let mut ends = Vec::new();
        for token in &mut unit.tokens {
            let (id, position) = (token.sequence, token.position);
            let mut x = entering(token, stage, self.top_k);
            if stage == LAYERS {
                ends.push((id, position, sample(x)));
                continue;
            }
            let place = &mut self.places[rank];
            let sequence = &place.sequences.running[&id];
            let slot = |position| sequence.slot(position).expect("it was granted");
            let context: f32 = (0..position).map(|p| place.cache[&(stage, slot(p))]).sum();
            x = attend(stage, x, context % 64.0);
            let value = made(stage, x);
            place.cache.insert((stage, slot(position)), value);
            place.coherence.note(stage as u16, id, position);
            let coherent =
                self.strategy == Strategy::Coherent && !unit.prefill && place.notes.is_coherent(id);
            let strategy = if coherent { Strategy::Coherent } else { Strategy::Vanilla };
            let (choices, route) = routed(&self.table, (strategy, self.top_k), (stage, me), x);
            let residual = &[x];
            let combine = Combine::Exact;
            let (rows, stay) =
                Departure { me, route: &route, choices: &choices, combine, residual }.depart(token);
            stays &= stay;
            for (to, row) in rows {
                self.net.tell(rank, to.index(), Wire::Row(stage as u16, unit.prefill, row.owned()));
            }
            if self.strategy == Strategy::Coherent {
                self.net.spread(rank, self.places.len(), (stage as u16, id, position, value));
            }
        }
        match stage < LAYERS {
            true if stays => self.places[rank].board.go_on(unit),
            true => {}
            false => self.finish(rank, &unit, &ends),
        }
    }

    fn finish(&mut self, rank: usize, unit: &Unit, ends: &[(u32, u32, u32)]) {
        for &(id, _, token) in ends.iter().filter(|(_, position, _)| position + 1 >= PROMPT) {
            let Some(running) = self.places[rank].sequences.running.get(&id) else { continue };
            let index = running.output.len() as u32;
            let sampled = Sampled { sequence: id, token, edition: Edition(0), logprobs: None };
            self.tell_all(rank, &Note::Sampled(sampled.clone(), index));
            self.count(rank, &sampled);
            let place = &mut self.places[rank];
            if let Some((token, position)) = place.sequences.running.get(&id).and_then(|s| s.next_token()) {
                place.board.start(false, vec![Token::new(id, position, token, Edition(0))]);
            }
        }
        if unit.prefill {
            let id = unit.tokens[0].sequence;
            if let Some(sequence) = self.places[rank].sequences.running.get_mut(&id) {
                sequence.prefilled = unit.tokens[unit.tokens.len() - 1].position + 1;
            }
            self.prefill(rank, id);
        }
    }
}

/// Runs to the end; returns the world, and the request that was cancelled on the way, if any.
fn run(mut world: World, lengths: &[usize], cancelled: Option<(u32, usize)>) -> (World, Option<u32>) {
    for (request, &tokens) in lengths.iter().enumerate() {
        world.submit(request as u32, tokens);
    }
    let (mut events, mut gone) = (0, None);
    while world.happen() {
        events += 1;
        assert!(events < 200_000, "it goes round in circles");
        if let Some((request, _)) = cancelled.filter(|(_, at)| *at == events) {
            world.cancel(request);
            gone = Some(request);
        }
    }
    (world, gone)
}

fn check(world: &World, lengths: &[usize], gone: Option<u32>) {
    for (request, &tokens) in lengths.iter().enumerate() {
        let (said, expected) = (&world.said[&(request as u32)], alone(request as u32, tokens, world.top_k));
        match gone == Some(request as u32) {
            true => assert!(expected.starts_with(said), "request {request}: {said:?} of {expected:?}"),
            false => assert_eq!(said, &expected, "request {request}"),
        }
    }
    for (rank, place) in world.places.iter().enumerate() {
        assert!(place.board.is_empty(), "rank {rank}: {:?} waits", place.board.waiting());
        assert!(place.sequences.running.is_empty() && place.unplaced.is_empty(), "rank {rank}");
        let (held, _) = place.sequences.blocks();
        assert_eq!(held, 0, "rank {rank} holds blocks of nobody");
        place.sequences.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_cache_too_small_for_all_gives_every_text_the_tokens_of_one_rank(
        ranks in 1_usize..5,
        coherent in any::<bool>(),
        top_k in 1_usize..4,
        starve in any::<bool>(),
        seed in any::<u64>(),
        more in 0_usize..4,
        lengths in proptest::collection::vec(1_usize..45, 1..6),
        cancelled in proptest::option::of((0_u32..6, 0_usize..3000)),
    ) {
        let strategy = if coherent { Strategy::Coherent } else { Strategy::Vanilla };
        // The longest text fits alone, and little else.
        let longest = lengths.iter().max().map_or(0, |tokens| (PROMPT as usize + tokens).div_ceil(BLOCK));
        let world = World::new(ranks, longest + more, strategy, top_k, seed, starve);
        let cancelled = cancelled.filter(|(request, _)| (*request as usize) < lengths.len());
        let (world, gone) = run(world, &lengths, cancelled);
        check(&world, &lengths, gone);
    }
}

/// The same hazards once for sure: texts are preempted and replayed, and frames come for sequences whose blocks are
/// others' by then.
#[test]
fn blocks_are_taken_back_while_frames_for_them_are_on_their_way() {
    let lengths = [40, 40, 40, 40];
    let (mut preempted, mut dropped) = (0, 0);
    for seed in 0..20 {
        let world = World::new(3, 5, Strategy::Coherent, 2, seed, true);
        let (world, gone) = run(world, &lengths, None);
        check(&world, &lengths, gone);
        preempted += world.preempted;
        dropped += world.places.iter().map(|place| place.board.dropped).sum::<u64>();
    }
    assert!(preempted > 10 && dropped > 10, "{preempted} preempted, {dropped} frames dropped");
}
