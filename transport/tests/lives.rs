//! One life of a world after the other: ranks go, the rest goes on, ranks come back.

mod support;

use exflow_placement::Rank;
use exflow_transport::identity::{ClusterAuthority, Identity};
use exflow_transport::quic::{JoinOptions, Life, Listener, QuicCommunicator, QuicOptions, Ruling};
use exflow_transport::{ByteClass, Communicator, LossCause, Refusal, TransportError};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::{bounded, issued, local_rank, quick, round};

fn options() -> QuicOptions {
    QuicOptions { idle_timeout: Duration::from_millis(1000), ..quick() }
}

fn bind(rank: u16, identity: Identity, leader: Option<&Listener>) -> Listener {
    let leader = leader.map(|leader| leader.local_address().to_string());
    Listener::bind(JoinOptions { leader, ..local_rank(rank, 3, identity, options()) }).expect("bind")
}

/// All of `listeners` join a life, side by side; rank 0 gives the first one's `life` its knowledge of the world.
fn form(listeners: &[&Listener], life: &Life) -> Vec<QuicCommunicator> {
    std::thread::scope(|scope| {
        let joining: Vec<_> = listeners.iter().map(|l| scope.spawn(|| l.form(life.clone()))).collect();
        joining.into_iter().map(|thread| thread.join().expect("thread").expect("joined").remove(0)).collect()
    })
}

/// Exchanges rounds until `last`, or one fails; absent ranks' payloads must be empty.
fn rounds(comm: &mut QuicCommunicator, first: u64, last: u64) -> Result<(), TransportError> {
    for number in first..last {
        let payload = vec![comm.rank().0 as u8; 9];
        let got = comm.all_gather(round(number, ByteClass::Ids), payload.into())?;
        for (from, bytes) in got.iter().enumerate() {
            let expected =
                if comm.absent().contains(&Rank::from(from)) { vec![] } else { vec![from as u8; 9] };
            assert_eq!(bytes[..], expected[..]);
        }
    }
    Ok(())
}

fn run_all(comms: Vec<QuicCommunicator>) -> Vec<TransportError> {
    support::on_threads(comms, |mut comm| rounds(&mut comm, 0, u64::MAX).expect_err("this life ends"))
}

fn known(comm: &QuicCommunicator) -> Option<(u64, Vec<u16>)> {
    Some((comm.world().id, comm.roster().members().iter().map(|member| member.ranks).collect()))
}

#[test]
fn the_rest_goes_on_and_who_comes_back_is_let_in() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let identities: Vec<_> = (0..3).map(|rank| issued(&authority, rank)).collect();
        let leader = bind(0, identities[0].clone(), None);
        let one = bind(1, identities[1].clone(), Some(&leader));
        let two = bind(2, identities[2].clone(), Some(&leader));
        let mut comms = form(&[&leader, &one, &two], &Life::default());
        let known = known(&comms[0]);
        let first = comms[0].world();
        let mut gone = comms.pop().expect("rank 2");
        let rest = std::thread::spawn(move || run_all(comms));
        rounds(&mut gone, 0, 20).expect("all are there");
        drop((gone, two));
        for error in rest.join().expect("ranks 0 and 1") {
            assert!(matches!(error, TransportError::PeerLost { .. }), "{error}");
        }

        let life = Life { epoch: 1, known, partial_after: Duration::from_millis(200), contact: None };
        let mut comms = form(&[&leader, &one], &life);
        assert_eq!((comms[0].world().id, comms[0].world().epoch), (first.id, 1));
        assert_eq!((comms[1].absent(), comms[1].world_size()), (&[Rank(2)][..], 3));
        std::thread::scope(|scope| {
            comms
                .iter_mut()
                .for_each(|comm| drop(scope.spawn(|| rounds(comm, 0, 20).expect("two are there"))));
        });

        // Rank 2 comes back as a new process: the others hear of it, and all join the next epoch.
        let two = bind(2, identities[2].clone(), Some(&leader));
        let comms = std::thread::scope(|scope| {
            let back = scope.spawn(|| two.form(Life::default()));
            let mut ended = Vec::new();
            for mut comm in comms {
                ended.push(scope.spawn(move || rounds(&mut comm, 20, u64::MAX).expect_err("it ends")));
            }
            let mut ended = ended.into_iter().map(|thread| thread.join().expect("thread"));
            let cause = ended.next().expect("rank 0");
            assert!(
                matches!(&cause, TransportError::PeerLost { peer: Rank(2), cause: LossCause::Rejoins, .. }),
                "{cause}"
            );
            assert!(ended.next().expect("rank 1").to_string().contains("asks to join again"));
            let mut comms = form(&[&leader, &one], &Life { epoch: 2, ..life.clone() });
            comms.extend(back.join().expect("thread").expect("rank 2"));
            comms
        });
        assert!(comms.iter().all(|comm| comm.world().epoch == 2 && comm.absent().is_empty()));
        support::on_threads(comms, |mut comm| rounds(&mut comm, 0, 20).expect("all are there again"));
    });
}

#[test]
fn a_second_process_of_a_living_rank_is_refused_and_the_world_goes_on() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let [zero, one, two] = [0, 1, 2].map(|rank| issued(&authority, rank));
        let leader = bind(0, zero, None);
        let (one, second) = (bind(1, one, Some(&leader)), bind(2, two.clone(), Some(&leader)));
        let comms = form(&[&leader, &one, &second], &Life::default());
        let twin = bind(2, two, Some(&leader));
        let refused = std::thread::spawn(move || twin.form(Life::default()));
        let run = |mut comm: QuicCommunicator| {
            let began = Instant::now();
            let mut number = 0;
            while began.elapsed() < Duration::from_secs(2) || number % 100 != 0 {
                rounds(&mut comm, number, number + 1).expect("the world goes on");
                number += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            // Not all have run for as long: the fastest may leave while others still exchange.
            comm
        };
        let world: Vec<_> = comms.into_iter().map(|comm| std::thread::spawn(move || run(comm))).collect();
        let error = refused.join().expect("thread").expect_err("rank 2 is taken");
        let expected = Refusal::DuplicateRank { rank: Rank(2) };
        assert!(matches!(&error, TransportError::Refused { refusal, .. } if *refusal == expected), "{error}");
        drop(world);
    });
}

#[test]
fn a_leader_that_is_gone_is_named_in_the_time_given() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let leader = bind(0, issued(&authority, 0), None);
        let one = bind(1, issued(&authority, 1), Some(&leader));
        let two = bind(2, issued(&authority, 2), Some(&leader));
        let comms = form(&[&leader, &one, &two], &Life::default());
        drop(comms);
        drop(leader);
        let began = Instant::now();
        let life = Life { epoch: 1, contact: Some(Duration::from_millis(300)), ..Life::default() };
        let error = one.form(life).expect_err("nobody leads");
        assert!(
            matches!(&error, TransportError::JoinTimeout { missing, .. } if *missing == [Rank(0)]),
            "{error}"
        );
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    });
}

#[test]
fn what_rank_0_decides_of_those_who_came_reaches_all() {
    bounded(|| {
        let authority = ClusterAuthority::new().expect("authority");
        let mut options = local_rank(0, 2, issued(&authority, 0), options());
        options.decide = Some(Arc::new(|party| match party.offers[1].as_slice() {
            b"enough" => Ruling::Start(b"the plan".to_vec()),
            _ => Ruling::Never("2 GiB are missing".into()),
        }));
        let join = |offer: &[u8]| {
            let leader = Listener::bind(options.clone()).expect("bind");
            let mut guest = local_rank(1, 2, issued(&authority, 1), options.quic.clone());
            guest.leader = Some(leader.local_address().to_string());
            guest.offer = offer.to_vec();
            let guest = std::thread::spawn(move || exflow_transport::quic::join(guest));
            (leader.join(), guest.join().expect("thread"))
        };
        let (leader, guest) = join(b"enough");
        assert_eq!(leader.expect("rank 0").settings(), b"the plan");
        assert_eq!(guest.expect("rank 1").settings(), b"the plan");
        let (leader, guest) = join(b"little");
        let (leader, guest) = (leader.expect_err("rank 0"), guest.expect_err("rank 1"));
        for told in [leader.to_string(), guest.to_string()] {
            assert!(told.contains("2 GiB are missing"), "{told}");
        }
    });
}
