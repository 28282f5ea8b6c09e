//! Ranks of one process.

mod support;

use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::{ByteClass, Communicator, RoundId, TransportError, local};
use std::time::{Duration, Instant};

fn round(number: u64) -> RoundId {
    RoundId { number, class: ByteClass::Dispatch, layer: 0 }
}

#[test]
fn every_payload_arrives_and_is_counted() {
    let threads: Vec<_> = local::world(4)
        .into_iter()
        .map(|mut comm| {
            std::thread::spawn(move || {
                let rank = comm.rank().index();
                for number in 0..50 {
                    let payload = |to| Bytes::from(vec![(rank * 4 + to) as u8; number as usize]);
                    let send = (0..4).map(payload).collect();
                    let got = comm.exchange(round(number), send).expect("exchange");
                    for (from, payload) in got.iter().enumerate() {
                        assert_eq!(payload, &vec![(from * 4 + rank) as u8; number as usize]);
                    }
                }
                let ids = RoundId { number: 50, class: ByteClass::Ids, layer: u16::MAX };
                let all = comm.all_gather(ids, vec![rank as u8].into()).expect("all-gather");
                assert_eq!(all, [&[0_u8][..], &[1], &[2], &[3]]);
                (comm.stats(), comm)
            })
        })
        .collect();
    let ended: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("rank")).collect();
    let mut stats = ended[0].0.clone();
    ended[1..].iter().for_each(|(other, _)| stats.merge(other));
    assert_eq!(stats.exchanges(ByteClass::Dispatch), 50);
    assert_eq!(stats.class(ByteClass::Dispatch).frames_sent, 50 * 12);
    assert_eq!(stats.class(ByteClass::Dispatch).frames_received, 50 * 12);
    assert_eq!(stats.class(ByteClass::Dispatch).payload_bytes_sent, 12 * (0..50).sum::<u64>());
    assert_eq!(stats.class(ByteClass::Ids).frames_sent, 12);
    assert_eq!(stats.class(ByteClass::Dispatch).wire_bytes_sent, 0);
}

#[test]
fn frames_of_a_round_are_had_as_they_come() {
    support::bounded(|| support::take_frames_one_by_one(local::world(3)));
}

#[test]
fn messages_come_in_order_beside_rounds() {
    support::bounded(|| support::talk(local::world(3)));
}

#[test]
fn background_bytes_do_not_wait_for_rounds() {
    let mut world = local::world(2);
    let mut second = world.pop().expect("rank 1");
    let mut first = world.pop().expect("rank 0");
    first.send_bulk(Rank(1), vec![7; 100].into()).expect("send");
    first.send_bulk(Rank(1), vec![8; 10].into()).expect("send");
    let got = second.recv_bulk(Duration::ZERO).expect("receive").expect("there");
    assert_eq!((got.0, got.1.len()), (Rank(0), 100));
    assert_eq!(second.recv_bulk(Duration::ZERO).expect("receive").expect("there").1.len(), 10);
    assert!(second.recv_bulk(Duration::from_millis(5)).expect("receive").is_none());
}

#[test]
fn a_rank_that_leaves_is_named_at_once() {
    let mut world = local::world(3);
    drop(world.pop());
    let mut comm = world.remove(0);
    let began = Instant::now();
    let error = comm.exchange(round(0), vec![Bytes::new(); 3]).expect_err("rank 2 is gone");
    assert!(matches!(error, TransportError::PeerLost { peer: Rank(2), .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_silent_rank_is_named_at_the_deadline() {
    let options = local::LocalOptions { round_timeout: Duration::from_millis(30), ..Default::default() };
    let mut world = local::world_with(2, options);
    let error = world[0].exchange(round(0), vec![Bytes::new(); 2]).expect_err("rank 1 is silent");
    assert!(
        matches!(error, TransportError::RoundTimeout { ref missing, .. } if *missing == [Rank(1)]),
        "{error}"
    );
}

#[test]
fn mistakes_of_the_program_are_told() {
    let mut world = local::world(2);
    let wrong_count = world[0].exchange(round(0), vec![Bytes::new(); 3]).expect_err("three payloads");
    assert!(matches!(wrong_count, TransportError::Misuse { .. }), "{wrong_count}");
    let wrong_number = world[0].start_exchange(round(3), vec![Bytes::new(); 2]).expect_err("round 3 first");
    assert!(wrong_number.to_string().contains("round 3"), "{wrong_number}");
    assert!(world[0].finish_exchange(round(0)).is_err());
}
