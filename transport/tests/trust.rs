//! Who is let in, and what those hear who are not.

mod support;

use exflow_placement::Rank;
use exflow_transport::identity::{ClusterAuthority, DEFAULT_VALIDITY, Identity};
use exflow_transport::quic::{self, JoinEvent, Listener, QuicOptions};
use exflow_transport::{Refusal, TransportError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{bounded, issued, local_rank, pair, quick, run_rounds};

/// Settings under which rank 0 soon gives up.
fn brief() -> QuicOptions {
    QuicOptions { join_timeout: Duration::from_secs(2), ..quick() }
}

fn both_refuse(
    identities: [Identity; 2],
    change: impl FnOnce(&mut quic::JoinOptions),
) -> [TransportError; 2] {
    let [leader, follower] = pair(identities, brief(), change);
    let [leader, follower] = [leader.expect_err("rank 0"), follower.expect_err("rank 1")];
    assert!(
        matches!(&leader, TransportError::JoinTimeout { missing, .. } if *missing == [Rank(1)]),
        "{leader}"
    );
    [leader, follower]
}

fn members() -> [Identity; 2] {
    let authority = ClusterAuthority::new().expect("authority");
    [issued(&authority, 0), issued(&authority, 1)]
}

#[test]
fn another_authority_is_refused_at_both_ends() {
    bounded(|| {
        let stranger = issued(&ClusterAuthority::new().expect("authority"), 1);
        let [first, _] = members();
        let [leader, follower] = both_refuse([first, stranger], |_| {});
        assert!(matches!(follower, TransportError::Untrusted { peer: Rank(0), .. }), "{follower}");
        assert!(leader.to_string().contains("handshake failed"), "{leader}");
    });
}

#[test]
fn an_expired_certificate_is_refused() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let stale = authority.issue(Rank(1), Duration::ZERO).expect("identity");
        std::thread::sleep(Duration::from_millis(1100)); // Certificates count in seconds.
        let [_, follower] = both_refuse([issued(&authority, 0), stale], |_| {});
        assert!(matches!(follower, TransportError::Untrusted { .. }), "{follower}");
    });
}

#[test]
fn a_certificate_of_another_rank_is_refused() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let [leader, follower] = both_refuse([issued(&authority, 0), issued(&authority, 3)], |_| {});
        let expected = Refusal::CertificateRank { rank: Rank(1) };
        assert!(
            matches!(&follower, TransportError::Refused { refusal, .. } if *refusal == expected),
            "{follower}"
        );
        assert!(leader.to_string().contains("not rank 1's"), "{leader}");
    });
}

#[test]
fn a_leader_with_another_ranks_certificate_is_not_trusted() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let [_, follower] = both_refuse([issued(&authority, 2), issued(&authority, 1)], |_| {});
        assert!(matches!(follower, TransportError::Untrusted { peer: Rank(0), .. }), "{follower}");
    });
}

#[test]
fn hellos_that_do_not_fit_are_refused_by_name() {
    type Change = fn(&mut quic::JoinOptions);
    let cases: [(Change, &str); 3] = [
        (|options| options.model = [9; 32], "another model"),
        (|options| options.world_size = 3, "world size 3 where it is 2"),
        (|options| options.numerics = "fast".into(), "numerics mode fast"),
    ];
    // Side by side: rank 0 waits out its join timeout in each.
    std::thread::scope(|scope| {
        for (change, words) in cases {
            scope.spawn(move || {
                bounded(move || {
                    let [leader, follower] = both_refuse(members(), change);
                    assert!(matches!(follower, TransportError::Refused { peer: Rank(0), .. }), "{follower}");
                    assert!(follower.to_string().contains(words), "{follower}");
                    assert!(leader.to_string().contains(words), "{leader}");
                });
            });
        }
    });
}

#[test]
fn the_second_claim_to_a_rank_is_refused_and_the_first_joins() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let mut options = local_rank(0, 3, issued(&authority, 0), quick());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&seen);
        options.observer = Some(Arc::new(move |event| record.lock().expect("events").push(event.clone())));
        let leader = Listener::bind(options).expect("bind");
        let address = leader.local_address().to_string();
        let leader = std::thread::spawn(move || leader.join());
        let follow = |rank| {
            let mut options = local_rank(rank, 3, issued(&authority, rank), quick());
            options.leader = Some(address.clone());
            std::thread::spawn(move || quic::join(options))
        };
        let first = follow(1);
        while !seen.lock().expect("events").iter().any(|event| matches!(event, JoinEvent::Joined { .. })) {
            std::thread::yield_now();
        }
        let error = follow(1).join().expect("thread").expect_err("rank 1 is taken");
        let expected = Refusal::DuplicateRank { rank: Rank(1) };
        assert!(matches!(&error, TransportError::Refused { refusal, .. } if *refusal == expected), "{error}");
        let last = follow(2);
        let joined = [leader.join(), first.join(), last.join()];
        let world: Vec<_> = joined.into_iter().map(|rank| rank.expect("thread").expect("joined")).collect();
        support::on_threads(world, |mut comm| run_rounds(&mut comm, 0, 3, 10).expect("rounds"));
    });
}

#[test]
fn pinned_certificates_join_and_others_do_not() {
    bounded(|| {
        let own = |rank| Identity::self_signed(Rank(rank)).expect("identity");
        let [first, second, stranger] = [own(0), own(1), own(1)];
        let pins = vec![(Rank(0), first.fingerprint()), (Rank(1), second.fingerprint())];
        let [leader, follower] =
            pair([first.clone().pin(pins.clone()), second.pin(pins.clone())], quick(), |_| {});
        leader.expect("rank 0");
        follower.expect("rank 1");
        let [_, error] = both_refuse([first.pin(pins.clone()), stranger.pin(pins)], |_| {});
        assert!(matches!(error, TransportError::Untrusted { .. }), "{error}");
    });
}

#[test]
fn ranks_that_never_come_are_named_to_those_that_did() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let leader = Listener::bind(local_rank(0, 3, issued(&authority, 0), brief())).expect("bind");
        let mut options =
            local_rank(1, 3, authority.issue(Rank(1), DEFAULT_VALIDITY).expect("identity"), quick());
        options.leader = Some(leader.local_address().to_string());
        let follower = std::thread::spawn(move || quic::join(options));
        let error = leader.join().expect_err("rank 2 never comes");
        assert!(
            matches!(&error, TransportError::JoinTimeout { missing, .. } if *missing == [Rank(2)]),
            "{error}"
        );
        let told = follower.join().expect("thread").expect_err("told by rank 0");
        let expected = Refusal::Incomplete { missing: vec![Rank(2)] };
        assert!(matches!(&told, TransportError::Refused { refusal, .. } if *refusal == expected), "{told}");
    });
}

#[test]
fn a_rank_may_start_before_its_leader() {
    bounded(|| {
        let [first, second] = members();
        let reserved = std::net::UdpSocket::bind("127.0.0.1:0").expect("socket");
        let address = reserved.local_addr().expect("address");
        let mut options = local_rank(1, 2, second, quick());
        options.leader = Some(address.to_string());
        let follower = std::thread::spawn(move || quic::join(options));
        // Its first packets are swallowed by this socket.
        let mut packet = [0; 2000];
        reserved.recv_from(&mut packet).expect("a packet");
        drop(reserved);
        let mut options = local_rank(0, 2, first, quick());
        options.listen = address;
        let _leader = Listener::bind(options).expect("bind").join().expect("rank 0");
        follower.join().expect("thread").expect("rank 1");
    });
}

#[test]
fn nobody_there_ends_in_time() {
    bounded(|| {
        let [_, second] = members();
        let reserved = std::net::UdpSocket::bind("127.0.0.1:0").expect("socket");
        let mut options = local_rank(1, 2, second, brief());
        options.leader = Some(reserved.local_addr().expect("address").to_string());
        let began = Instant::now();
        let error = quic::join(options).expect_err("nobody there");
        assert!(
            matches!(&error, TransportError::JoinTimeout { missing, .. } if *missing == [Rank(0)]),
            "{error}"
        );
        assert!(began.elapsed() < Duration::from_secs(5));
    });
}
