//! Helpers of the tests: ranks on threads, with a watchdog.

#![allow(unreachable_pub, dead_code, reason = "each test uses a part of it")]

pub mod relay;

use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::identity::{ClusterAuthority, DEFAULT_VALIDITY, Identity};
use exflow_transport::quic::{JoinOptions, Listener, QuicCommunicator, QuicOptions};
use exflow_transport::{ByteClass, Communicator, RoundId, TransportError};
use std::net::SocketAddr;
use std::sync::{Arc, Barrier, mpsc};
use std::time::Duration;

/// No test may take longer than this.
const WATCHDOG: Duration = Duration::from_secs(40);

/// Runs `test` on a thread of its own and fails where it hangs.
pub fn bounded<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let result = test();
        let _ = sender.send(());
        result
    });
    match receiver.recv_timeout(WATCHDOG) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the test hangs"),
        Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => thread.join().expect("the test failed"),
    }
}

pub fn round(number: u64, class: ByteClass) -> RoundId {
    RoundId { number, class, layer: (number % 7) as u16 }
}

/// What `from` sends `to` in a round: any length, also none.
pub fn payload(from: usize, to: usize, number: u64, scale: usize) -> Bytes {
    let length = (from * 7 + to * 3 + number as usize * 5) % 11 * scale;
    (0..length).map(|at| (at * 31 + from * 17 + to * 5 + number as usize) as u8).collect()
}

/// Runs rounds `first..last` and checks every byte.
pub fn run_rounds(
    comm: &mut impl Communicator,
    first: u64,
    last: u64,
    scale: usize,
) -> Result<(), TransportError> {
    let (rank, world) = (comm.rank().index(), comm.world_size());
    for number in first..last {
        let class = if number % 2 == 0 { ByteClass::Dispatch } else { ByteClass::Combine };
        let send = (0..world).map(|to| payload(rank, to, number, scale)).collect();
        let got = comm.exchange(round(number, class), send)?;
        for (from, bytes) in got.iter().enumerate() {
            assert_eq!(bytes, &payload(from, rank, number, scale), "round {number}: {from} to {rank}");
        }
    }
    Ok(())
}

/// Runs `body` for every communicator on a thread of its own; results by rank.
pub fn on_threads<C: Send + 'static, T: Send + 'static>(
    world: Vec<C>,
    body: impl Fn(C) -> T + Send + Clone + 'static,
) -> Vec<T> {
    let threads: Vec<_> = world
        .into_iter()
        .map(|comm| {
            let body = body.clone();
            std::thread::spawn(move || body(comm))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().expect("rank")).collect()
}

/// Loopback settings that notice faults quickly.
pub fn quick() -> QuicOptions {
    QuicOptions {
        join_timeout: Duration::from_secs(15),
        hello_timeout: Duration::from_secs(5),
        idle_timeout: Duration::from_secs(2),
        ..QuicOptions::loopback()
    }
}

/// Options of `rank` on 127.0.0.1, any port.
pub fn local_rank(rank: u16, world: usize, identity: Identity, quic: QuicOptions) -> JoinOptions {
    JoinOptions {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        quic,
        ..JoinOptions::new(Rank(rank), world, identity)
    }
}

/// Joins rank 0 and one other rank whose options `change` may alter; results of both.
pub fn pair(
    identities: [Identity; 2],
    quic: QuicOptions,
    change: impl FnOnce(&mut JoinOptions),
) -> [Result<QuicCommunicator, TransportError>; 2] {
    let [first, second] = identities;
    let leader = Listener::bind(local_rank(0, 2, first, quic.clone())).expect("bind");
    let mut options = local_rank(1, 2, second, quic);
    options.leader = Some(leader.local_address().to_string());
    change(&mut options);
    let follower = std::thread::spawn(move || exflow_transport::quic::join(options));
    let leader = leader.join();
    [leader, follower.join().expect("rank 1")]
}

pub fn issued(authority: &ClusterAuthority, rank: u16) -> Identity {
    authority.issue(Rank(rank), DEFAULT_VALIDITY).expect("identity")
}

/// Messages in all directions beside rounds and background bytes: all come, in order, counted; then rank 0 leaves and
/// the others hear of it once they have read everything.
pub fn talk<C: Communicator + 'static>(world: Vec<C>) {
    const EACH: u32 = 60;
    let n = world.len();
    let all_read = Arc::new(Barrier::new(n));
    let stats = on_threads(world, move |mut comm| {
        let rank = comm.rank().index();
        let peers: Vec<usize> = (0..n).filter(|peer| *peer != rank).collect();
        let class_of = |i: u32| [ByteClass::Dispatch, ByteClass::Combine, ByteClass::Ids][i as usize % 3];
        for i in 0..EACH {
            for &to in &peers {
                let payload: Bytes =
                    i.to_le_bytes().iter().copied().cycle().take(4 + i as usize * 9).collect();
                comm.send_message(Rank::from(to), class_of(i), i as u16, payload).expect("send");
                if i % 10 == 0 {
                    comm.send_bulk(Rank::from(to), vec![i as u8; 3].into()).expect("send");
                }
            }
            if i == EACH / 2 {
                run_rounds(&mut comm, 0, 4, 50).expect("rounds between messages");
            }
        }
        assert!(comm.send_message(Rank::from(peers[0]), ByteClass::Kv, 0, Bytes::new()).is_err());
        assert!(comm.send_message(comm.rank(), ByteClass::Ids, 0, Bytes::new()).is_err());
        let (mut next, mut bulk) = (vec![0; n], vec![0; n]);
        while peers.iter().any(|&peer| next[peer] < EACH || bulk[peer] < EACH.div_ceil(10)) {
            let message = comm.recv_message(Duration::from_secs(10)).expect("receive").expect("there");
            let from = message.from.index();
            if message.class == ByteClass::Kv {
                assert_eq!(message.payload, vec![10 * bulk[from] as u8; 3]);
                bulk[from] += 1;
                continue;
            }
            let i = next[from];
            assert_eq!((message.class, message.layer), (class_of(i), i as u16), "rank {rank} from {from}");
            assert_eq!(message.payload[..4], i.to_le_bytes());
            assert_eq!(message.payload.len(), 4 + i as usize * 9);
            next[from] += 1;
        }
        let stats = comm.stats();
        all_read.wait(); // a rank that leaves ends the others' reading, whoever's messages are on their way
        if rank == 0 {
            return stats; // leaves
        }
        let left = loop {
            match comm.recv_message(Duration::from_secs(10)) {
                Ok(message) => assert_eq!(message, None),
                Err(error) => break error,
            }
        };
        assert!(matches!(left, TransportError::PeerLost { .. }), "{left}");
        stats
    });
    for stats in stats {
        let sent: u64 =
            [ByteClass::Dispatch, ByteClass::Combine].map(|c| stats.class(c).frames_sent).iter().sum();
        let rounds = 4 * (n as u64 - 1);
        assert_eq!(sent, (n as u64 - 1) * 2 * u64::from(EACH) / 3 + rounds);
        assert_eq!(stats.class(ByteClass::Ids).frames_received, (n as u64 - 1) * u64::from(EACH) / 3);
        assert_eq!(stats.exchanges(ByteClass::Dispatch), 2, "messages are no exchanges");
    }
}

/// The last of three ranks starts a round only when another has had the frame of the third: single frames are given
/// out before a round is whole, each once, and the rounds after it go on as ever.
pub fn take_frames_one_by_one<C: Communicator + 'static>(world: Vec<C>) {
    let had = Arc::new(Barrier::new(2));
    on_threads(world, move |mut comm| {
        let rank = comm.rank().index();
        let first = round(0, ByteClass::Dispatch);
        let frame = |from: usize, to: usize| Bytes::from(vec![(10 * from + to) as u8; 5 + from]);
        if rank == 2 {
            had.wait();
        }
        comm.start_exchange(first, (0..3).map(|to| frame(rank, to)).collect()).expect("start");
        let mut frames = Vec::new();
        loop {
            let arrivals = comm.arrivals(first, true).expect("frames");
            frames.extend(arrivals.frames);
            if rank == 0 && frames.len() == 1 {
                assert_eq!(frames[0], (Rank(1), frame(1, 0)), "rank 2 has not even started");
                assert!(!arrivals.whole);
                assert_eq!(comm.arrivals(first, false).expect("a look").frames, []);
                had.wait();
            }
            if arrivals.whole {
                break;
            }
        }
        frames.sort_by_key(|(from, _)| *from);
        let others = (0..3).filter(|from| *from != rank).map(|from| (Rank::from(from), frame(from, rank)));
        assert_eq!(frames, others.collect::<Vec<_>>());
        assert!(comm.arrivals(first, false).is_err(), "it is over");
        run_rounds(&mut comm, 1, 4, 50).expect("rounds");
    });
}
