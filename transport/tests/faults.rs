//! Bad links and dead peers: the right bytes, or a named error in bounded time.

mod support;

use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::identity::ClusterAuthority;
use exflow_transport::link::LinkSpec;
use exflow_transport::quic::{self, Listener, QuicOptions};
use exflow_transport::{ByteClass, Communicator, LossCause, TransportError};
use std::net::UdpSocket;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use support::relay::{Path, relay};
use support::{bounded, issued, local_rank, on_threads, quick, round, run_rounds};

fn world_over(link: &str, n: usize) -> Vec<quic::QuicCommunicator> {
    let link: LinkSpec = link.parse().expect("a link");
    quic::loopback_world(n, QuicOptions { link: Some(link), idle_timeout: Duration::from_secs(5), ..quick() })
        .expect("world")
}

#[test]
fn bad_links_deliver_the_right_bytes() {
    for link in [
        "loss=0.1%,seed=5",
        "loss=1%,seed=1",
        "loss=10%,seed=2",
        "reorder=5%,duplicate=5%,corrupt=1%,seed=3",
        "latency=2ms,rate=50mbit,loss=1%,reorder=1%,duplicate=1%,corrupt=1%,seed=4",
    ] {
        bounded(move || {
            on_threads(world_over(link, 3), |mut comm| run_rounds(&mut comm, 0, 30, 400).expect("rounds"));
        });
    }
}

#[test]
fn ordered_latency_is_what_a_round_takes() {
    bounded(|| {
        let times = on_threads(world_over("latency=5ms", 2), |mut comm| {
            let mut times = Vec::new();
            for number in 0..20 {
                let began = Instant::now();
                comm.exchange(round(number, ByteClass::Ids), vec![Bytes::from(vec![1; 8]); 2])
                    .expect("round");
                times.push(began.elapsed());
            }
            times.sort();
            times[10]
        });
        for time in times {
            assert!(time >= Duration::from_millis(4) && time < Duration::from_millis(20), "{time:?}");
        }
    });
}

/// Ranks 0 and 1 with a way between them that can be broken.
fn broken_pair(options: &QuicOptions) -> (Vec<quic::QuicCommunicator>, Arc<Path>) {
    let authority = ClusterAuthority::new().expect("authority");
    let leader = Listener::bind(local_rank(0, 2, issued(&authority, 0), options.clone())).expect("bind");
    let mut follower = local_rank(1, 2, issued(&authority, 1), options.clone());
    let (address, path) = relay(leader.local_address());
    follower.leader = Some(address.to_string());
    let follower = std::thread::spawn(move || quic::join(follower).expect("rank 1"));
    let leader = leader.join().expect("rank 0");
    (vec![leader, follower.join().expect("thread")], path)
}

#[test]
fn partitions_one_way_and_both_are_named_at_both_ends() {
    type Cut = fn(&Path);
    let cuts: [Cut; 3] = [
        |path| path.cut(true),
        |path| path.cut_there.store(true, Ordering::Relaxed),
        |path| path.cut_back.store(true, Ordering::Relaxed),
    ];
    for cut in cuts {
        bounded(move || {
            let options = QuicOptions { idle_timeout: Duration::from_millis(600), ..quick() };
            let (world, path) = broken_pair(&options);
            let both = Arc::new(Barrier::new(2));
            on_threads(world, move |mut comm| {
                run_rounds(&mut comm, 0, 5, 100).expect("before the cut");
                both.wait();
                cut(&path);
                let error = run_rounds(&mut comm, 5, u64::MAX, 100).expect_err("after the cut");
                let TransportError::PeerLost { cause, .. } = &error else { panic!("{error}") };
                // Whoever notices first may still be able to say so.
                let named = matches!(cause, LossCause::Silent { .. } | LossCause::ClosedByPeer { .. });
                assert!(named, "{error}");
            });
        });
    }
}

#[test]
fn a_partition_that_heals_in_time_costs_nothing_but_time() {
    bounded(|| {
        let (world, path) = broken_pair(&QuicOptions { idle_timeout: Duration::from_secs(10), ..quick() });
        let healer = Arc::clone(&path);
        on_threads(world, move |mut comm| {
            run_rounds(&mut comm, 0, 5, 100).expect("before the cut");
            if comm.rank() == Rank(0) {
                path.cut(true);
                let path = Arc::clone(&healer);
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(400));
                    path.cut(false);
                });
            }
            run_rounds(&mut comm, 5, 60, 100).expect("after it has healed");
        });
    });
}

#[test]
fn a_path_that_takes_smaller_packets_than_before_is_found_out() {
    bounded(|| {
        let (world, path) = broken_pair(&QuicOptions { idle_timeout: Duration::from_secs(20), ..quick() });
        let both = Arc::new(Barrier::new(2));
        on_threads(world, move |mut comm| {
            // Until packets larger than QUIC's least are in use, as every link takes them.
            let mut number = 0;
            loop {
                run_rounds(&mut comm, number, number + 10, 5000).expect("before");
                number += 10;
                let large = comm.links()[0].udp_payload_bytes > 1400;
                let payload = Bytes::from(vec![u8::from(large)]);
                let all = comm.all_gather(round(number, ByteClass::Ids), payload).expect("agree");
                number += 1;
                if all.iter().all(|large| large[0] == 1) {
                    break;
                }
            }
            both.wait();
            path.largest.store(1250, Ordering::Relaxed);
            both.wait();
            run_rounds(&mut comm, number, number + 10, 5000).expect("with smaller packets");
            let payload = comm.links()[0].udp_payload_bytes;
            assert!(payload <= 1250, "{payload}");
        });
    });
}

#[test]
fn ranks_that_start_seconds_apart_join() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let leader = Listener::bind(local_rank(0, 3, issued(&authority, 0), quick())).expect("bind");
        let address = leader.local_address().to_string();
        let follow = |rank: u16, after: u64| {
            let mut options = local_rank(rank, 3, issued(&authority, rank), quick());
            options.leader = Some(address.clone());
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(after));
                quic::join(options).expect("joined")
            })
        };
        let (one, two) = (follow(1, 2500), follow(2, 0));
        let world =
            vec![leader.join().expect("rank 0"), one.join().expect("rank 1"), two.join().expect("rank 2")];
        on_threads(world, |mut comm| run_rounds(&mut comm, 0, 3, 10).expect("rounds"));
    });
}

/// Processes of two, one and two ranks: each pair of processes has one connection, each rank all the others.
#[test]
fn processes_of_several_ranks_are_one_world() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let process = |number: u16, ranks: usize, leader: Option<&Listener>| {
            let mut options = local_rank(number, 3, issued(&authority, number), quick());
            options.ranks = ranks;
            options.leader = leader.map(|leader| leader.local_address().to_string());
            Listener::bind(options).expect("bind")
        };
        let zero = process(0, 2, None);
        let (one, two) = (process(1, 1, Some(&zero)), process(2, 2, Some(&zero)));
        let listeners = [zero, one, two];
        let world: Vec<_> = std::thread::scope(|scope| {
            let forming: Vec<_> =
                listeners.iter().map(|l| scope.spawn(|| l.form(quic::Life::default()))).collect();
            forming.into_iter().flat_map(|thread| thread.join().expect("thread").expect("joined")).collect()
        });
        assert_eq!(world.iter().map(|comm| comm.rank().0).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        let links: Vec<usize> = world.iter().map(|comm| comm.links().len()).collect();
        assert_eq!(links, [2; 5], "one connection for each pair of processes");
        let stats = on_threads(world, |mut comm| {
            run_rounds(&mut comm, 0, 40, 700).expect("rounds");
            comm.stats()
        });
        let sent =
            |from: u16, to: u16| stats[usize::from(from)].between(Rank(from), Rank(to), ByteClass::Dispatch);
        assert_eq!(sent(0, 1).frames_sent, 20);
        assert_eq!((sent(0, 1).wire_bytes_sent, sent(4, 3).wire_bytes_sent), (0, 0), "nothing on a wire");
        assert_eq!(sent(0, 2).wire_bytes_sent, sent(0, 2).payload_bytes_sent + 20 * 40);
        assert_eq!(sent(0, 4).payload_bytes_sent, {
            let received = stats[4].between(Rank(4), Rank(0), ByteClass::Dispatch);
            received.payload_bytes_received
        });

        // A rank that fails takes its process along, and everybody hears why.
        let world: Vec<_> = std::thread::scope(|scope| {
            let life = || quic::Life { epoch: 1, ..quic::Life::default() };
            let forming: Vec<_> = listeners.iter().map(|l| scope.spawn(move || l.form(life()))).collect();
            forming.into_iter().flat_map(|thread| thread.join().expect("thread").expect("joined")).collect()
        });
        let errors = on_threads(world, |mut comm| {
            let class = if comm.rank() == Rank(3) { ByteClass::Combine } else { ByteClass::Dispatch };
            comm.exchange(round(0, class), vec![Bytes::new(); 5]).expect_err("classes differ").to_string()
        });
        assert!(errors.iter().all(|error| error.contains("do not run the same exchanges")), "{errors:?}");
    });
}

#[test]
fn messages_and_background_bytes_travel_within_and_between_processes() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let process = |number: u16, leader: Option<&Listener>| {
            let mut options = local_rank(number, 2, issued(&authority, number), quick());
            options.ranks = 2;
            options.leader = leader.map(|leader| leader.local_address().to_string());
            Listener::bind(options).expect("bind")
        };
        let zero = process(0, None);
        let one = process(1, Some(&zero));
        let world: Vec<_> = std::thread::scope(|scope| {
            let forming: Vec<_> = [&zero, &one].map(|l| scope.spawn(|| l.form(quic::Life::default()))).into();
            forming.into_iter().flat_map(|thread| thread.join().expect("thread").expect("joined")).collect()
        });
        support::talk(world);
    });
}

#[test]
fn strangers_that_say_nothing_or_nonsense_do_not_keep_others_out() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let leader = Listener::bind(local_rank(0, 2, issued(&authority, 0), quick())).expect("bind");
        let address = leader.local_address();
        let noise = UdpSocket::bind("127.0.0.1:0").expect("socket");
        for length in 0..200_usize {
            let packet: Vec<u8> = (0..length * 7).map(|at| (at * length + 0xc0) as u8).collect();
            noise.send_to(&packet, address).expect("send");
        }
        let mut options = local_rank(1, 2, issued(&authority, 1), quick());
        options.leader = Some(address.to_string());
        let follower = std::thread::spawn(move || quic::join(options).expect("rank 1"));
        let leader = leader.join().expect("rank 0");
        let world = vec![leader, follower.join().expect("thread")];
        on_threads(world, |mut comm| run_rounds(&mut comm, 0, 3, 10).expect("rounds"));
    });
}

#[test]
fn a_rank_that_panics_is_named_at_once() {
    bounded(|| {
        let world = quic::loopback_world(3, quick()).expect("world");
        let began = Instant::now();
        let threads: Vec<_> = world
            .into_iter()
            .map(|mut comm| {
                std::thread::spawn(move || {
                    run_rounds(&mut comm, 0, 3, 10).expect("rounds");
                    assert!(comm.rank() != Rank(2), "a rank that fails on purpose");
                    run_rounds(&mut comm, 3, 9, 10).expect_err("rank 2 is gone").to_string()
                })
            })
            .collect();
        let ended: Vec<_> = threads.into_iter().map(std::thread::JoinHandle::join).collect();
        for error in ended.into_iter().flatten() {
            assert!(error.contains("rank 2"), "{error}");
        }
        assert!(began.elapsed() < Duration::from_secs(2));
    });
}
