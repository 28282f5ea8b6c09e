//! The other ranks' side of joining: hello to rank 0, then to the lower ranks, while the higher ones come.

use super::Core;
use super::join::{Arrival, Ends, Guest, Joined, Link, Notes, accept_link, explain, open_link, refuse};
use super::options::{JoinEvent, JoinOptions, Life};
use super::tls::{Verdict, verdict};
use super::wire::{self, Duplex, Preface, WireError};
use crate::identity::rank_name;
use crate::proto::membership::{Gate, Hello, Message, Roster, WELCOME_CAP, Welcome};
use crate::{Refusal, TransportError, Violation};
use exflow_placement::Rank;
use quinn::Connection;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Time between two attempts to reach a peer.
const RETRY: Duration = Duration::from_millis(100);

/// A link and the bytes of the two messages that made it.
type Opened = (Link, Option<[usize; 2]>);
/// A connection with its control stream, and the bytes of hello and answer.
type Greeted = (Connection, Duplex, [usize; 2]);

pub(crate) async fn follow(core: &Arc<Core>, life: &Life) -> Result<Joined, TransportError> {
    let (options, began) = (&core.options, Instant::now());
    // Those who came while an earlier life ran do not belong to this one.
    drop(core.door.take_waiting());
    let mut hello = options.hello(core.bound.address.port(), life);
    let dialer = Arc::new(Dialer { core: Arc::clone(core), began, contact: life.contact });
    let knocked = dialer.knock(&hello).await?;
    let Knocked { connection, control, welcome, bytes } = knocked;
    let leader = connection.remote_address();
    let mut messages = vec![(Rank(0), true, bytes[0]), (Rank(0), false, bytes[1])];
    hello.world = Some(welcome.world);
    let mut gate = Gate::new(hello.clone(), welcome.world, &welcome.roster);
    let opener = Opener { options: Arc::clone(options), roster: welcome.roster.clone() };
    let mut arrivals = core.door.arrivals.lock().await;
    let mut opening: JoinSet<Result<Opened, TransportError>> = JoinSet::new();
    let first = opener.clone();
    opening.spawn(async move { first.open(Rank(0), connection, control).await.map(|link| (link, None)) });
    for peer in (1..options.rank.index()).filter(|&peer| welcome.roster.is_present(peer)).map(Rank::from) {
        let address = address_of(peer, &welcome, leader, options);
        let (dialer, hello, opener) = (Arc::clone(&dialer), hello.clone(), opener.clone());
        opening.spawn(async move {
            let (connection, control, bytes) = dialer.greet(peer, address, hello).await?;
            opener.open(peer, connection, control).await.map(|link| (link, Some(bytes)))
        });
    }
    let expected: Vec<Rank> = (0..options.world_size)
        .filter(|&process| welcome.roster.is_present(process) && process != options.rank.index())
        .map(Rank::from)
        .collect();
    let (mut links, mut notes): (Vec<Link>, _) = (Vec::new(), Notes::default());
    while links.len() < expected.len() {
        let left = options.quic.join_timeout.saturating_sub(began.elapsed());
        let step = timeout(left, async {
            tokio::select! {
                Some(opened) = opening.join_next() => Ok(opened),
                Some(arrival) = arrivals.recv() => Err(arrival),
            }
        });
        match step.await {
            Ok(Ok(Ok(opened))) => {
                let (link, bytes) = opened?;
                if let Some([sent, received]) = bytes {
                    messages.extend([(link.peer, true, sent), (link.peer, false, received)]);
                }
                let address = link.connection.remote_address();
                options.tell(&JoinEvent::Joined { rank: link.peer, address });
                links.push(link);
            }
            Ok(Err(Arrival::Guest(guest))) => {
                let (peer, received) = (guest.hello.rank, guest.bytes);
                if let Some(sent) = admit(&mut gate, *guest, &opener, &mut notes, &mut opening).await {
                    messages.extend([(peer, false, received), (peer, true, sent)]);
                }
            }
            Ok(Err(Arrival::Failed(what))) => notes.add(options, what),
            Ok(Err(Arrival::Gone(_))) => {}
            Ok(Ok(Err(_))) | Err(_) => {
                let there = |rank: &Rank| links.iter().any(|link| link.peer == *rank);
                let missing = expected.into_iter().filter(|rank| !there(rank)).collect();
                return Err(notes.timeout(options, missing, began));
            }
        }
    }
    let Welcome { world, roster, max_frame_bytes, settings } = welcome;
    Ok(Joined { links, world, roster, max_frame_bytes, settings, messages })
}

/// Lets a higher rank in; gives the bytes of the answer.
async fn admit(
    gate: &mut Gate,
    mut guest: Guest,
    opener: &Opener,
    notes: &mut Notes,
    opening: &mut JoinSet<Result<Opened, TransportError>>,
) -> Option<usize> {
    let (peer, options) = (guest.hello.rank, &opener.options);
    if let Err(refusal) = gate.hear(&guest.hello) {
        notes.add(options, format!("refused rank {peer}: {refusal}"));
        let own = options.rank;
        tokio::spawn(async move { refuse(&guest.connection, &mut guest.control, own, refusal).await });
        return None;
    }
    let sent = wire::write_message(&mut guest.control.0, options.rank, &Message::Accept).await.unwrap_or(0);
    let opener = opener.clone();
    opening.spawn(async move {
        opener.accept(peer, guest.connection, guest.control).await.map(|link| (link, None))
    });
    Some(sent)
}

/// Sets up the streams of links.
#[derive(Clone)]
struct Opener {
    options: Arc<JoinOptions>,
    roster: Roster,
}

impl Opener {
    fn ends(&self, peer: Rank) -> Result<Ends, TransportError> {
        let ends = Ends::of(&self.roster, &self.options, peer);
        ends.ok_or_else(|| self.explain(peer, &Violation::BadPreface.into()))
    }

    fn explain(&self, peer: Rank, error: &WireError) -> TransportError {
        explain(&self.options, peer, error)
    }

    async fn open(
        &self,
        peer: Rank,
        connection: Connection,
        control: Duplex,
    ) -> Result<Link, TransportError> {
        let link = open_link(peer, connection, control, self.ends(peer)?).await;
        link.map_err(|error| self.explain(peer, &error))
    }

    async fn accept(
        &self,
        peer: Rank,
        connection: Connection,
        control: Duplex,
    ) -> Result<Link, TransportError> {
        let link = accept_link(peer, connection, control, self.ends(peer)?).await;
        link.map_err(|error| self.explain(peer, &error))
    }
}

/// Where to reach a lower rank. Rank 0 sees ranks of its own machine at a loopback address; from elsewhere they
/// are at rank 0's.
fn address_of(peer: Rank, welcome: &Welcome, leader: SocketAddr, options: &JoinOptions) -> SocketAddr {
    if let Some((_, address)) = options.peers.iter().find(|(rank, _)| *rank == peer) {
        return *address;
    }
    let member = welcome.roster.members().get(peer.index());
    let mut address = member.and_then(|member| member.address).unwrap_or(leader);
    if address.ip().to_canonical().is_loopback() && !leader.ip().to_canonical().is_loopback() {
        address.set_ip(leader.ip());
    }
    address
}

struct Dialer {
    core: Arc<Core>,
    began: Instant,
    /// How long rank 0 may be out of reach.
    contact: Option<Duration>,
}

struct Knocked {
    connection: Connection,
    control: Duplex,
    welcome: Welcome,
    /// Payload bytes of hello and welcome.
    bytes: [usize; 2],
}

impl Dialer {
    fn options(&self) -> &JoinOptions {
        &self.core.options
    }

    fn left(&self) -> Duration {
        self.options().quic.join_timeout.saturating_sub(self.began.elapsed())
    }

    /// How long a connection may still take to be made.
    fn left_to_reach(&self, peer: Rank) -> Duration {
        let contact = self.contact.filter(|_| peer == Rank(0));
        contact.map_or(self.left(), |contact| contact.saturating_sub(self.began.elapsed()).min(self.left()))
    }

    /// Says hello to rank 0 until it answers: it may start later than this rank.
    async fn knock(&self, hello: &Hello) -> Result<Knocked, TransportError> {
        let leader = self.options().leader.clone().unwrap_or_default();
        let mut notes = Notes::default();
        loop {
            if self.left_to_reach(Rank(0)).is_zero() {
                return Err(notes.timeout(self.options(), vec![Rank(0)], self.began));
            }
            let attempt = async {
                let address = self.resolve(&leader).await?;
                let (connection, control, message, bytes) = self.ask(Rank(0), address, hello).await?;
                match message {
                    Message::Welcome(welcome)
                        if welcome.roster.members().len() == usize::from(hello.world_size)
                            && welcome.roster.check()
                            && welcome.roster.members()[hello.rank.index()].ranks == hello.ranks
                            && welcome.roster.is_present(hello.rank.index()) =>
                    {
                        Ok(Knocked { connection, control, welcome, bytes })
                    }
                    other => Err(self.unexpected(Rank(0), other)),
                }
            };
            match timeout(self.left(), attempt).await {
                Ok(Ok(knocked)) => return Ok(knocked),
                Ok(Err(Attempt::Fatal(error))) => return Err(error),
                Ok(Err(Attempt::Again(what))) => notes.add(self.options(), format!("{leader}: {what}")),
                Err(_) => return Err(notes.timeout(self.options(), vec![Rank(0)], self.began)),
            }
            tokio::time::sleep(RETRY.min(self.left_to_reach(Rank(0)))).await;
        }
    }

    /// Says hello to a lower rank of the same world until it answers.
    async fn greet(&self, peer: Rank, address: SocketAddr, hello: Hello) -> Result<Greeted, TransportError> {
        let mut notes = Notes::default();
        loop {
            match timeout(self.left(), self.ask(peer, address, &hello)).await {
                Ok(Ok((connection, control, Message::Accept, bytes))) => {
                    return Ok((connection, control, bytes));
                }
                Ok(Ok((_, _, other, _))) => {
                    if let Attempt::Fatal(error) = self.unexpected(peer, other) {
                        return Err(error);
                    }
                }
                Ok(Err(Attempt::Fatal(error))) => return Err(error),
                Ok(Err(Attempt::Again(what))) => notes.add(self.options(), format!("{address}: {what}")),
                Err(_) => return Err(notes.timeout(self.options(), vec![peer], self.began)),
            }
            tokio::time::sleep(RETRY.min(self.left())).await;
        }
    }

    async fn resolve(&self, leader: &str) -> Result<SocketAddr, Attempt> {
        let own = self.core.bound.address;
        let found =
            tokio::net::lookup_host(leader).await.map_err(|error| Attempt::Again(error.to_string()))?;
        let fits =
            |at: &SocketAddr| at.is_ipv4() == own.is_ipv4() || own.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        found
            .into_iter()
            .find(fits)
            .ok_or_else(|| Attempt::Again("no address of our kind (IPv4 or IPv6)".into()))
    }

    /// Connects, says hello and reads the answer.
    async fn ask(
        &self,
        peer: Rank,
        address: SocketAddr,
        hello: &Hello,
    ) -> Result<(Connection, Duplex, Message, [usize; 2]), Attempt> {
        let address = reachable(address);
        let bound = &self.core.bound;
        let connecting = bound.endpoint.connect_with(bound.client(&address), address, &rank_name(peer));
        let connecting = connecting.map_err(|error| {
            let what = format!("{address}: {error}");
            Attempt::Fatal(TransportError::Options { what, remedy: "check this address".into() })
        })?;
        let fail = |error: WireError| self.failed(peer, &error);
        let connection = match timeout(self.left_to_reach(peer), connecting).await {
            Ok(connected) => connected.map_err(|error| fail(error.into()))?,
            Err(_) => return Err(Attempt::Again("no answer".into())),
        };
        let mut control = wire::open(&connection, Preface::CONTROL).await.map_err(fail)?;
        let hello = Message::Hello(hello.clone());
        let sent = wire::write_message(&mut control.0, self.options().rank, &hello).await.map_err(fail)?;
        let (_, message, received) = wire::read_message(&mut control.1, WELCOME_CAP).await.map_err(fail)?;
        match message {
            Message::Refuse(refusal) => Err(Attempt::Fatal(self.refused(peer, refusal))),
            message => Ok((connection, control, message, [sent, received])),
        }
    }

    fn refused(&self, peer: Rank, refusal: Refusal) -> TransportError {
        TransportError::Refused { rank: self.options().rank, peer, refusal }
    }

    fn unexpected(&self, peer: Rank, message: Message) -> Attempt {
        Attempt::Fatal(match message {
            Message::Refuse(refusal) => self.refused(peer, refusal),
            _ => self.refused(peer, Refusal::Malformed),
        })
    }

    /// Silence and restarts are worth another attempt; everything else stays as it is.
    fn failed(&self, peer: Rank, error: &WireError) -> Attempt {
        match error {
            WireError::Connection(lost) if matches!(verdict(lost), Verdict::Other) => match lost {
                quinn::ConnectionError::ApplicationClosed(_) => {
                    Attempt::Fatal(explain(self.options(), peer, error))
                }
                lost => Attempt::Again(lost.to_string()),
            },
            error => Attempt::Fatal(explain(self.options(), peer, error)),
        }
    }
}

enum Attempt {
    Fatal(TransportError),
    Again(String),
}

/// An unspecified address means "here".
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}
