//! Bad links and dead peers: the right bytes, or a named error in bounded time.

mod support;

use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::identity::ClusterAuthority;
use exflow_transport::link::LinkSpec;
use exflow_transport::quic::{self, Listener, QuicOptions};
use exflow_transport::{ByteClass, Communicator, LossCause, TransportError};
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use support::{bounded, issued, local_rank, on_threads, quick, round, run_rounds};

fn world_over(link: &str, n: usize) -> Vec<quic::QuicCommunicator> {
    let link: LinkSpec = link.parse().expect("a link");
    quic::loopback_world(n, QuicOptions { link: Some(link), idle_timeout: Duration::from_secs(5), ..quick() })
        .expect("world")
}

#[test]
fn bad_links_deliver_the_right_bytes() {
    for link in [
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

/// Forwards UDP between one peer and a leader until told to swallow everything.
fn relay(leader: std::net::SocketAddr, cut: Arc<AtomicBool>) -> std::net::SocketAddr {
    let front = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let back = UdpSocket::bind("127.0.0.1:0").expect("socket");
    let address = front.local_addr().expect("address");
    let (front_out, back_out) = (front.try_clone().expect("clone"), back.try_clone().expect("clone"));
    let peer = Arc::new(std::sync::Mutex::new(None));
    let (known, cut_back) = (Arc::clone(&peer), Arc::clone(&cut));
    std::thread::spawn(move || {
        let mut packet = vec![0; 65536];
        while let Ok((length, from)) = front.recv_from(&mut packet) {
            *known.lock().expect("peer") = Some(from);
            if !cut.load(Ordering::Relaxed) {
                let _ = back_out.send_to(&packet[..length], leader);
            }
        }
    });
    std::thread::spawn(move || {
        let mut packet = vec![0; 65536];
        while let Ok((length, _)) = back.recv_from(&mut packet) {
            let to = *peer.lock().expect("peer");
            if let (Some(to), false) = (to, cut_back.load(Ordering::Relaxed)) {
                let _ = front_out.send_to(&packet[..length], to);
            }
        }
    });
    address
}

#[test]
fn a_partition_is_named_at_both_ends_within_the_idle_timeout() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let options = || QuicOptions { idle_timeout: Duration::from_millis(600), ..quick() };
        let leader = Listener::bind(local_rank(0, 2, issued(&authority, 0), options())).expect("bind");
        let cut = Arc::new(AtomicBool::new(false));
        let mut follower = local_rank(1, 2, issued(&authority, 1), options());
        follower.leader = Some(relay(leader.local_address(), Arc::clone(&cut)).to_string());
        let follower = std::thread::spawn(move || quic::join(follower).expect("rank 1"));
        let leader = leader.join().expect("rank 0");
        let world = vec![leader, follower.join().expect("thread")];
        let both = Arc::new(Barrier::new(2));
        on_threads(world, move |mut comm| {
            run_rounds(&mut comm, 0, 5, 100).expect("before the cut");
            both.wait();
            cut.store(true, Ordering::Relaxed);
            let began = Instant::now();
            let error = run_rounds(&mut comm, 5, 1000, 100).expect_err("after the cut");
            let silent = matches!(error, TransportError::PeerLost { cause: LossCause::Silent { .. }, .. });
            let told =
                matches!(error, TransportError::PeerLost { cause: LossCause::ClosedByPeer { .. }, .. });
            assert!((silent || told) && began.elapsed() < Duration::from_secs(4), "{error}");
        });
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
