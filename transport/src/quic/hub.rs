//! What the ranks of one process share in one life of their world: the connections, and how these end.

use super::Core;
use super::communicator::{LinkReport, Way};
use super::door::Watch;
use super::heart::Heart;
use super::join::Joined;
use super::links::{self, LinkContext, LinkSender};
use super::wire::{CLOSE_FAILED, CLOSE_LEFT};
use crate::LossCause;
use crate::inbox::Inbox;
use crate::proto::membership::{Member, Roster, WorldName};
use exflow_placement::Rank;
use quinn::{Connection, Endpoint};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc as blocking};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

/// How long a closing endpoint waits for its peers' connections to drain.
const CLOSING: Duration = Duration::from_millis(200);
/// A closing process whose last frames go on flowing waits for so many times [`QuicOptions::linger`](super::QuicOptions) at most.
const LONGEST_DRAIN: u32 = 10;

/// By a rank of this process and one of another.
pub(super) type Senders = BTreeMap<(Rank, Rank), LinkSender>;

/// Ends with the last rank of this process that holds it: then the connections are closed.
#[derive(Debug)]
pub(super) struct Hub {
    pub(super) world: WorldName,
    pub(super) roster: Roster,
    pub(super) absent: Vec<Rank>,
    pub(super) settings: Vec<u8>,
    /// Of this process's ranks, in order.
    pub(super) inboxes: Vec<Arc<Inbox>>,
    /// First rank of this process.
    pub(super) first: Rank,
    connections: Vec<(Rank, Connection)>,
    /// Closes the connections; with a reason: at once, else when the writers have sent all.
    close: Mutex<Option<oneshot::Sender<Option<String>>>>,
    closed: Mutex<blocking::Receiver<()>>,
    close_within: Duration,
    /// Of ranks that failed.
    kept: Mutex<Vec<Way>>,
    /// What runs while the world lives: the doorman and the heartbeats.
    tasks: [AbortHandle; 2],
    /// Lives until the connections are closed.
    pub(super) core: Arc<Core>,
}

impl Hub {
    /// Sets the links of a process that has joined going.
    pub(super) fn start(joined: Joined, core: Arc<Core>) -> (Arc<Self>, Senders) {
        let Joined { links, world, roster, max_frame_bytes, settings, messages } = joined;
        let options = &core.options.quic;
        let own = roster.members()[core.options.rank.index()];
        let absent = roster.absent();
        let inboxes = inboxes(&own, &roster, &core, max_frame_bytes);
        let first_of = |process: Rank| roster.members()[process.index()].first;
        messages
            .into_iter()
            .for_each(|(peer, sent, bytes)| inboxes[0].count_control(first_of(peer), sent, bytes));
        let connections: Vec<_> =
            links.iter().map(|link| (first_of(link.peer), link.connection.clone())).collect();
        let heart = Arc::new(Heart::new(&roster, &core.options, &core.suspects));
        let context = LinkContext {
            inboxes: inboxes.clone().into(),
            first: own.first,
            world,
            max_frame_bytes,
            idle_timeout: options.idle_timeout,
            heart: Arc::clone(&heart),
            background: core.bound.background.clone(),
        };
        let watch = Watch {
            options: Arc::clone(&core.options),
            world,
            roster: roster.clone(),
            lose: lose_process(&inboxes, &roster),
        };
        let (mut writers, mut senders) = (JoinSet::new(), Senders::new());
        let tasks = {
            let _within = core.runtime.handle().enter();
            for link in links {
                let speaker = first_of(link.peer);
                senders.extend(links::start(link, speaker, &context, &mut writers));
            }
            let doorman = tokio::spawn(Arc::clone(&core.door).keep(watch));
            [doorman.abort_handle(), tokio::spawn(heart.run()).abort_handle()]
        };
        let (close, reason) = oneshot::channel();
        let linger = options.linger;
        let closer = Closer {
            writers,
            connections: connections.clone(),
            endpoint: core.bound.endpoint.clone(),
            linger,
        };
        let closed = core.runtime.launch(async move {
            if let Ok(reason) = reason.await {
                closer.run(reason).await;
            }
        });
        let hub = Self {
            world,
            roster,
            absent,
            settings,
            inboxes,
            first: own.first,
            connections,
            close: Mutex::new(Some(close)),
            closed: Mutex::new(closed),
            close_within: LONGEST_DRAIN * linger + 5 * CLOSING,
            kept: Mutex::default(),
            tasks,
            core,
        };
        (Arc::new(hub), senders)
    }

    /// What each connection is like now, by the first rank of the peer's process.
    pub(super) fn links(&self) -> Vec<LinkReport> {
        let mut reports: Vec<_> =
            self.connections.iter().map(|(peer, connection)| report(*peer, connection)).collect();
        reports.sort_by_key(|report| report.peer);
        reports
    }

    /// A rank of this process has ended, in order or for a reason: the process's other ranks learn of it and, where it
    /// failed, so does everybody else, at once.
    ///
    /// The ways of a rank that failed are kept until the connections are closed: dropped before, they would say that it
    /// left in order.
    pub(super) fn left(&self, rank: Rank, reason: Option<String>, ways: Vec<Way>) {
        let cause = match &reason {
            None => LossCause::Left,
            Some(reason) => LossCause::ClosedByPeer { reason: reason.clone() },
        };
        let others = || {
            let inboxes = self.inboxes.iter().enumerate();
            inboxes.filter(|(at, _)| self.first.index() + at != rank.index()).map(|(_, inbox)| inbox)
        };
        others().for_each(|inbox| inbox.lose_peer(rank, cause.clone()));
        if let Some(reason) = &reason {
            // What they wait for from other processes will not come either, and this is why.
            let what = format!("rank {rank} of this process ended the connection: {reason}");
            for peer in self.roster.members().iter().flat_map(Member::ranks) {
                others().for_each(|inbox| inbox.lose_peer(peer, LossCause::Other { what: what.clone() }));
            }
        }
        if reason.is_some() {
            self.kept.lock().unwrap_or_else(PoisonError::into_inner).extend(ways);
            self.close(reason);
        }
    }

    fn close(&self, reason: Option<String>) {
        let close = self.close.lock().unwrap_or_else(PoisonError::into_inner).take();
        if close.is_some_and(|close| close.send(reason).is_ok()) {
            self.core.runtime.wake();
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        self.core.suspects.clear();
        self.close(None);
        let closed = self.closed.get_mut().unwrap_or_else(PoisonError::into_inner);
        // If the driver does not answer in time, the process may end without a word to the peers.
        let _ = closed.recv_timeout(self.close_within);
    }
}

fn inboxes(own: &Member, roster: &Roster, core: &Core, max_frame_bytes: u32) -> Vec<Arc<Inbox>> {
    let limits = core.options.quic.inbox_limits(max_frame_bytes);
    let make = |rank: Rank| {
        let inbox = Inbox::new(rank, roster.world_size(), limits);
        inbox.set_absent(&roster.absent());
        inbox.set_here(own.ranks());
        Arc::new(inbox)
    };
    own.ranks().map(make).collect()
}

/// What the doorman says of a process is true of each of its ranks.
fn lose_process(inboxes: &[Arc<Inbox>], roster: &Roster) -> super::door::Lose {
    let (inboxes, roster) = (inboxes.to_vec(), roster.clone());
    Box::new(move |process, cause| {
        for rank in roster.members().get(process).into_iter().flat_map(Member::ranks) {
            inboxes.iter().for_each(|inbox| inbox.lose_peer(rank, cause.clone()));
        }
    })
}

fn report(peer: Rank, connection: &Connection) -> LinkReport {
    let stats = connection.stats();
    LinkReport {
        peer,
        address: connection.remote_address(),
        rtt_us: stats.path.rtt.as_micros() as u64,
        udp_payload_bytes: stats.path.current_mtu,
        udp_bytes_sent: stats.udp_tx.bytes,
        udp_bytes_received: stats.udp_rx.bytes,
        lost_packets: stats.path.lost_packets,
        window_bytes: super::congestion::window_of(connection.congestion_state()),
    }
}

/// Ends the connections of a process.
struct Closer {
    /// They finish their streams, which says that a rank left in order, when its senders are dropped.
    writers: JoinSet<()>,
    connections: Vec<(Rank, Connection)>,
    endpoint: Endpoint,
    linger: Duration,
}

impl Closer {
    async fn run(mut self, reason: Option<String>) {
        let connections: Vec<_> = self.connections.into_iter().map(|(_, connection)| connection).collect();
        let (code, words) = match reason {
            Some(reason) => (CLOSE_FAILED, reason),
            None => {
                drain(&mut self.writers, &connections, self.linger).await;
                (CLOSE_LEFT, String::new())
            }
        };
        connections.iter().for_each(|connection| super::wire::close(connection, code, &words));
        // The endpoint lives on: for the next life of the world, and for those who wait at its door.
        let _ = timeout(CLOSING, self.endpoint.wait_idle()).await;
    }
}

/// Waits until the peers have acknowledged everything; gives up when `linger` passes and nothing more could be sent,
/// and in any case after [`LONGEST_DRAIN`] times that.
async fn drain(writers: &mut JoinSet<()>, connections: &[Connection], linger: Duration) {
    let sent = || connections.iter().map(|connection| connection.stats().frame_tx.stream).sum::<u64>();
    for _ in 0..LONGEST_DRAIN {
        let before = sent();
        let drained = async { while writers.join_next().await.is_some() {} };
        if timeout(linger, drained).await.is_ok() || sent() == before {
            return;
        }
    }
}
