//! Membership, with hellos that do not fit.

use super::*;
use proptest::prelude::*;
use std::time::Duration;

fn hello(rank: u16) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        rank: Rank(rank),
        world_size: 4,
        ranks: 1,
        offer: Vec::new(),
        model: [1; 32],
        table: None,
        numerics: "exact".into(),
        max_frame_bytes: 1 << 20,
        port: 7000 + rank,
        epoch: 0,
        world: None,
    }
}

fn terms() -> LobbyTerms {
    LobbyTerms { deadline: Duration::from_secs(5), ..LobbyTerms::default() }
}

fn from(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 9], port))
}

#[test]
fn a_world_is_full_when_every_seat_is_taken_and_agrees_on_the_smallest_frame() {
    let mut lobby = Lobby::new(hello(0), terms());
    assert_eq!(lobby.poll(Duration::ZERO), LobbyPoll::Waiting { deadline: Duration::from_secs(5) });
    for rank in [2, 1, 3] {
        let mut guest = hello(rank);
        guest.max_frame_bytes = 1000 * u32::from(rank);
        guest.epoch = u32::from(rank);
        guest.ranks = rank;
        assert_eq!(lobby.hear(u64::from(rank), &guest, from(9)), Ok(()));
    }
    let LobbyPoll::Ready(party) = lobby.poll(Duration::ZERO) else { panic!("not ready") };
    let members = party.roster.members();
    let addresses: Vec<_> = members[1..].iter().filter_map(|member| member.address).collect();
    assert_eq!(addresses, [from(7001), from(7002), from(7003)]);
    assert_eq!(members.iter().map(|member| member.first.0).collect::<Vec<_>>(), [0, 1, 2, 4]);
    assert_eq!(party.roster.world_size(), 7);
    assert_eq!((party.max_frame_bytes, party.epoch), (1000, 3));
    assert!(party.roster.check() && party.roster.absent().is_empty());
}

#[test]
fn a_known_world_starts_again_without_those_who_do_not_come() {
    let window = Duration::from_secs(2);
    let known = vec![1, 2, 1, 1];
    let terms = LobbyTerms { partial_after: Some(window), known: Some(known), ..terms() };
    let mut lobby = Lobby::new(hello(0), terms);
    let two = |rank| Hello { ranks: if rank == 1 { 2 } else { 1 }, epoch: 1, ..hello(rank) };
    assert_eq!(lobby.hear(3, &hello(1), from(9)), Err(Refusal::Ranks { ours: 2, theirs: 1 }));
    lobby.hear(3, &two(3), from(9)).expect("rank 3");
    assert_eq!(lobby.poll(Duration::ZERO), LobbyPoll::Waiting { deadline: window });
    let LobbyPoll::Ready(party) = lobby.poll(window) else { panic!("not ready") };
    assert_eq!(party.roster.absent(), [1, 2, 3].map(Rank));
    lobby.wait_for_more();
    assert_eq!(lobby.poll(window), LobbyPoll::Waiting { deadline: Duration::from_secs(5) });
    lobby.hear(1, &two(1), from(9)).expect("process 1");
    let LobbyPoll::Ready(party) = lobby.poll(window) else { panic!("not ready") };
    assert_eq!((party.roster.absent(), party.epoch), (vec![Rank(3)], 1));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let mut lobby = Lobby::new(Hello { table: Some([5; 32]), ..hello(0) }, terms());
    let mut refused = |change: &dyn Fn(&mut Hello)| {
        let mut guest = hello(1);
        change(&mut guest);
        lobby.hear(9, &guest, from(9)).expect_err("refused")
    };
    assert!(matches!(refused(&|h| h.protocol = 2), Refusal::Protocol { ours: 1, theirs: 2 }));
    assert!(matches!(refused(&|h| h.world_size = 3), Refusal::WorldSize { ours: 4, theirs: 3 }));
    assert!(matches!(refused(&|h| h.rank = Rank(4)), Refusal::NoSuchRank { .. }));
    assert!(matches!(refused(&|h| h.rank = Rank(0)), Refusal::DuplicateRank { .. }));
    assert!(matches!(refused(&|h| h.model[0] = 2), Refusal::Model { .. }));
    assert!(matches!(refused(&|h| h.table = Some([6; 32])), Refusal::Table { .. }));
    assert!(matches!(refused(&|h| h.numerics = "fast".into()), Refusal::Numerics { .. }));
    assert!(matches!(refused(&|h| h.world = Some(WorldName { id: 1, epoch: 0 })), Refusal::World));
    assert_eq!(lobby.missing(), [Rank(1), Rank(2), Rank(3)]);
}

#[test]
fn a_second_claim_is_refused_until_the_first_guest_leaves() {
    let mut lobby = Lobby::new(hello(0), terms());
    lobby.hear(1, &hello(2), from(9)).expect("first");
    assert_eq!(lobby.hear(2, &hello(2), from(9)), Err(Refusal::DuplicateRank { rank: Rank(2) }));
    lobby.leave(2);
    assert_eq!(lobby.missing(), [Rank(1), Rank(3)]);
    lobby.leave(1);
    lobby.hear(3, &hello(2), from(9)).expect("again");
    assert_eq!(lobby.poll(Duration::from_secs(5)), LobbyPoll::Expired { missing: vec![Rank(1), Rank(3)] });
}

#[test]
fn a_gate_lets_each_higher_rank_of_its_world_in_once() {
    let world = WorldName { id: 77, epoch: 2 };
    let mut gate = Gate::new(hello(1), world, &Roster::new([1; 4].map(|ranks| (ranks, Some(from(1))))));
    let guest = |rank, world| Hello { world, ..hello(rank) };
    assert_eq!(gate.hear(&guest(2, None)), Err(Refusal::World));
    assert_eq!(gate.hear(&guest(2, Some(WorldName { id: 78, epoch: 2 }))), Err(Refusal::World));
    let stale = Some(WorldName { id: 77, epoch: 1 });
    assert_eq!(gate.hear(&guest(2, stale)), Err(Refusal::Epoch { ours: 2, theirs: 1 }));
    assert_eq!(gate.hear(&guest(0, Some(world))), Err(Refusal::DuplicateRank { rank: Rank(0) }));
    assert_eq!(gate.hear(&guest(3, Some(world))), Ok(()));
    assert_eq!(gate.hear(&guest(3, Some(world))), Err(Refusal::DuplicateRank { rank: Rank(3) }));
    assert_eq!(gate.missing(), [Rank(2)]);
}

proptest! {
    #[test]
    fn messages_survive_the_wire(rank in any::<u16>(), numerics in "[a-z]{0,32}", table in any::<Option<[u8; 32]>>()) {
        let message = Message::Hello(Hello { rank: Rank(rank), numerics, table, ..hello(0) });
        let bytes = message.encode();
        prop_assert_eq!(Message::decode(&bytes), Some(message));
        let mut longer = bytes.clone();
        longer.push(0);
        prop_assert_eq!(Message::decode(&longer), None);
        prop_assert_eq!(Message::decode(&bytes[..bytes.len() - 1]), None);
    }

    #[test]
    fn bytes_of_any_kind_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Message::decode(&bytes);
    }

    /// Whatever the order of arrivals and departures, no two guests ever share a seat.
    #[test]
    fn seats_are_never_shared(steps in proptest::collection::vec((0_u64..6, 1_u16..4, any::<bool>()), 0..60)) {
        let mut lobby = Lobby::new(hello(0), terms());
        let mut model: std::collections::BTreeMap<u16, u64> = Default::default();
        for (guest, rank, comes) in steps {
            if comes {
                let free = !model.contains_key(&rank);
                prop_assert_eq!(lobby.hear(guest, &hello(rank), from(1)).is_ok(), free);
                model.entry(rank).or_insert(guest);
            } else {
                lobby.leave(guest);
                model.retain(|_, seated| *seated != guest);
            }
            prop_assert_eq!(lobby.missing().len(), 3 - model.len());
        }
    }
}
