//! The blocking face of the QUIC driver.

use super::Core;
use super::door::Watch;
use super::join::{Joined, Link};
use super::links::{self, LinkContext, LinkSender, Outgoing};
use super::wire::{CLOSE_FAILED, CLOSE_LEFT};
use crate::inbox::Inbox;
use crate::proto::frame::{FrameHeader, MESSAGE};
use crate::proto::membership::{Member, Roster, WorldName};
use crate::{ByteClass, Communicator, Message, RoundId, TransportError, WireStats};
use bytes::Bytes;
use exflow_placement::Rank;
use quinn::{Connection, Endpoint};
use std::net::SocketAddr;
use std::sync::{Arc, mpsc as blocking};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

/// How long a closing endpoint waits for its peers' connections to drain.
const CLOSING: Duration = Duration::from_millis(200);
/// A closing rank whose last frames go on flowing waits for so many times [`QuicOptions::linger`] at most.
const LONGEST_DRAIN: u32 = 10;

/// What a link is like, as measured by its connection.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LinkReport {
    /// The rank at the other end.
    pub peer: Rank,
    /// Its UDP address.
    pub address: SocketAddr,
    /// Smoothed round trip, microseconds.
    pub rtt_us: u64,
    /// UDP payload in use, bytes.
    pub udp_payload_bytes: u16,
    /// UDP payload bytes sent, all overheads included.
    pub udp_bytes_sent: u64,
    /// UDP payload bytes received.
    pub udp_bytes_received: u64,
    /// Packets sent again because they were taken for lost.
    pub lost_packets: u64,
    /// Bytes that may be in flight.
    pub window_bytes: u64,
}

/// One rank of a world that talks over QUIC.
///
/// Dropping it ends its connections: what was handed over is delivered first (see
/// [`QuicOptions::linger`]), unless a peer has failed, then the others learn of it at once and are told why.
#[derive(Debug)]
pub struct QuicCommunicator {
    rank: Rank,
    world: WorldName,
    roster: Roster,
    absent: Vec<Rank>,
    settings: Vec<u8>,
    connections: Vec<(Rank, Connection)>,
    inbox: Arc<Inbox>,
    bulk_numbers: Vec<u64>,
    /// By rank; this rank and absent ones have none.
    senders: Vec<Option<LinkSender>>,
    /// Closes the connections; with a reason: at once, else when the writers have sent all.
    close: Option<oneshot::Sender<Farewell>>,
    closed: blocking::Receiver<()>,
    close_within: Duration,
    /// Keeps the door while the world runs.
    doorman: AbortHandle,
    /// Lives until the connections are closed.
    core: Arc<Core>,
}

impl QuicCommunicator {
    pub(crate) fn new(joined: Joined, core: Arc<Core>) -> Self {
        let Joined { links, world, roster, max_frame_bytes, settings, messages } = joined;
        let options = &core.options.quic;
        let rank = roster.members()[core.options.rank.index()].first;
        let (world_size, absent) = (roster.world_size(), roster.absent());
        let inbox = Arc::new(Inbox::new(rank, world_size, options.inbox_limits(max_frame_bytes)));
        inbox.set_absent(&absent);
        let first_of = |process: Rank| roster.members()[process.index()].first;
        messages.into_iter().for_each(|(peer, sent, bytes)| inbox.count_control(first_of(peer), sent, bytes));
        let links: Vec<_> =
            links.into_iter().map(|link| Link { peer: first_of(link.peer), ..link }).collect();
        let connections: Vec<_> = links.iter().map(|link| (link.peer, link.connection.clone())).collect();
        let context = LinkContext {
            inbox: Arc::clone(&inbox),
            world,
            max_frame_bytes,
            idle_timeout: options.idle_timeout,
        };
        let linger = options.linger;
        let endpoint = core.bound.endpoint.clone();
        let watch = Watch {
            options: Arc::clone(&core.options),
            world,
            roster: roster.clone(),
            lose: lose_process(&inbox, &roster),
        };
        let doorman = core.runtime.handle().spawn(Arc::clone(&core.door).keep(watch)).abort_handle();
        let mut writers = JoinSet::new();
        let mut senders: Vec<Option<LinkSender>> = (0..world_size).map(|_| None).collect();
        {
            let _within = core.runtime.handle().enter();
            for link in links {
                let peer = link.peer;
                senders[peer.index()] = Some(links::start(link, &context, &mut writers));
            }
        }
        let (close, reason) = oneshot::channel();
        let closer = Closer { writers, connections: connections.clone(), endpoint, linger };
        let closed = core.runtime.launch(async move {
            if let Ok(farewell) = reason.await {
                closer.run(farewell).await;
            }
        });
        Self {
            rank,
            world,
            roster,
            absent,
            settings,
            connections,
            inbox,
            bulk_numbers: vec![0; world_size],
            senders,
            close: Some(close),
            closed,
            close_within: LONGEST_DRAIN * linger + 5 * CLOSING,
            doorman,
            core,
        }
    }

    /// Which world this is, and which life of it.
    pub fn world(&self) -> WorldName {
        self.world
    }

    /// What rank 0 gave every rank to know ([`JoinOptions::settings`](super::JoinOptions::settings)).
    pub fn settings(&self) -> &[u8] {
        &self.settings
    }

    /// UDP address of this rank.
    pub fn local_address(&self) -> SocketAddr {
        self.core.bound.address
    }

    /// Every process of the world, absent ones included.
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// What each link is like now, by rank of the peer.
    pub fn links(&self) -> Vec<LinkReport> {
        let mut reports: Vec<_> =
            self.connections.iter().map(|(peer, connection)| report(*peer, connection)).collect();
        reports.sort_by_key(|report| report.peer);
        reports
    }

    /// Background bytes that still wait for their turn towards `to`.
    pub fn unsent_bulk(&self, to: Rank) -> usize {
        self.inbox.unsent_bulk(to)
    }

    fn header(&self, round: RoundId) -> FrameHeader {
        FrameHeader {
            class: round.class,
            layer: round.layer,
            world: self.world.id,
            epoch: self.world.epoch,
            source: self.rank,
            number: round.number,
            length: 0,
        }
    }

    /// Starts a round and gives its frames to the writers of the links.
    fn hand_over(&self, round: RoundId, send: Vec<Bytes>) -> Result<(), TransportError> {
        let mut outgoing = self.inbox.start(round, send)?;
        // Each rank begins with its successor, so that not all send to the same rank first.
        let successor = self.rank.index().min(outgoing.len());
        outgoing.rotate_left(successor);
        let header = self.header(round);
        for (to, payload) in outgoing {
            self.send(to, header, payload, |sender| &sender.rows);
        }
        Ok(())
    }

    fn send(
        &self,
        to: Rank,
        header: FrameHeader,
        payload: Bytes,
        queue: impl Fn(&LinkSender) -> &mpsc::UnboundedSender<Outgoing>,
    ) {
        if let Some(sender) = &self.senders[to.index()] {
            let header = FrameHeader { length: payload.len() as u32, ..header };
            // A writer that has ended has lost its connection, which its reader reports.
            let _ = queue(sender).send((header, payload));
        }
    }
}

/// What the doorman says of a process is true of each of its ranks.
fn lose_process(inbox: &Arc<Inbox>, roster: &Roster) -> super::door::Lose {
    let (inbox, roster) = (Arc::clone(inbox), roster.clone());
    Box::new(move |process, cause| {
        let ranks = roster.members().get(process).into_iter().flat_map(Member::ranks);
        ranks.for_each(|rank| inbox.lose_peer(rank, cause.clone()));
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
        window_bytes: stats.path.cwnd,
    }
}

impl Communicator for QuicCommunicator {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.roster.world_size()
    }

    fn absent(&self) -> &[Rank] {
        &self.absent
    }

    fn exchange(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<Vec<Bytes>, TransportError> {
        if self.core.runtime.is_free() {
            let runtime = Arc::clone(&self.core.runtime);
            return runtime.drive(async {
                self.hand_over(round, send)?;
                self.inbox.finish_here(round).await
            });
        }
        self.hand_over(round, send)?;
        let result = self.inbox.finish(round);
        self.core.runtime.reserve();
        result
    }

    fn start_exchange(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<(), TransportError> {
        self.hand_over(round, send)?;
        self.core.runtime.wake();
        Ok(())
    }

    fn finish_exchange(&mut self, round: RoundId) -> Result<Vec<Bytes>, TransportError> {
        self.inbox.finish(round)
    }

    fn send_bulk(&mut self, to: Rank, payload: Bytes) -> Result<(), TransportError> {
        self.inbox.reserve_bulk(to, payload.len())?;
        let number = self.bulk_numbers[to.index()];
        self.bulk_numbers[to.index()] += 1;
        let header = self.header(RoundId { number, class: ByteClass::Kv, layer: u16::MAX });
        self.send(to, header, payload, |sender| &sender.bulk);
        self.core.runtime.wake();
        Ok(())
    }

    fn recv_bulk(&mut self, timeout: Duration) -> Result<Option<(Rank, Bytes)>, TransportError> {
        self.core.runtime.wake();
        self.inbox.recv_bulk(timeout)
    }

    fn send_message(
        &mut self,
        to: Rank,
        class: ByteClass,
        layer: u16,
        payload: Bytes,
    ) -> Result<(), TransportError> {
        let number = MESSAGE | self.inbox.send_message(to, class, payload.len())?;
        let header = self.header(RoundId { number, class, layer });
        self.send(to, header, payload, |sender| &sender.rows);
        self.core.runtime.wake();
        Ok(())
    }

    fn recv_message(&mut self, timeout: Duration) -> Result<Option<Message>, TransportError> {
        self.core.runtime.wake();
        self.inbox.recv_message(timeout)
    }

    fn stats(&self) -> WireStats {
        self.inbox.stats()
    }
}

impl Drop for QuicCommunicator {
    fn drop(&mut self) {
        let reason = if std::thread::panicking() {
            Some(format!("rank {} panicked", self.rank))
        } else {
            self.inbox.failure().map(|failure| failure.to_string())
        };
        self.inbox.close();
        self.doorman.abort();
        let farewell = Farewell { reason, senders: std::mem::take(&mut self.senders) };
        if let Some(close) = self.close.take()
            && close.send(farewell).is_ok()
        {
            self.core.runtime.wake();
            // If the driver does not answer in time, the process may end without a word to the peers.
            let _ = self.closed.recv_timeout(self.close_within);
        }
    }
}

/// How a communicator ends.
#[derive(Debug)]
struct Farewell {
    /// Why it failed, if it did.
    reason: Option<String>,
    /// Writers finish their streams, which says that this rank left in order, when these are dropped.
    senders: Vec<Option<LinkSender>>,
}

/// Ends the connections of a communicator.
struct Closer {
    writers: JoinSet<()>,
    connections: Vec<(Rank, Connection)>,
    endpoint: Endpoint,
    linger: Duration,
}

impl Closer {
    async fn run(mut self, farewell: Farewell) {
        let connections: Vec<_> = self.connections.into_iter().map(|(_, connection)| connection).collect();
        let Farewell { reason, senders } = farewell;
        let (code, words) = match reason {
            Some(reason) => (CLOSE_FAILED, reason),
            None => {
                drop(senders);
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
