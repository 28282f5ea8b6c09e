//! What both sides of joining share: guests, answers, and what failures mean.

use super::Core;
use super::endpoint::{self, Bound};
use super::options::{Congestion, JoinEvent, JoinOptions, Life, is_private};
use super::tls::{Verdict, verdict};
use super::wire::{self, CLOSE_FAILED, CLOSE_LEFT, CLOSE_REFUSED, Duplex, Preface, StreamKind, WireError};
use crate::proto::membership::{HELLO_CAP, Hello, Member, Message, Roster, WorldName};
use crate::{LossCause, Refusal, TransportError, Violation};
use exflow_placement::Rank;
use quinn::{Connection, ConnectionError};
use rustls::pki_types::CertificateDer;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

/// Guests whose handshake or hello is under way at once.
const GREETINGS: usize = 64;

/// A connection that is fully set up.
pub(crate) struct Link {
    /// The number of the peer's process.
    pub(crate) peer: Rank,
    pub(crate) connection: Connection,
    pub(crate) control: Duplex,
    /// Each of our ranks with each of the peer's.
    pub(crate) pairs: Vec<Pair>,
}

/// The streams between a rank of this process and one of another.
pub(crate) struct Pair {
    pub(crate) own: Rank,
    pub(crate) peer: Rank,
    pub(crate) rows: Duplex,
    pub(crate) bulk: Duplex,
}

/// The ranks at both ends of a link.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ends {
    own: Member,
    peer: Member,
    untuned: bool,
}

impl Ends {
    /// Of processes of the roster; none where one does not exist.
    pub(crate) fn of(roster: &Roster, options: &JoinOptions, peer: Rank) -> Option<Self> {
        let member = |process: Rank| roster.members().get(process.index()).copied();
        Some(Self { own: member(options.rank)?, peer: member(peer)?, untuned: options.quic.untuned })
    }

    fn make_room(&self, connection: &Connection) {
        if !self.untuned {
            endpoint::make_room(connection, self.streams());
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (Rank, Rank)> + use<> {
        let peer = self.peer;
        self.own.ranks().flat_map(move |own| peer.ranks().map(move |peer| (own, peer)))
    }

    fn streams(&self) -> u32 {
        1 + 2 * u32::from(self.own.ranks) * u32::from(self.peer.ranks)
    }
}

/// A process that has joined.
pub(crate) struct Joined {
    pub(crate) links: Vec<Link>,
    pub(crate) world: WorldName,
    pub(crate) roster: Roster,
    pub(crate) max_frame_bytes: u32,
    pub(crate) settings: Vec<u8>,
    /// Messages exchanged while joining: peer, whether sent, payload bytes.
    pub(crate) messages: Vec<(Rank, bool, usize)>,
}

/// Somebody with a trusted certificate who has said hello.
pub(crate) struct Guest {
    pub(crate) id: u64,
    pub(crate) connection: Connection,
    pub(crate) control: Duplex,
    pub(crate) hello: Hello,
    pub(crate) bytes: usize,
}

/// What the reception reports.
pub(crate) enum Arrival {
    Guest(Box<Guest>),
    Gone(u64),
    Failed(String),
}

/// Joins as rank 0 or as another rank.
pub(crate) async fn join(core: Arc<Core>, life: Life) -> Result<Joined, TransportError> {
    let options = Arc::clone(&core.options);
    let result = if options.rank == Rank(0) {
        super::lobby::lead(&core, &life).await
    } else {
        super::mesh::follow(&core, &life).await
    };
    let result = result.and_then(|joined| check_private(&joined, &options).map(|()| joined));
    if let Err(error) = &result {
        core.bound.endpoint.close(CLOSE_FAILED.into(), error.to_string().as_bytes());
        let _ = timeout(Duration::from_millis(200), core.bound.endpoint.wait_idle()).await;
    }
    result
}

/// Starts taking connections; what comes of them is sent to the receiver.
pub(crate) fn receive(bound: &Bound, options: Arc<JoinOptions>) -> mpsc::Receiver<Arrival> {
    let (endpoint, servers) = (bound.endpoint.clone(), bound.servers());
    let (arrivals, receiver) = mpsc::channel(options.world_size + GREETINGS);
    tokio::spawn(async move {
        let greetings = Arc::new(Semaphore::new(GREETINGS));
        let mut id = 0;
        while let Some(incoming) = endpoint.accept().await {
            let Ok(permit) = Arc::clone(&greetings).try_acquire_owned() else {
                incoming.refuse();
                continue;
            };
            id += 1;
            let (options, arrivals, servers) = (Arc::clone(&options), arrivals.clone(), servers.clone());
            tokio::spawn(async move {
                let from = incoming.remote_address();
                let connecting = incoming.accept_with(servers.of(&from));
                let guest = timeout(options.quic.hello_timeout, greet(connecting, &options, id)).await;
                let arrival = match guest {
                    Ok(Ok(guest)) => Arrival::Guest(Box::new(guest)),
                    Ok(Err(what)) => Arrival::Failed(format!("{from}: {what}")),
                    Err(_) => Arrival::Failed(format!("{from}: connected but said no hello")),
                };
                drop(permit);
                // Nobody listens any more once the group is complete.
                let _ = arrivals.send(arrival).await;
            });
        }
    });
    receiver
}

async fn greet(
    connecting: Result<quinn::Connecting, ConnectionError>,
    options: &JoinOptions,
    id: u64,
) -> Result<Guest, String> {
    let connected = async { connecting?.await }.await;
    let connection = connected.map_err(|error| format!("handshake failed: {error}"))?;
    let said = hear(&connection).await;
    let (mut control, hello, bytes) = match said {
        Ok(said) => said,
        Err(error) => {
            let what = describe(&error);
            wire::close(&connection, wire::CLOSE_PROTOCOL, &what);
            return Err(what);
        }
    };
    let trusted =
        certificate(&connection).is_some_and(|cert| options.identity.trust().is_rank(&cert, hello.rank));
    if !trusted {
        let refusal = Refusal::CertificateRank { rank: hello.rank };
        let what = format!("refused rank {}: {refusal}", hello.rank);
        refuse(&connection, &mut control, options.rank, refusal).await;
        return Err(what);
    }
    Ok(Guest { id, connection, control, hello, bytes })
}

async fn hear(connection: &Connection) -> Result<(Duplex, Hello, usize), WireError> {
    let (preface, mut control) = wire::accept(connection).await?;
    let (source, message, bytes) = wire::read_message(&mut control.1, HELLO_CAP).await?;
    match message {
        Message::Hello(hello) if preface == Preface::CONTROL && hello.rank == source => {
            Ok((control, hello, bytes))
        }
        _ => Err(Violation::Malformed { message: "hello" }.into()),
    }
}

fn certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().cloned()
}

/// Tells a guest why it is not let in, and ends its connection once it has heard it.
pub(crate) async fn refuse(connection: &Connection, control: &mut Duplex, own: Rank, refusal: Refusal) {
    let reason = refusal.to_string();
    if wire::write_message(&mut control.0, own, &Message::Refuse(refusal)).await.is_ok() {
        // Fails only where the stream is gone already.
        let _ = control.0.finish();
        let _ = timeout(Duration::from_secs(1), control.0.stopped()).await;
    }
    wire::close(connection, CLOSE_REFUSED, &reason);
}

/// Accepts the rows and bulk streams of a guest that has been let in: those of each pair of ranks, once.
pub(crate) async fn accept_link(
    peer: Rank,
    connection: Connection,
    control: Duplex,
    ends: Ends,
) -> Result<Link, WireError> {
    ends.make_room(&connection);
    connection.set_max_concurrent_bi_streams(ends.streams().into());
    let mut expected: BTreeMap<(Rank, Rank), [Option<Duplex>; 2]> =
        ends.pairs().map(|pair| (pair, [None, None])).collect();
    for _ in 1..ends.streams() {
        let (preface, stream) = wire::accept(&connection).await?;
        let place = match preface.kind {
            StreamKind::Rows => 0,
            StreamKind::Bulk => 1,
            StreamKind::Control => return Err(Violation::BadPreface.into()),
        };
        let pair = expected.get_mut(&(preface.acceptor, preface.dialler)).ok_or(Violation::BadPreface)?;
        if pair[place].replace(stream).is_some() {
            return Err(Violation::BadPreface.into());
        }
    }
    let pairs = expected.into_iter().map(|((own, peer), streams)| match streams {
        [Some(rows), Some(bulk)] => Ok(Pair { own, peer, rows, bulk }),
        _ => Err(Violation::BadPreface.into()),
    });
    let pairs = pairs.collect::<Result<_, WireError>>()?;
    Ok(Link { peer, connection, control, pairs })
}

/// Opens the rows and bulk streams towards a peer that has let us in.
pub(crate) async fn open_link(
    peer: Rank,
    connection: Connection,
    control: Duplex,
    ends: Ends,
) -> Result<Link, WireError> {
    ends.make_room(&connection);
    let mut pairs = Vec::new();
    for (own, peer) in ends.pairs() {
        let preface = |kind| Preface { kind, dialler: own, acceptor: peer };
        let rows = wire::open(&connection, preface(StreamKind::Rows)).await?;
        let bulk = wire::open(&connection, preface(StreamKind::Bulk)).await?;
        pairs.push(Pair { own, peer, rows, bulk });
    }
    Ok(Link { peer, connection, control, pairs })
}

/// What a failed exchange with a peer means for this rank.
pub(crate) fn explain(options: &JoinOptions, peer: Rank, error: &WireError) -> TransportError {
    let rank = options.rank;
    match error {
        WireError::Violation(violation) => {
            TransportError::Protocol { rank, peer, round: None, violation: violation.clone() }
        }
        WireError::Connection(error) => match verdict(error) {
            Verdict::Untrusted(cause) => TransportError::Untrusted { rank, peer, cause },
            Verdict::Refused(refusal) => TransportError::Refused { rank, peer, refusal },
            Verdict::Other => {
                let cause = loss_cause(error, options.quic.idle_timeout);
                TransportError::PeerLost { rank, peer, round: None, cause }
            }
        },
    }
}

/// Why a connection that worked is gone.
pub(crate) fn loss_cause(error: &ConnectionError, idle: Duration) -> LossCause {
    match error {
        ConnectionError::TimedOut => LossCause::Silent { after: idle },
        ConnectionError::Reset => LossCause::Restarted,
        ConnectionError::ApplicationClosed(close) => {
            let reason: String = String::from_utf8_lossy(&close.reason)
                .chars()
                .filter(|c| !c.is_control())
                .take(400)
                .collect();
            if close.error_code == CLOSE_LEFT.into() {
                LossCause::Left
            } else {
                LossCause::ClosedByPeer { reason }
            }
        }
        other => LossCause::Other { what: other.to_string() },
    }
}

fn describe(error: &WireError) -> String {
    match error {
        WireError::Connection(error) => error.to_string(),
        WireError::Violation(violation) => violation.to_string(),
    }
}

/// Keeps the last few of what went wrong, for the error that may follow.
#[derive(Default)]
pub(crate) struct Notes(Vec<String>);

impl Notes {
    pub(crate) fn add(&mut self, options: &JoinOptions, what: String) {
        options.tell(&JoinEvent::Failed { what: what.clone() });
        if self.0.last() != Some(&what) && self.0.len() < 4 {
            self.0.push(what);
        }
    }

    pub(crate) fn timeout(self, options: &JoinOptions, missing: Vec<Rank>, began: Instant) -> TransportError {
        let (rank, waited) = (options.rank, began.elapsed());
        TransportError::JoinTimeout { rank, missing, waited, notes: self.0 }
    }
}

/// A bounded window ignores what others on the path need, so it is only for paths that are the cluster's own.
fn check_private(joined: &Joined, options: &JoinOptions) -> Result<(), TransportError> {
    if !matches!(options.quic.congestion, Congestion::Bounded { .. }) {
        return Ok(());
    }
    let public = joined.links.iter().map(|link| link.connection.remote_address()).find(|at| !is_private(at));
    public.map_or(Ok(()), |address| {
        Err(TransportError::Options {
            what: format!("a bounded congestion window towards {address}, which is not a private address"),
            remedy: "use Congestion::Cubic outside private networks".into(),
        })
    })
}
