//! Rank 0's side of joining: it waits until all are there, then welcomes them.

use super::Core;
use super::join::{Arrival, Ends, Guest, Joined, Link, Notes, accept_link, explain, refuse};
use super::options::{JoinEvent, JoinOptions, Life, Ruling};
use super::wire;
use crate::proto::membership::{Lobby, LobbyPoll, LobbyTerms, Message, Party, Welcome, WorldName};
use crate::{Refusal, TransportError, Violation};
use exflow_placement::Rank;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Guests with a seat, by id.
type Seated = BTreeMap<u64, Box<Guest>>;

pub(crate) async fn lead(core: &Arc<Core>, life: &Life) -> Result<Joined, TransportError> {
    let options = &core.options;
    let (seated, welcome) = gather(core, life, Instant::now()).await?;
    let mut messages = Vec::new();
    let mut opening = JoinSet::new();
    for mut guest in seated.into_values() {
        let peer = guest.hello.rank;
        messages.push((peer, false, guest.bytes));
        let sent =
            wire::write_message(&mut guest.control.0, options.rank, &Message::Welcome(welcome.clone())).await;
        messages.push((peer, true, sent.map_err(|error| explain(options, peer, &error))?));
        let (options, ends) = (Arc::clone(options), Ends::of(&welcome.roster, options, peer));
        opening.spawn(async move {
            let ends = ends.ok_or_else(|| explain(&options, peer, &Violation::BadPreface.into()))?;
            let link = accept_link(peer, guest.connection, guest.control, ends).await;
            link.map_err(|error| explain(&options, peer, &error))
        });
    }
    let links = collect(opening, options, &welcome).await?;
    let Welcome { world, roster, max_frame_bytes, settings } = welcome;
    Ok(Joined { links, world, roster, max_frame_bytes, settings, messages })
}

/// Waits until the world can start.
async fn gather(core: &Arc<Core>, life: &Life, began: Instant) -> Result<(Seated, Welcome), TransportError> {
    let options = &core.options;
    let terms = LobbyTerms {
        deadline: options.quic.join_timeout,
        partial_after: life.known.is_some().then_some(life.partial_after),
        known: life.known.as_ref().map(|(_, ranks)| ranks.clone()),
    };
    let mut lobby = Lobby::new(options.hello(core.bound.address.port(), life), terms);
    let mut arrivals = core.door.arrivals.lock().await;
    let (mut seated, mut notes, mut left) = (Seated::new(), Notes::default(), JoinSet::new());
    let mut early = core.door.take_waiting();
    loop {
        if let Some(guest) = early.pop() {
            welcome_in(&mut lobby, &mut seated, Box::new(guest), options, &mut notes, &mut left);
            continue;
        }
        let deadline = match lobby.poll(began.elapsed()) {
            LobbyPoll::Waiting { deadline } => deadline,
            LobbyPoll::Ready(party) => match rule(options, &party).await? {
                Ruling::Start(settings) => {
                    let id = life.known.as_ref().map_or_else(random_id, |(id, _)| *id);
                    let world = WorldName { id, epoch: party.epoch };
                    let Party { roster, max_frame_bytes, .. } = party;
                    return Ok((seated, Welcome { world, max_frame_bytes, roster, settings }));
                }
                Ruling::Wait(what) if !lobby.missing().is_empty() => {
                    notes.add(options, what);
                    lobby.wait_for_more();
                    continue;
                }
                Ruling::Wait(what) | Ruling::Never(what) => {
                    dismiss(seated, options, &Refusal::NotStarted { what: what.clone() }).await;
                    return Err(TransportError::NotStarted { what });
                }
            },
            LobbyPoll::Expired { missing } => {
                dismiss(seated, options, &Refusal::Incomplete { missing: missing.clone() }).await;
                return Err(notes.timeout(options, missing, began));
            }
        };
        let arrival = tokio::select! {
            arrival = arrivals.recv() => arrival,
            Some(Ok(id)) = left.join_next() => Some(Arrival::Gone(id)),
            () = tokio::time::sleep(deadline.saturating_sub(began.elapsed())) => None,
        };
        match arrival {
            Some(Arrival::Guest(guest)) => {
                welcome_in(&mut lobby, &mut seated, guest, options, &mut notes, &mut left)
            }
            Some(Arrival::Gone(id)) => {
                lobby.leave(id);
                if let Some(guest) = seated.remove(&id) {
                    notes.add(options, format!("rank {} came and went away again", guest.hello.rank));
                }
            }
            Some(Arrival::Failed(what)) => notes.add(options, what),
            None => {}
        }
    }
}

/// Seats a guest, and watches whether it goes away again.
fn welcome_in(
    lobby: &mut Lobby,
    seated: &mut Seated,
    guest: Box<Guest>,
    options: &Arc<JoinOptions>,
    notes: &mut Notes,
    left: &mut JoinSet<u64>,
) {
    let (id, connection) = (guest.id, guest.connection.clone());
    if seat(lobby, seated, guest, options, notes) {
        left.spawn(async move {
            connection.closed().await;
            id
        });
    }
}

fn seat(
    lobby: &mut Lobby,
    seated: &mut Seated,
    mut guest: Box<Guest>,
    options: &Arc<JoinOptions>,
    notes: &mut Notes,
) -> bool {
    let (rank, address) = (guest.hello.rank, guest.connection.remote_address());
    match lobby.hear(guest.id, &guest.hello, address) {
        Ok(()) => {
            options.tell(&JoinEvent::Joined { rank, address });
            seated.insert(guest.id, guest);
            true
        }
        Err(refusal) => {
            notes.add(options, format!("refused rank {rank} at {address}: {refusal}"));
            let own = options.rank;
            tokio::spawn(async move { refuse(&guest.connection, &mut guest.control, own, refusal).await });
            false
        }
    }
}

/// Asks rank 0's program about those who are there.
async fn rule(options: &Arc<JoinOptions>, party: &Party) -> Result<Ruling, TransportError> {
    let Some(decide) = options.decide.clone() else { return Ok(Ruling::Start(options.settings.clone())) };
    let party = party.clone();
    // It may read files: connections are kept alive meanwhile.
    let ruling = tokio::task::spawn_blocking(move || decide(&party)).await;
    ruling.map_err(|error| TransportError::NotStarted { what: error.to_string() })
}

/// Tells those who did come that the group will not start.
async fn dismiss(seated: Seated, options: &JoinOptions, refusal: &Refusal) {
    let mut refusing = JoinSet::new();
    for mut guest in seated.into_values() {
        let (own, refusal) = (options.rank, refusal.clone());
        refusing.spawn(async move { refuse(&guest.connection, &mut guest.control, own, refusal).await });
    }
    while refusing.join_next().await.is_some() {}
}

/// Waits for the streams of every guest.
async fn collect(
    mut opening: JoinSet<Result<Link, TransportError>>,
    options: &JoinOptions,
    welcome: &Welcome,
) -> Result<Vec<Link>, TransportError> {
    let began = Instant::now();
    let mut links: Vec<Link> = Vec::new();
    loop {
        let left = options.quic.hello_timeout.saturating_sub(began.elapsed());
        match timeout(left, opening.join_next()).await {
            Ok(None) => return Ok(links),
            Ok(Some(Ok(link))) => links.push(link?),
            Ok(Some(Err(_))) | Err(_) => {
                let there = |rank: &Rank| links.iter().any(|link| link.peer == *rank);
                let expected = |rank: &Rank| welcome.roster.is_present(rank.index()) && !there(rank);
                let missing = (1..options.world_size).map(Rank::from).filter(expected).collect();
                return Err(Notes::default().timeout(options, missing, began));
            }
        }
    }
}

/// A number that two worlds hardly share.
fn random_id() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::time::SystemTime::now()) | 1
}
