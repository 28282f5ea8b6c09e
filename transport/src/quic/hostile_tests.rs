//! Peers with a trusted certificate that join and then do what they like: each is named in bounded time, holds no more of
//! our memory than is promised, and stops nobody else.

use super::join::{Joined, Link};
use super::wire::{self, Preface};
use super::*;
use crate::proto::frame::{FrameHeader, MESSAGE};
use crate::proto::membership::WorldName;
use crate::proto::pulse::Beat;
use crate::{ByteClass, Communicator, LossCause, RoundId, TransportError, Violation};
use bytes::Bytes;
use std::sync::Mutex;
use std::time::Duration;

const KEPT: usize = 1 << 20;

fn quick() -> QuicOptions {
    QuicOptions {
        join_timeout: Duration::from_secs(15),
        idle_timeout: Duration::from_secs(5),
        round_timeout: Duration::from_secs(5),
        max_frame_bytes: 1 << 18,
        early_bytes: KEPT,
        bulk_unread_bytes: KEPT,
        bulk_unsent_bytes: KEPT,
        ..QuicOptions::loopback()
    }
}

/// A rank that has joined as it should; from then on a test writes on its streams.
struct Puppet {
    core: Arc<Core>,
    links: Vec<Link>,
    world: WorldName,
}

type Events = Arc<Mutex<Vec<JoinEvent>>>;

fn listen(
    rank: u16,
    n: usize,
    quic: QuicOptions,
    authority: &ClusterAuthority,
    leader: Option<&Listener>,
) -> (Listener, Events) {
    let events = Events::default();
    let seen = Arc::clone(&events);
    let identity = authority.issue(Rank(rank), DEFAULT_VALIDITY).expect("identity");
    let options = JoinOptions {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        leader: leader.map(|leader| leader.local_address().to_string()),
        quic,
        observer: Some(Arc::new(move |event| seen.lock().expect("events").push(event.clone()))),
        ..JoinOptions::new(Rank(rank), n, identity)
    };
    (Listener::bind(options).expect("bind"), events)
}

/// Ranks 0 and 2, which keep to the protocol, with what they were told, and rank 1, which does not.
fn world(quic: &QuicOptions) -> ([(QuicCommunicator, Events); 2], Puppet) {
    let authority = ClusterAuthority::new().expect("authority");
    let (zero, zero_events) = listen(0, 3, quic.clone(), &authority, None);
    let (one, _) = listen(1, 3, quic.clone(), &authority, Some(&zero));
    let (two, two_events) = listen(2, 3, quic.clone(), &authority, Some(&zero));
    let core = Arc::clone(&one.core);
    let puppet = core.runtime.launch(join::join(Arc::clone(&core), Life::default()));
    let two = std::thread::spawn(move || two.join().expect("rank 2"));
    let zero = zero.join().expect("rank 0");
    let Joined { links, world, .. } = puppet.recv().expect("driver").expect("rank 1");
    let two = two.join().expect("thread");
    ([(zero, zero_events), (two, two_events)], Puppet { core, links, world })
}

impl Puppet {
    fn header(&self, number: u64, length: u32) -> FrameHeader {
        let class = if number.is_multiple_of(2) { ByteClass::Dispatch } else { ByteClass::Combine };
        let (source, WorldName { id, epoch }) = (Rank(1), self.world);
        FrameHeader { class, layer: 0, world: id, epoch, source, number, length }
    }

    /// Writes on the rows stream towards a rank; false where it does not get rid of all within `patience`.
    fn write(&mut self, to: Rank, bytes: &[u8], patience: Duration) -> bool {
        self.write_pair((Rank(1), to), bytes, patience)
    }

    /// [`Puppet::write`] for one of several ranks of its process.
    fn write_pair(&mut self, (own, to): (Rank, Rank), bytes: &[u8], patience: Duration) -> bool {
        let mut pairs = self.links.iter_mut().flat_map(|link| &mut link.pairs);
        let pair = pairs.find(|pair| (pair.own, pair.peer) == (own, to)).expect("a peer");
        let write = pair.rows.0.write_all(bytes);
        let write = async { tokio::time::timeout(patience, write).await };
        self.core.runtime.handle().block_on(write).is_ok_and(|written| written.is_ok())
    }

    fn rows(&mut self, to: Rank) -> &mut quinn::SendStream {
        let link = self.links.iter_mut().find(|link| link.peer == to).expect("a peer");
        &mut link.pairs[0].rows.0
    }

    fn frame(&self, number: u64, payload: &[u8]) -> Vec<u8> {
        [&self.header(number, payload.len() as u32).encode()[..], payload].concat()
    }
}

fn round(number: u64) -> RoundId {
    let class = if number.is_multiple_of(2) { ByteClass::Dispatch } else { ByteClass::Combine };
    RoundId { number, class, layer: 0 }
}

/// What rank 0 says of its rounds once rank 1 has done `act`.
fn named(act: impl FnOnce(&mut Puppet)) -> TransportError {
    let ([(mut zero, _), (mut two, _)], mut puppet) = world(&quick());
    act(&mut puppet);
    let other = std::thread::spawn(move || {
        (0..50).try_for_each(|n| two.exchange(round(n), vec![Bytes::new(); 3]).map(drop))
    });
    let ended = (0..50).try_for_each(|n| zero.exchange(round(n), vec![Bytes::new(); 3]).map(drop));
    drop((zero, puppet));
    other.join().expect("rank 2").expect_err("rank 1 never sends it what is missing");
    ended.expect_err("rank 1 broke the protocol")
}

fn violation(act: impl FnOnce(&mut Puppet)) -> Violation {
    match named(act) {
        TransportError::Protocol { peer: Rank(1), violation, .. } => violation,
        other => panic!("{other}"),
    }
}

const SOON: Duration = Duration::from_secs(2);

#[test]
fn broken_frames_are_named() {
    let cap = quick().max_frame_bytes;
    let reset = violation(|puppet| {
        let half = puppet.frame(0, &[5; 100])[..90].to_vec();
        assert!(puppet.write(Rank(0), &half, SOON));
        puppet.rows(Rank(0)).reset(0_u32.into()).expect("open");
    });
    assert_eq!(reset, Violation::Reset { stream: "rows" });
    let ended = violation(|puppet| {
        let half = puppet.frame(0, &[5; 100])[..90].to_vec();
        assert!(puppet.write(Rank(0), &half, SOON));
        puppet.rows(Rank(0)).finish().expect("open");
    });
    assert_eq!(ended, Violation::Truncated { stream: "rows" });
    let oversized = violation(|puppet| {
        let header = puppet.header(0, cap + 1).encode();
        assert!(puppet.write(Rank(0), &header, SOON));
    });
    assert_eq!(oversized, Violation::Oversized { length: cap + 1, cap });
    let trailing = violation(|puppet| {
        let frames = [puppet.frame(0, b"row"), vec![7; 60]].concat();
        assert!(puppet.write(Rank(0), &frames, SOON));
    });
    assert_eq!(trailing, Violation::BadMagic);
}

#[test]
fn replayed_and_foreign_frames_are_named() {
    let twice = violation(|puppet| {
        let frames = [puppet.frame(0, b"row"), puppet.frame(0, b"row")].concat();
        assert!(puppet.write(Rank(0), &frames, SOON));
    });
    // The second may come while the round is open, or once it is over.
    assert!(
        matches!(twice, Violation::Duplicate { number: 0 } | Violation::Replayed { number: 0 }),
        "{twice}"
    );
    let ahead = violation(|puppet| {
        let frame = puppet.frame(90, b"");
        assert!(puppet.write(Rank(0), &frame, SOON));
    });
    assert!(matches!(ahead, Violation::TooFarAhead { .. }), "{ahead}");
    let old = violation(|puppet| {
        let header = FrameHeader { epoch: puppet.world.epoch.wrapping_sub(1), ..puppet.header(0, 0) };
        assert!(puppet.write(Rank(0), &header.encode(), SOON));
    });
    assert!(matches!(old, Violation::WrongWorld { .. }), "{old}");
    let forged = violation(|puppet| {
        let header = FrameHeader { source: Rank(2), ..puppet.header(0, 0) };
        assert!(puppet.write(Rank(0), &header.encode(), SOON));
    });
    assert_eq!(forged, Violation::WrongSource { claimed: Rank(2) });
}

/// Ranks 2 and 3 are one process; 2 breaks the protocol towards 0, and 1, which has all it needs of 2 and waits for 3, hears
/// why nothing comes.
#[test]
fn what_one_rank_breaks_ends_its_whole_process_and_all_know_why() {
    let authority = ClusterAuthority::new().expect("authority");
    let listen = |rank: u16, leader: Option<&Listener>| {
        let mut options = JoinOptions {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            leader: leader.map(|leader| leader.local_address().to_string()),
            quic: quick(),
            ..JoinOptions::new(
                Rank(rank),
                2,
                authority.issue(Rank(rank), DEFAULT_VALIDITY).expect("identity"),
            )
        };
        options.ranks = 2;
        Listener::bind(options).expect("bind")
    };
    let zero = listen(0, None);
    let one = listen(1, Some(&zero));
    let core = Arc::clone(&one.core);
    let puppet = core.runtime.launch(join::join(Arc::clone(&core), Life::default()));
    let world = zero.form(Life::default()).expect("ranks 0 and 1");
    let Joined { links, world: name, .. } = puppet.recv().expect("driver").expect("ranks 2 and 3");
    let mut puppet = Puppet { core, links, world: name };
    let [mut first, mut second] = world.try_into().expect("two ranks");

    let frame = FrameHeader { source: Rank(2), ..puppet.header(0, 0) }.encode();
    assert!(puppet.write_pair((Rank(2), Rank(1)), &frame, SOON));
    first.start_exchange(round(0), vec![Bytes::new(); 4]).expect("start");
    second.start_exchange(round(0), vec![Bytes::new(); 4]).expect("start");
    let mut had = Vec::new();
    while had.len() < 2 {
        had.extend(second.arrivals(round(0), true).expect("frames").frames.into_iter().map(|(from, _)| from));
    }
    had.sort();
    assert_eq!(had, [Rank(0), Rank(2)]);
    assert!(puppet.write_pair((Rank(2), Rank(0)), &[7; 60], SOON));
    let errors = [&mut first, &mut second].map(|comm| comm.finish_exchange(round(0)).expect_err("broken"));
    assert!(
        matches!(&errors[0], TransportError::Protocol { peer: Rank(2), violation: Violation::BadMagic, .. }),
        "{}",
        errors[0]
    );
    let TransportError::PeerLost { peer: Rank(3), cause, .. } = &errors[1] else { panic!("{}", errors[1]) };
    assert!(cause.to_string().contains(&Violation::BadMagic.to_string()), "{cause}");
}

#[test]
fn a_round_that_is_over_is_not_replayed() {
    let ([(mut zero, _), (mut two, _)], mut puppet) = world(&quick());
    for to in [Rank(0), Rank(2)] {
        let frame = puppet.frame(0, b"row");
        assert!(puppet.write(to, &frame, SOON));
    }
    let other = std::thread::spawn(move || {
        two.exchange(round(0), vec![Bytes::new(); 3]).expect("all have sent it");
        two
    });
    zero.exchange(round(0), vec![Bytes::new(); 3]).expect("all have sent it");
    let two = other.join().expect("rank 2");
    let again = puppet.frame(0, b"row");
    assert!(puppet.write(Rank(0), &again, SOON));
    let error = zero.exchange(round(1), vec![Bytes::new(); 3]).expect_err("a replay");
    assert!(
        error.to_string().contains("rank 1 broke the protocol")
            && error.to_string().contains("replayed round 0"),
        "{error}"
    );
    drop(two);
}

#[test]
fn a_flood_holds_no_more_than_is_promised_and_stops_nobody_else() {
    let ([(mut zero, _), (mut two, _)], mut puppet) = world(&quick());
    // More streams than a link has: not granted.
    let connection =
        puppet.links.iter().find(|link| link.peer == Rank(0)).expect("a link").connection.clone();
    let more = async { tokio::time::timeout(Duration::from_millis(300), connection.open_bi()).await };
    assert!(puppet.core.runtime.handle().block_on(more).is_err(), "a fourth stream");
    // Messages that nobody reads: taken up to the bound, then the stream is not read any more.
    let (mut number, mut taken) = (0, 0);
    loop {
        let message = puppet.frame(MESSAGE | number, &[3; 1 << 16]);
        if !puppet.write(Rank(0), &message, Duration::from_millis(500)) {
            break;
        }
        (number, taken) = (number + 1, taken + message.len());
        assert!(taken < 64 << 20, "there is a bound");
    }
    let promised = KEPT + 2 * 1024 * 1200 + (1 << 18);
    // What our own side of the connection has taken and not sent yet counts as written.
    let unsent = promised;
    assert!(taken <= promised + unsent, "{taken} bytes");
    for at in 0..100_u8 {
        zero.send_message(Rank(2), ByteClass::Ids, 0, vec![at; 9].into()).expect("send");
        let heard = two.recv_message(SOON).expect("receive").expect("in time");
        assert_eq!((heard.from, heard.payload[0]), (Rank(0), at));
        two.send_message(Rank(0), ByteClass::Ids, 0, vec![at; 9].into()).expect("send");
    }
    let mut heard = 0;
    while heard < 100 {
        let message = zero.recv_message(SOON).expect("receive").expect("in time");
        heard += usize::from(message.from == Rank(2));
    }
}

#[test]
fn a_peer_that_does_not_read_is_named_and_others_are_served() {
    let quic = QuicOptions { round_timeout: Duration::from_millis(700), ..quick() };
    let ([(mut zero, _), (mut two, _)], puppet) = world(&quic);
    let error = loop {
        if let Err(error) = zero.send_bulk(Rank(1), vec![1; 1 << 18].into()) {
            break error;
        }
    };
    assert!(matches!(error, TransportError::Backlog { peer: Rank(1), .. }), "{error}");
    zero.send_bulk(Rank(2), vec![8; 1 << 18].into()).expect("rank 2 reads");
    let (from, bytes) = two.recv_bulk(SOON).expect("receive").expect("in time");
    assert_eq!((from, bytes.len()), (Rank(0), 1 << 18));
    drop(puppet);
}

#[test]
fn messages_to_a_peer_that_does_not_read_wait_up_to_a_bound() {
    let ([(mut zero, _), (two, _)], puppet) = world(&QuicOptions { messages_unsent_bytes: KEPT, ..quick() });
    let message = Bytes::from(vec![4; 1 << 16]);
    // What the streams of one link take, on both sides, and as much again that quinn has taken and not sent.
    let most = KEPT + 4 * 3 * 2 * 1024 * 1200;
    let mut taken = 0;
    let error = loop {
        match zero.send_message(Rank(1), ByteClass::Dispatch, 0, message.clone()) {
            Ok(()) => taken += message.len(),
            Err(error) => break error,
        }
        assert!(taken <= most, "{taken} bytes");
    };
    let unread = |error: &TransportError| match error {
        TransportError::PeerLost { peer, cause: LossCause::Unread { limit_bytes, .. }, .. } => {
            (*peer, *limit_bytes) == (Rank(1), KEPT)
        }
        _ => false,
    };
    assert!(unread(&error) && taken >= KEPT, "{error}, {taken} bytes");
    // It is known from then on, and nothing waits for it.
    let error = zero.send_message(Rank(2), ByteClass::Ids, 0, Bytes::new()).expect_err("rank 1 is given up");
    assert!(unread(&error), "{error}");
    drop((zero, two, puppet));
}

#[test]
fn a_guest_that_says_no_hello_keeps_nobody_out() {
    let authority = ClusterAuthority::new().expect("authority");
    let brief = QuicOptions { hello_timeout: Duration::from_millis(300), ..quick() };
    let (zero, events) = listen(0, 2, brief, &authority, None);
    let (mute, _) = listen(1, 2, quick(), &authority, Some(&zero));
    let (core, address) = (Arc::clone(&mute.core), zero.local_address());
    let joining = std::thread::spawn(move || zero.join().expect("rank 0"));
    let bound = &core.bound;
    let connect = async {
        let connecting = bound.endpoint.connect_with(bound.client(&address), address, "rank-0.exflow");
        let connection = connecting.expect("connect").await.expect("the certificates fit");
        // One stream, whose preface comes and whose hello does not.
        let stream = wire::open(&connection, Preface::CONTROL).await.expect("open");
        connection.closed().await;
        drop(stream);
    };
    core.runtime.handle().block_on(connect);
    let said_nothing =
        |event: &JoinEvent| matches!(event, JoinEvent::Failed { what } if what.contains("said no hello"));
    let began = std::time::Instant::now();
    while !events.lock().expect("events").iter().any(said_nothing) {
        assert!(began.elapsed() < Duration::from_secs(20), "the mute guest is named");
        std::thread::sleep(Duration::from_millis(5));
    }
    let identity = authority.issue(Rank(1), DEFAULT_VALIDITY).expect("identity");
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let leader = Some(address.to_string());
    let options = JoinOptions { listen, leader, quic: quick(), ..JoinOptions::new(Rank(1), 2, identity) };
    let one = super::join(options).expect("rank 1");
    let zero = joining.join().expect("thread");
    assert_eq!(zero.roster(), one.roster());
}

fn waits_for(events: &Events, wanted: &JoinEvent) {
    let began = std::time::Instant::now();
    while !events.lock().expect("events").contains(wanted) {
        assert!(began.elapsed() < Duration::from_secs(20), "{wanted:?} in {:?}", events.lock());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_silent_process_is_suspect_to_all_and_a_busy_one_is_not() {
    let ([(zero, zero_events), (two, two_events)], mut puppet) = world(&quick());
    // Rank 1 beats for rank 2 alone, a few times; its connections live on without it. Ranks 0 and 2 do nothing on their
    // own threads meanwhile, as if they waited for their devices: their heartbeats go on.
    let beat = |puppet: &mut Puppet, to: Rank, number: u64| {
        let payload = Beat::default().encode();
        let header =
            FrameHeader { class: ByteClass::Control, number, ..puppet.header(0, payload.len() as u32) };
        let link = puppet.links.iter_mut().find(|link| link.peer == to).expect("a peer");
        let bytes = [&header.encode()[..], &payload].concat();
        puppet.core.runtime.handle().block_on(link.control.0.write_all(&bytes)).expect("written");
    };
    let suspect = JoinEvent::Suspect { ranks: vec![Rank(1)] };
    for number in 0..10 {
        beat(&mut puppet, Rank(2), number);
        std::thread::sleep(Duration::from_millis(150));
    }
    waits_for(&zero_events, &suspect);
    waits_for(&two_events, &suspect);
    assert_eq!((zero.suspects(), two.suspects()), (vec![Rank(1)], vec![Rank(1)]));
    beat(&mut puppet, Rank(0), 0);
    beat(&mut puppet, Rank(2), 10);
    let heard = JoinEvent::Heard { ranks: vec![Rank(1)] };
    waits_for(&zero_events, &heard);
    waits_for(&two_events, &heard);
    for events in [zero_events, two_events] {
        let of_others = |event: &JoinEvent| match event {
            JoinEvent::Suspect { ranks } => *ranks != [Rank(1)],
            _ => false,
        };
        assert!(!events.lock().expect("events").iter().any(of_others), "a busy rank is not suspect");
    }
}

#[test]
fn heartbeats_that_cannot_be_read_are_named() {
    let error = named(|puppet| {
        let header = FrameHeader { class: ByteClass::Control, number: 0, ..puppet.header(0, 3) };
        let link = puppet.links.iter_mut().find(|link| link.peer == Rank(0)).expect("a peer");
        let bytes = [&header.encode()[..], &[0xff; 3]].concat();
        puppet.core.runtime.handle().block_on(link.control.0.write_all(&bytes)).expect("written");
    });
    assert!(error.to_string().contains("its heartbeat message cannot be read"), "{error}");
}
