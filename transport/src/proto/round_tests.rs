//! Rounds in virtual time: links with random delays, crashes, replays.

use super::*;
use proptest::prelude::*;
use std::collections::BinaryHeap;

const LIMITS: RoundLimits =
    RoundLimits { max_open: 2, max_frame_bytes: 64, early_bytes: 100, timeout: Duration::from_secs(10) };

fn id(number: u64) -> RoundId {
    RoundId { number, class: ByteClass::Dispatch, layer: number as u16 }
}

fn rounds(world: usize) -> Rounds {
    Rounds::new(Rank(0), world, LIMITS)
}

fn give(rounds: &mut Rounds, peer: u16, number: u64, payload: &[u8]) -> bool {
    assert_eq!(rounds.admit(Rank(peer), id(number), payload.len() as u32), Ok(Admission::Take));
    rounds.deliver(Rank(peer), number, Bytes::copy_from_slice(payload))
}

#[test]
fn a_round_is_given_out_once_by_rank() {
    let mut rounds = rounds(3);
    assert!(!give(&mut rounds, 2, 0, b"two"));
    rounds.start(id(0), Bytes::from_static(b"own"), Duration::ZERO).expect("start");
    assert!(
        matches!(rounds.poll(0, Duration::ZERO), RoundPoll::Pending { deadline } if deadline == LIMITS.timeout)
    );
    assert!(give(&mut rounds, 1, 0, b""));
    let RoundPoll::Ready(payloads) = rounds.poll(0, Duration::ZERO) else { panic!("not ready") };
    assert_eq!(payloads, [&b"own"[..], b"", b"two"]);
    assert_eq!(rounds.poll(0, Duration::ZERO), RoundPoll::Failed(RoundFailure::NotOpen));
}

#[test]
fn frames_are_had_one_by_one_and_the_last_says_that_the_round_is_whole() {
    let some = |frames: &[(u16, &'static [u8])], whole| {
        let frame = |&(peer, bytes): &(u16, &'static [u8])| (Rank(peer), Bytes::from_static(bytes));
        FramesPoll::Some(Arrivals { frames: frames.iter().map(frame).collect(), whole })
    };
    let mut rounds = rounds(4);
    give(&mut rounds, 3, 0, b"three");
    assert_eq!(rounds.poll_frames(0, Duration::ZERO), FramesPoll::Failed(RoundFailure::NotOpen));
    rounds.start(id(0), Bytes::from_static(b"own"), Duration::ZERO).expect("start");
    assert_eq!(rounds.poll_frames(0, Duration::ZERO), some(&[(3, b"three")], false));
    assert_eq!(rounds.poll_frames(0, Duration::ZERO), FramesPoll::Pending { deadline: LIMITS.timeout });
    assert!(give(&mut rounds, 1, 0, b"one"), "somebody waits for single frames");
    assert_eq!(rounds.admit(Rank(3), id(0), 1), Err(Violation::Duplicate { number: 0 }));
    assert_eq!(rounds.poll_frames(0, Duration::ZERO), some(&[(1, b"one")], false));
    let late = rounds.poll_frames(0, LIMITS.timeout);
    let timeout = RoundFailure::Timeout { missing: vec![Rank(2)], waited: LIMITS.timeout };
    assert_eq!(late, FramesPoll::Failed(timeout));
    give(&mut rounds, 2, 0, b"");
    assert_eq!(rounds.poll_frames(0, Duration::ZERO), some(&[(2, b"")], true));
    assert_eq!(rounds.poll_frames(0, Duration::ZERO), FramesPoll::Failed(RoundFailure::NotOpen));
    assert_eq!(rounds.admit(Rank(1), id(0), 1), Err(Violation::Replayed { number: 0 }));
}

#[test]
fn a_round_whose_frames_were_given_out_may_still_fail() {
    let mut rounds = rounds(3);
    rounds.start(id(0), Bytes::new(), Duration::ZERO).expect("start");
    give(&mut rounds, 1, 0, b"one");
    assert!(matches!(rounds.poll_frames(0, Duration::ZERO), FramesPoll::Some(Arrivals { whole: false, .. })));
    rounds.lose_peer(Rank(1), LossCause::Left);
    assert!(matches!(rounds.poll_frames(0, Duration::ZERO), FramesPoll::Pending { .. }), "its frame was had");
    rounds.lose_peer(Rank(2), LossCause::Left);
    let lost = FramesPoll::Failed(RoundFailure::Lost(Rank(2), LossCause::Left));
    assert_eq!(rounds.poll_frames(0, Duration::ZERO), lost);
}

#[test]
fn replays_duplicates_strangers_and_giants_are_refused_by_name() {
    let mut rounds = rounds(3);
    give(&mut rounds, 1, 0, b"a");
    let mut admit = |peer, number, length| rounds.admit(Rank(peer), id(number), length);
    assert_eq!(admit(1, 0, 1), Err(Violation::Duplicate { number: 0 }));
    assert_eq!(admit(3, 0, 1), Err(Violation::WrongSource { claimed: Rank(3) }));
    assert_eq!(admit(0, 0, 1), Err(Violation::WrongSource { claimed: Rank(0) }));
    assert_eq!(admit(1, 1, 65), Err(Violation::Oversized { length: 65, cap: 64 }));
    assert_eq!(admit(1, 4, 1), Err(Violation::TooFarAhead { number: 4, oldest: 0, window: 4 }));
    rounds.start(id(0), Bytes::new(), Duration::ZERO).expect("start");
    give(&mut rounds, 2, 0, b"b");
    assert!(matches!(rounds.poll(0, Duration::ZERO), RoundPoll::Ready(_)));
    assert_eq!(rounds.admit(Rank(1), id(0), 1), Err(Violation::Replayed { number: 0 }));
    let kv = RoundId { class: ByteClass::Kv, ..id(1) };
    assert!(matches!(rounds.admit(Rank(1), kv, 1), Err(Violation::WrongStream { .. })));
}

#[test]
fn ranks_that_run_different_exchanges_are_told_apart() {
    let other = RoundId { class: ByteClass::Combine, ..id(0) };
    let mut late = rounds(2);
    late.start(id(0), Bytes::new(), Duration::ZERO).expect("start");
    let expected = Violation::RoundMismatch { ours: id(0), theirs: other };
    assert_eq!(late.admit(Rank(1), other, 0), Err(expected.clone()));

    let mut early = rounds(2);
    assert_eq!(early.admit(Rank(1), other, 0), Ok(Admission::Take));
    early.deliver(Rank(1), 0, Bytes::new());
    early.start(id(0), Bytes::new(), Duration::ZERO).expect("start");
    assert_eq!(early.poll(0, Duration::ZERO), RoundPoll::Failed(RoundFailure::Broken(Rank(1), expected)));
}

#[test]
fn early_frames_are_held_back_beyond_the_bound_until_their_round_starts() {
    let mut rounds = rounds(2);
    give(&mut rounds, 1, 0, &[0; 60]);
    assert_eq!(rounds.admit(Rank(1), id(1), 60), Ok(Admission::Hold));
    assert_eq!(rounds.early_bytes(Rank(1)), 60);
    rounds.start(id(0), Bytes::new(), Duration::ZERO).expect("start");
    assert_eq!(rounds.early_bytes(Rank(1)), 0);
    assert_eq!(rounds.admit(Rank(1), id(1), 60), Ok(Admission::Take));
}

#[test]
fn the_programs_own_mistakes_are_told() {
    let mut rounds = rounds(2);
    let now = Duration::ZERO;
    let start = |rounds: &mut Rounds, id| rounds.start(id, Bytes::new(), now);
    assert_eq!(start(&mut rounds, id(1)), Err(StartError::OutOfOrder { given: 1, expected: 0 }));
    let kv = RoundId { class: ByteClass::Kv, ..id(0) };
    assert_eq!(start(&mut rounds, kv), Err(StartError::NotARound { class: ByteClass::Kv }));
    start(&mut rounds, id(0)).expect("start");
    start(&mut rounds, id(1)).expect("start");
    assert_eq!(start(&mut rounds, id(2)), Err(StartError::TooManyOpen { open: 2 }));
}

#[test]
fn a_deadline_names_who_is_missing() {
    let mut rounds = rounds(3);
    rounds.start(id(0), Bytes::new(), Duration::from_secs(1)).expect("start");
    give(&mut rounds, 1, 0, b"");
    let failed = rounds.poll(0, Duration::from_secs(11));
    let expected = RoundFailure::Timeout { missing: vec![Rank(2)], waited: Duration::from_secs(10) };
    assert_eq!(failed, RoundPoll::Failed(expected));
}

#[test]
fn a_peer_that_left_after_its_last_frame_does_no_harm() {
    let mut rounds = rounds(2);
    give(&mut rounds, 1, 0, b"last");
    rounds.lose_peer(Rank(1), LossCause::Left);
    rounds.start(id(0), Bytes::new(), Duration::ZERO).expect("start");
    assert!(matches!(rounds.poll(0, Duration::ZERO), RoundPoll::Ready(_)));
    assert_eq!(rounds.first_failure(), None);
    rounds.start(id(1), Bytes::new(), Duration::ZERO).expect("start");
    let lost = RoundPoll::Failed(RoundFailure::Lost(Rank(1), LossCause::Left));
    assert_eq!(rounds.poll(1, Duration::ZERO), lost);
}

/// A frame on its way: (arrival, tie, from, to, round), earliest first.
type Flight = std::cmp::Reverse<(u64, u64, usize, usize, u64)>;

/// A world in virtual time (microseconds). Every rank runs its rounds as fast as it can.
struct Net {
    ranks: Vec<Rounds>,
    current: Vec<u64>,
    dead: Vec<bool>,
    failed: Vec<Option<RoundFailure>>,
    flights: BinaryHeap<Flight>,
    last_arrival: Vec<Vec<u64>>,
    held: Vec<(usize, usize, u64)>,
    delays: Vec<u64>,
    sent: u64,
    now: u64,
    fifo: bool,
    /// Whether ranks take the frames of every other round one by one; and how many they have had of the current one.
    piecewise: bool,
    had: Vec<usize>,
}

fn content(from: usize, to: usize, number: u64) -> Bytes {
    Bytes::from(vec![(from * 31 + to * 7 + number as usize) as u8; (number as usize * 5 + from + to) % 60])
}

impl Net {
    fn new(world: usize, delays: Vec<u64>, (fifo, piecewise): (bool, bool)) -> Self {
        Self {
            ranks: (0..world).map(|rank| Rounds::new(Rank::from(rank), world, LIMITS)).collect(),
            current: vec![0; world],
            dead: vec![false; world],
            failed: vec![None; world],
            flights: BinaryHeap::new(),
            last_arrival: vec![vec![0; world]; world],
            held: Vec::new(),
            delays,
            sent: 0,
            now: 0,
            fifo,
            piecewise,
            had: vec![0; world],
        }
    }

    fn start(&mut self, rank: usize) {
        let number = self.current[rank];
        let now = Duration::from_micros(self.now);
        self.ranks[rank].start(id(number), content(rank, rank, number), now).expect("start");
        for to in (0..self.ranks.len()).filter(|to| *to != rank) {
            let delay = self.delays[self.sent as usize % self.delays.len()];
            let earliest = if self.fifo { self.last_arrival[rank][to] } else { 0 };
            let at = (self.now + delay).max(earliest);
            self.last_arrival[rank][to] = at;
            self.flights.push(std::cmp::Reverse((at, self.sent, rank, to, number)));
            self.sent += 1;
        }
    }

    fn arrive(&mut self, from: usize, to: usize, number: u64) {
        if self.dead[to] || self.failed[to].is_some() {
            return;
        }
        let payload = content(from, to, number);
        match self.ranks[to].admit(Rank::from(from), id(number), payload.len() as u32) {
            Ok(Admission::Take) => drop(self.ranks[to].deliver(Rank::from(from), number, payload)),
            Ok(Admission::Hold) => self.held.push((from, to, number)),
            Err(violation) => panic!("rank {to} refused rank {from}: {violation}"),
        }
    }

    /// Finishes what can be finished at `rank`; starts its next round; checks every byte.
    fn advance(&mut self, rank: usize, total: u64) {
        while !self.dead[rank] && self.failed[rank].is_none() && self.current[rank] < total {
            let number = self.current[rank];
            let now = Duration::from_micros(self.now);
            let whole = match self.piecewise && number % 2 == 1 {
                true => self.look_at_frames(rank, number, now),
                false => self.ranks[rank].poll(number, now),
            };
            match whole {
                RoundPoll::Pending { .. } => return,
                RoundPoll::Failed(failure) => self.failed[rank] = Some(failure),
                RoundPoll::Ready(payloads) => {
                    for (from, payload) in payloads.iter().enumerate() {
                        assert_eq!(*payload, content(from, rank, number), "round {number}: {from} to {rank}");
                    }
                    self.current[rank] += 1;
                    if self.current[rank] < total {
                        self.start(rank);
                    }
                    for (from, to, number) in std::mem::take(&mut self.held) {
                        self.arrive(from, to, number);
                    }
                }
            }
        }
    }

    /// Takes the frames that are there, checks each, and says when the round is whole, with nothing left to check.
    fn look_at_frames(&mut self, rank: usize, number: u64, now: Duration) -> RoundPoll {
        match self.ranks[rank].poll_frames(number, now) {
            FramesPoll::Pending { deadline } => RoundPoll::Pending { deadline },
            FramesPoll::Failed(failure) => RoundPoll::Failed(failure),
            FramesPoll::Some(Arrivals { frames, whole }) => {
                for (from, payload) in &frames {
                    assert_eq!(
                        *payload,
                        content(from.index(), rank, number),
                        "round {number}: {from} to {rank}"
                    );
                }
                self.had[rank] += frames.len();
                match whole {
                    false => self.look_at_frames(rank, number, now),
                    true => {
                        let others = self.ranks.len() - 1;
                        assert_eq!(std::mem::take(&mut self.had[rank]), others, "each peer's frame once");
                        RoundPoll::Ready(Vec::new())
                    }
                }
            }
        }
    }

    /// Runs until nothing flies; `crash` is (rank, time): it sends nothing more, and the others learn it later.
    fn run(&mut self, total: u64, crash: Option<(usize, u64)>) {
        (0..self.ranks.len()).for_each(|rank| self.start(rank));
        while let Some(std::cmp::Reverse((at, _, from, to, number))) = self.flights.pop() {
            self.now = self.now.max(at);
            if let Some((victim, time)) =
                crash.filter(|(victim, time)| self.now >= *time && !self.dead[*victim])
            {
                self.dead[victim] = true;
                self.flights.retain(|flight| flight.0.2 != victim || flight.0.0 < time);
            }
            self.arrive(from, to, number);
            (0..self.ranks.len()).for_each(|rank| self.advance(rank, total));
        }
        if let Some((victim, _)) = crash {
            for rank in (0..self.ranks.len()).filter(|rank| *rank != victim) {
                let silent = LossCause::Silent { after: Duration::from_secs(3) };
                self.ranks[rank].lose_peer(Rank::from(victim), silent);
            }
            (0..self.ranks.len()).for_each(|rank| self.advance(rank, total));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_rank_gets_every_byte_at_any_speed(
        world in 1_usize..6,
        delays in proptest::collection::vec(0_u64..5000, 1..40),
        ways in any::<(bool, bool)>(),
    ) {
        let mut net = Net::new(world, delays, ways);
        net.run(12, None);
        if world > 1 {
            prop_assert_eq!(net.current, vec![12; world]);
            prop_assert_eq!(net.sent, 12 * (world * (world - 1)) as u64);
        }
    }

    #[test]
    fn a_crash_ends_every_rank_with_its_name_or_with_all_rounds(
        world in 2_usize..6,
        delays in proptest::collection::vec(0_u64..5000, 1..40),
        victim in 0_usize..6,
        time in 0_u64..30_000,
        piecewise in any::<bool>(),
    ) {
        let victim = victim % world;
        let mut net = Net::new(world, delays, (true, piecewise));
        net.run(12, Some((victim, time)));
        for rank in (0..world).filter(|rank| *rank != victim && net.dead[victim]) {
            match &net.failed[rank] {
                None => {
                    // Waits for a survivor that failed: the driver below closes that connection too.
                    let done = net.current[rank] == 12;
                    let stuck = (0..world).any(|peer| net.failed[peer].is_some());
                    prop_assert!(done || stuck, "rank {} neither failed nor finished", rank);
                }
                Some(RoundFailure::Lost(peer, LossCause::Silent { .. })) => prop_assert_eq!(peer.index(), victim),
                other => prop_assert!(false, "rank {}: {:?}", rank, other),
            }
        }
    }

    /// Headers of any kind from a peer never panic, and never make a rank hold more than its bound.
    #[test]
    fn hostile_headers_stay_within_the_bound(
        frames in proptest::collection::vec((0_u16..5, 0_u64..20, 0_u8..5, 0_u16..3, 0_u32..80), 0..200),
    ) {
        let mut rounds = rounds(3);
        for (step, (peer, number, class, layer, length)) in frames.into_iter().enumerate() {
            let class = ByteClass::from_number(class).expect("class");
            let frame = RoundId { number, class, layer };
            match rounds.admit(Rank(peer), frame, length) {
                Ok(Admission::Take) => drop(rounds.deliver(Rank(peer), number, Bytes::from(vec![0; length as usize]))),
                Ok(Admission::Hold) => {}
                Err(violation) => rounds.break_peer(Rank(peer), violation),
            }
            if step % 9 == 0 {
                let next = RoundId { layer: 0, ..id(rounds.next_number()) };
                let _ = rounds.start(next, Bytes::new(), Duration::ZERO);
                let _ = rounds.poll(next.number, Duration::from_secs(1));
            }
            prop_assert!(rounds.early_bytes(Rank(1)) <= LIMITS.early_bytes);
            prop_assert!(rounds.slots.len() as u64 <= LIMITS.window());
        }
    }
}
