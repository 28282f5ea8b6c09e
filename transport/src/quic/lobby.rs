//! Rank 0's side of joining: it waits until all are there, then welcomes them.

use super::endpoint::Bound;
use super::join::{Arrival, Guest, Joined, Link, Notes, accept_link, explain, receive, refuse};
use super::options::{JoinEvent, JoinOptions};
use super::wire;
use crate::proto::membership::{Lobby, LobbyPoll, Message, Welcome, WorldName};
use crate::{Refusal, TransportError};
use exflow_placement::Rank;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Guests with a seat, by id.
type Seated = BTreeMap<u64, Box<Guest>>;

pub(crate) async fn lead(bound: Bound, options: &Arc<JoinOptions>) -> Result<Joined, TransportError> {
    let began = Instant::now();
    let arrivals = receive(bound.endpoint.clone(), Arc::clone(options));
    let (seated, welcome) = gather(&bound, options, arrivals, began).await?;
    let mut messages = Vec::new();
    let mut opening = JoinSet::new();
    for mut guest in seated.into_values() {
        let peer = guest.hello.rank;
        messages.push((peer, false, guest.bytes));
        let sent =
            wire::write_message(&mut guest.control.0, options.rank, &Message::Welcome(welcome.clone())).await;
        messages.push((peer, true, sent.map_err(|error| explain(options, peer, &error))?));
        let options = Arc::clone(options);
        opening.spawn(async move {
            let link = accept_link(peer, guest.connection, guest.control).await;
            link.map_err(|error| explain(&options, peer, &error))
        });
    }
    let links = collect(opening, options).await?;
    let Welcome { world, max_frame_bytes, settings, .. } = welcome;
    Ok(Joined { endpoint: bound.endpoint, links, world, max_frame_bytes, settings, messages })
}

/// Waits until every seat is taken.
async fn gather(
    bound: &Bound,
    options: &Arc<JoinOptions>,
    mut arrivals: mpsc::Receiver<Arrival>,
    began: Instant,
) -> Result<(Seated, Welcome), TransportError> {
    let mut lobby = Lobby::new(options.hello(bound.address.port()), options.quic.join_timeout);
    let (mut seated, mut notes, mut left) = (Seated::new(), Notes::default(), JoinSet::new());
    loop {
        let deadline = match lobby.poll(began.elapsed()) {
            LobbyPoll::Waiting { deadline } => deadline,
            LobbyPoll::Full { addresses, max_frame_bytes, epoch } => {
                let world = WorldName { id: random_id(), epoch };
                return Ok((
                    seated,
                    Welcome { world, max_frame_bytes, addresses, settings: options.settings.clone() },
                ));
            }
            LobbyPoll::Expired { missing } => {
                dismiss(seated, options, &missing).await;
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
                let (id, connection) = (guest.id, guest.connection.clone());
                if seat(&mut lobby, &mut seated, guest, options, &mut notes) {
                    left.spawn(async move {
                        connection.closed().await;
                        id
                    });
                }
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

/// Tells those who did come that the group will not be complete.
async fn dismiss(seated: Seated, options: &JoinOptions, missing: &[Rank]) {
    let mut refusing = JoinSet::new();
    for mut guest in seated.into_values() {
        let (own, refusal) = (options.rank, Refusal::Incomplete { missing: missing.to_vec() });
        refusing.spawn(async move { refuse(&guest.connection, &mut guest.control, own, refusal).await });
    }
    while refusing.join_next().await.is_some() {}
}

/// Waits for the streams of every guest.
pub(crate) async fn collect(
    mut opening: JoinSet<Result<Link, TransportError>>,
    options: &JoinOptions,
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
                let missing = (1..options.world_size).map(Rank::from).filter(|rank| !there(rank)).collect();
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
