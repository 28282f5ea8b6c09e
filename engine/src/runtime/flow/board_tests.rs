//! A world of boards without devices, and the ordering hazards of flow. Nothing may hang, and tokens must be those of one rank.

use super::super::depart::{self, Departure};
use super::super::made_up::{EXPERTS, LAYERS, Net, Next, PROMPT};
use super::super::made_up::{alone, attend, entering, made, routed, sample, served_values};
use super::*;
use crate::options::Combine;
use crate::runtime::coherence::Coherence;
use crate::runtime::frames::Choice;
use crate::runtime::tables::Edition;
use exflow_placement::{PlacementTable, Strategy};
use proptest::prelude::*;

pub(in super::super) enum Wire {
    Row(u16, bool, RowFrame),
    Partial(u16, PartialFrame),
    Admit(u32),
    End(u32),
}

pub(in super::super) type Kv = (u32, u32, usize, f32);

pub(in super::super) struct Place {
    pub(in super::super) board: Board<Kv>,
    coherence: Coherence,
    kv: HashMap<(u32, usize, u32), f32>,
}

pub(in super::super) struct World {
    pub(in super::super) places: Vec<Place>,
    table: PlacementTable,
    strategy: Strategy,
    top_k: usize,
    pub(in super::super) net: Net<Wire, Kv>,
    pub(in super::super) said: BTreeMap<u32, Vec<u32>>,
    want: BTreeMap<u32, usize>,
}

impl World {
    pub(in super::super) fn new(
        ranks: usize,
        strategy: Strategy,
        top_k: usize,
        seed: u64,
        starve: bool,
    ) -> Self {
        let place = |rank| Place {
            board: Board::new(Rank::from(rank)),
            coherence: Coherence::default(),
            kv: HashMap::new(),
        };
        Self {
            places: (0..ranks).map(place).collect(),
            table: PlacementTable::round_robin(LAYERS, EXPERTS, ranks),
            strategy,
            top_k,
            net: Net::new(seed, starve),
            said: BTreeMap::new(),
            want: BTreeMap::new(),
        }
    }

    /// Rank 0's word goes to all; to itself at once.
    fn announce(&mut self, order: impl Fn() -> Wire) {
        (1..self.places.len()).for_each(|to| self.net.tell(0, to, order()));
        self.arrive(0, order());
    }

    pub(in super::super) fn submit(&mut self, sequence: u32, tokens: usize) {
        self.want.insert(sequence, tokens);
        self.said.insert(sequence, Vec::new());
        self.announce(|| Wire::Admit(sequence));
    }

    fn home(&self, sequence: u32) -> usize {
        sequence as usize % self.places.len()
    }

    pub(in super::super) fn arrive(&mut self, to: usize, wire: Wire) {
        let home = self.home(match &wire {
            Wire::Admit(sequence) => *sequence,
            _ => 0,
        });
        let place = &mut self.places[to];
        match wire {
            Wire::Row(layer, prefill, frame) => place.board.row(layer, prefill, frame),
            Wire::Partial(layer, frame) => place.board.partial(layer, frame),
            Wire::Admit(sequence) => {
                for kv in place.board.admit(sequence) {
                    place.take(kv);
                }
                if home == to {
                    let token =
                        |position| Token::new(sequence, position, sequence * 7 + position, Edition(0));
                    place.board.start(true, (0..PROMPT).map(token).collect());
                }
            }
            Wire::End(sequence) => {
                place.board.end(sequence);
                place.coherence.forget(sequence);
                place.kv.retain(|(id, _, _), _| *id != sequence);
            }
        }
    }

    /// One random thing happens; false where nothing can.
    fn happen(&mut self) -> bool {
        for next in self.net.next(self.places.len()) {
            match next {
                Next::Row(link) => {
                    let wire = self.net.row(link);
                    self.arrive(link.1, wire);
                    return true;
                }
                Next::Kv(link) => {
                    let kv = self.net.kv(link);
                    self.places[link.1].hear(kv);
                    return true;
                }
                Next::Work(rank) if self.work(rank) => return true,
                Next::Work(_) => {}
            }
        }
        false
    }

    fn work(&mut self, rank: usize) -> bool {
        let Some(ready) = self.places[rank].ready() else { return false };
        let picked = self.places[rank].board.take(ready);
        self.carry(rank, picked);
        true
    }

    /// Does what was picked.
    pub(in super::super) fn carry(&mut self, rank: usize, picked: Picked) {
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
        for unit in picked.units {
            self.advance(rank, picked.stage, unit);
        }
    }

    fn advance(&mut self, rank: usize, stage: usize, mut unit: Unit) {
        let me = Rank::from(rank);
        let mut stays = true;
        for token in &mut unit.tokens {
            let (sequence, position) = (token.sequence, token.position);
            let mut x = entering(token, stage, self.top_k);
            if stage == LAYERS {
                if position + 1 >= PROMPT {
                    self.sampled(rank, sequence, position, sample(x));
                }
                continue;
            }
            let place = &mut self.places[rank];
            let context: f32 = (0..position).map(|p| place.kv[&(sequence, stage, p)]).sum();
            x = attend(stage, x, context % 64.0);
            let kv = (sequence, position, stage, made(stage, x));
            place.kv.insert((sequence, stage, position), kv.3);
            place.coherence.note(stage as u16, sequence, position);
            let strategy = if unit.prefill { Strategy::Vanilla } else { self.strategy };
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
                self.net.spread(rank, self.places.len(), kv);
            }
        }
        if stage < LAYERS && stays {
            self.places[rank].board.go_on(unit);
        }
    }

    fn sampled(&mut self, rank: usize, sequence: u32, position: u32, id: u32) {
        let said = self.said.get_mut(&sequence).expect("it was submitted");
        assert_eq!(said.len() as u32, position + 1 - PROMPT, "one token after the other");
        said.push(id);
        if said.len() < self.want[&sequence] {
            self.places[rank].board.start(false, vec![Token::new(sequence, position + 1, id, Edition(0))]);
        }
    }
}

impl Place {
    pub(in super::super) fn ready(&mut self) -> Option<Ready> {
        let coherence = &self.coherence;
        self.board.ready(|unit| {
            let first = &unit.tokens[0];
            let there = unit.stage == LAYERS
                || coherence.is_complete(unit.stage as u16, first.sequence, first.position);
            if there { Lack::Nothing } else { Lack::Context }
        })
    }

    /// Keys and values come.
    pub(in super::super) fn hear(&mut self, kv: Kv) {
        if let Some(kv) = self.board.other(kv.0, kv) {
            self.take(kv);
        }
    }

    fn take(&mut self, (sequence, position, layer, value): Kv) {
        self.kv.insert((sequence, layer, position), value);
        self.coherence.note(layer as u16, sequence, position);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn every_order_of_events_gives_the_tokens_of_one_rank(
        ranks in 1_usize..5,
        coherent in any::<bool>(),
        top_k in 1_usize..4,
        starve in any::<bool>(),
        seed in any::<u64>(),
        lengths in proptest::collection::vec(1_usize..7, 1..6),
        ended in proptest::option::of((0_u32..6, 0_usize..400)),
    ) {
        let strategy = if coherent { Strategy::Coherent } else { Strategy::Vanilla };
        let mut world = World::new(ranks, strategy, top_k, seed, starve);
        for (sequence, &tokens) in lengths.iter().enumerate() {
            world.submit(sequence as u32, tokens);
        }
        let mut events = 0;
        while world.happen() {
            events += 1;
            prop_assert!(events < 100_000, "it goes round in circles");
            if let Some((sequence, _)) = ended.filter(|(_, at)| *at == events) {
                world.announce(|| Wire::End(sequence));
            }
        }
        let gone = ended.filter(|(_, at)| *at <= events).map(|(sequence, _)| sequence);
        for (sequence, &tokens) in lengths.iter().enumerate() {
            let (id, expected) = (sequence as u32, alone(sequence as u32, tokens, top_k));
            match gone == Some(id) {
                true => prop_assert!(expected.starts_with(&world.said[&id])),
                false => prop_assert_eq!(&world.said[&id], &expected),
            }
        }
        for place in &world.places {
            prop_assert!(place.board.is_empty(), "{:?} waits", place.board.waiting());
            prop_assert!(place.board.orphans.is_empty() && place.board.early.values().all(Vec::is_empty));
        }
    }
}

/// A row of which an expert runs here, that came at `now`.
pub(in super::super) fn served(stage: usize, now: Duration) -> Serve {
    Serve::at(stage, false, row(0, 0, 0), 0, now)
}

fn row(sequence: u32, next: u16, expects: u16) -> RowFrame {
    let choices = vec![Choice { k: 0, expert: 0, weight: 1.0 }];
    RowFrame {
        sequence,
        position: 9,
        edition: Edition(0),
        next: Rank(next),
        main: Rank(next),
        expects,
        choices,
        residual: vec![1.0],
    }
}

#[test]
fn a_partial_before_its_row_is_kept_and_one_of_an_ended_sequence_is_counted() {
    let mut board: Board<()> = Board::new(Rank(1));
    let partial = |sequence| PartialFrame { sequence, position: 9, k: 1, values: vec![2.0] };
    board.partial(3, partial(4)); // before rank 0's word, and before its row
    board.row(3, false, row(4, 1, 1));
    assert!(board.pick(|_| Lack::Nothing).is_none() && board.standing(4) == Standing::Unheard);
    assert!(board.admit(4).is_empty());
    // Its own expert runs first, then it is whole.
    let own = board.pick(|_| Lack::Nothing).expect("its own expert");
    assert_eq!((own.units.len(), own.serves.len(), own.stage), (0, 1, 4));
    board.partial(3, PartialFrame { k: 0, ..partial(4) });
    let whole = board.pick(|_| Lack::Nothing).expect("all partials are there");
    assert_eq!(whole.units[0].tokens[0].partials.len(), 2);

    board.end(4);
    board.partial(3, partial(4));
    board.row(3, false, row(4, 0, 0));
    assert_eq!((board.dropped, board.standing(4)), (2, Standing::Ended));
    assert!(board.is_empty() && board.orphans.is_empty());
}

#[test]
fn nobody_is_passed_over_for_ever() {
    let mut board: Board<()> = Board::new(Rank(0));
    for sequence in 0..2 {
        board.admit(sequence);
    }
    board.row(6, false, row(0, 0, 0)); // near the end of the model
    let mut picks = 0;
    loop {
        board.row(0, false, row(1, 2, 0)); // there is always work at the first layers
        let picked = board.pick(|_| Lack::Nothing).expect("there is work");
        picks += 1;
        if picked.stage == 7 {
            break;
        }
        assert!(picks <= PATIENCE + 1, "passed over {picks} times");
    }
    assert!(picks > PATIENCE, "the earliest layer goes first until then");
}

#[test]
fn waits_are_accounted_for_by_their_cause() {
    let ms = Duration::from_millis;
    let mut board: Board<()> = Board::new(Rank(0));
    board.admit(1);
    let frame = RowFrame {
        sequence: 1,
        position: 5,
        edition: Edition(0),
        next: Rank(0),
        main: Rank(1),
        expects: 1,
        choices: Vec::new(),
        residual: vec![0.0],
    };
    board.tick(ms(10));
    board.row(0, false, frame);
    board.tick(ms(13));
    assert!(board.pick(|_| Lack::Nothing).is_none(), "a partial is missing");
    board.tick(ms(17));
    board.partial(0, PartialFrame { sequence: 1, position: 5, k: 0, values: vec![0.0] });
    board.tick(ms(22));
    assert!(board.pick(|_| Lack::Context).is_none());
    board.tick(ms(24));
    assert!(board.pick(|_| Lack::Ids).is_none());
    board.tick(ms(25));
    let picked = board.pick(|_| Lack::Nothing).expect("nothing is missing");
    let spent = picked.units[0].spent();
    assert_eq!((spent.partials, spent.context, spent.ids, spent.queue), (ms(7), ms(5), ms(2), ms(1)));
    // On the next board it begins anew.
    board.tick(ms(40));
    board.go_on(picked.units[0].clone());
    board.tick(ms(43));
    let spent = board.pick(|_| Lack::Nothing).expect("it is ready").units[0].spent();
    assert_eq!(spent, Spent { queue: ms(3), ..Spent::default() });
}
