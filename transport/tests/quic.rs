//! Worlds over real QUIC connections on the loopback interface.

mod support;

use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::identity::ClusterAuthority;
use exflow_transport::quic::{self, DriverThreads, QuicOptions};
use exflow_transport::{ByteClass, Communicator, LossCause, TransportError};
use std::time::{Duration, Instant};
use support::{bounded, issued, on_threads, pair, quick, round, run_rounds, talk};

#[test]
fn every_payload_arrives_and_frames_are_counted_exactly() {
    bounded(|| {
        for (n, threads) in
            [(1, DriverThreads::PerRank), (2, DriverThreads::Shared), (4, DriverThreads::PerRank)]
        {
            let world = quic::loopback_world(n, QuicOptions { threads, ..quick() }).expect("world");
            let stats = on_threads(world, |mut comm| {
                run_rounds(&mut comm, 0, 40, 100).expect("rounds");
                comm.stats()
            });
            for (rank, stats) in stats.iter().enumerate() {
                for class in [ByteClass::Dispatch, ByteClass::Combine] {
                    assert_eq!(stats.exchanges(class), 20);
                    let counted = stats.class(class);
                    assert_eq!(counted.frames_sent, 20 * (n as u64 - 1), "rank {rank} of {n}");
                    assert_eq!(counted.frames_received, 20 * (n as u64 - 1));
                    assert_eq!(
                        counted.wire_bytes_sent,
                        counted.payload_bytes_sent + 40 * counted.frames_sent
                    );
                }
                assert!(
                    stats.class(ByteClass::Control).frames_sent >= n as u64 - 1,
                    "hellos, then heartbeats"
                );
                assert_eq!(stats.class(ByteClass::Kv).frames_sent, 0);
            }
        }
    });
}

#[test]
fn a_world_without_heartbeats_lives_on_and_suspects_nobody() {
    bounded(|| {
        let options = QuicOptions { heartbeats: false, ..quick() };
        // Longer than a process may be silent, and than a connection lives on which nothing is heard.
        let rest = options.idle_timeout + Duration::from_millis(500);
        let world = quic::loopback_world(3, options).expect("world");
        let hellos = |comm: &quic::QuicCommunicator| comm.stats().class(ByteClass::Control).frames_sent;
        let before: Vec<u64> = world.iter().map(hellos).collect();
        std::thread::sleep(rest);
        assert_eq!(world.iter().map(hellos).collect::<Vec<_>>(), before);
        assert!(world.iter().all(|comm| comm.suspects().is_empty()));
        on_threads(world, |mut comm| run_rounds(&mut comm, 0, 4, 100).expect("rounds"));
    });
}

#[test]
fn messages_come_in_order_beside_rounds() {
    bounded(|| talk(quic::loopback_world(3, quick()).expect("world")));
}

#[test]
fn frames_of_a_round_are_had_as_they_come() {
    bounded(|| support::take_frames_one_by_one(quic::loopback_world(3, quick()).expect("world")));
}

#[test]
fn large_payloads_and_open_rounds_work() {
    bounded(|| {
        let world = quic::loopback_world(3, quick()).expect("world");
        on_threads(world, |mut comm| {
            let rank = comm.rank().index();
            let big =
                |number: u64, from: usize| Bytes::from(vec![(number as usize * 3 + from) as u8; 3_000_000]);
            for number in 0..3 {
                let send = vec![big(number, rank); 3];
                comm.start_exchange(round(number, ByteClass::Dispatch), send).expect("start");
            }
            for number in 0..3 {
                let got = comm.finish_exchange(round(number, ByteClass::Dispatch)).expect("finish");
                assert!(got.iter().enumerate().all(|(from, bytes)| *bytes == big(number, from)));
            }
        });
    });
}

#[test]
fn rounds_go_on_while_nobody_reads_a_flood_of_background_bytes() {
    bounded(|| {
        let options = QuicOptions { bulk_unread_bytes: 1 << 20, ..quick() };
        let mut world = quic::loopback_world(2, options).expect("world");
        let mut second = world.pop().expect("rank 1");
        let mut first = world.pop().expect("rank 0");
        for at in 0..40_u8 {
            first.send_bulk(Rank(1), vec![at; 1 << 20].into()).expect("bulk");
        }
        let other = std::thread::spawn(move || {
            run_rounds(&mut second, 0, 50, 1000).expect("rounds");
            second
        });
        run_rounds(&mut first, 0, 50, 1000).expect("rounds");
        let mut second = other.join().expect("rank 1");
        for at in 0..40_u8 {
            let (from, bytes) = second.recv_bulk(Duration::from_secs(10)).expect("bulk").expect("in time");
            assert_eq!((from, bytes.len(), bytes[0]), (Rank(0), 1 << 20, at));
        }
        assert_eq!(first.stats().class(ByteClass::Kv).frames_sent, 40);
    });
}

#[test]
fn frames_handed_over_before_leaving_still_arrive() {
    bounded(|| {
        for _ in 0..5 {
            let mut world = quic::loopback_world(2, quick()).expect("world");
            let mut second = world.pop().expect("rank 1");
            let mut first = world.pop().expect("rank 0");
            first
                .start_exchange(round(0, ByteClass::Dispatch), vec![Bytes::from(vec![1; 500_000]); 2])
                .expect("start");
            drop(first);
            second
                .exchange(round(0, ByteClass::Dispatch), vec![Bytes::from(vec![2; 10]); 2])
                .expect("rank 0 had sent it");
            let began = Instant::now();
            let error = second
                .exchange(round(1, ByteClass::Combine), vec![Bytes::new(); 2])
                .expect_err("rank 0 left");
            let left =
                matches!(error, TransportError::PeerLost { peer: Rank(0), cause: LossCause::Left, .. });
            assert!(left && began.elapsed() < Duration::from_secs(1), "{error}");
        }
    });
}

#[test]
fn a_round_timeout_names_the_missing() {
    bounded(|| {
        let options = QuicOptions { round_timeout: Duration::from_millis(200), ..quick() };
        let mut world = quic::loopback_world(3, options).expect("world");
        let error = world[0]
            .exchange(round(0, ByteClass::Dispatch), vec![Bytes::new(); 3])
            .expect_err("nobody else sends");
        let TransportError::RoundTimeout { missing, .. } = &error else { panic!("{error}") };
        assert_eq!(*missing, [Rank(1), Rank(2)]);
    });
}

#[test]
fn a_rank_that_runs_other_exchanges_is_named_everywhere() {
    bounded(|| {
        let world = quic::loopback_world(3, quick()).expect("world");
        let errors = on_threads(world, |mut comm| {
            let class = if comm.rank() == Rank(2) { ByteClass::Combine } else { ByteClass::Dispatch };
            comm.exchange(round(0, class), vec![Bytes::new(); 3]).expect_err("classes differ").to_string()
        });
        assert!(errors.iter().all(|error| error.contains("do not run the same exchanges")), "{errors:?}");
    });
}

#[test]
fn two_listeners_join_with_settings_from_the_leader() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let identities = [issued(&authority, 0), issued(&authority, 1)];
        let [leader, follower] = pair(identities, quick(), |options| options.epoch = 4);
        let (mut leader, mut follower) = (leader.expect("rank 0"), follower.expect("rank 1"));
        assert_eq!(leader.world(), follower.world());
        assert_eq!(leader.world().epoch, 4);
        let other = std::thread::spawn(move || run_rounds(&mut follower, 0, 5, 10).expect("rounds"));
        run_rounds(&mut leader, 0, 5, 10).expect("rounds");
        other.join().expect("rank 1");
        let links = leader.links();
        assert_eq!(links.len(), 1);
        assert!(links[0].udp_bytes_sent > 0);
    });
}
