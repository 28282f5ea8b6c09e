//! The blocking face of the QUIC driver.

use super::Core;
use super::hub::{Hub, Senders};
use super::join::Joined;
use super::links::{LinkSender, Outgoing};
use crate::inbox::Inbox;
use crate::proto::frame::{FrameHeader, MESSAGE};
use crate::proto::membership::{Member, Roster, WorldName};
use crate::{Arrivals, ByteClass, Communicator, Message, RoundId, TransportError, WireStats};
use bytes::Bytes;
use exflow_placement::Rank;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// What a link is like, as measured by its connection.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LinkReport {
    /// The first rank of the process at the other end.
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

/// One rank of a world that talks over QUIC, and through memory with the other ranks of its process.
///
/// Dropping the last one of a process ends its connections: what was handed over is delivered first (see
/// [`QuicOptions::linger`](super::QuicOptions::linger)), unless a peer has failed, then the others learn of it at once and are told why.
#[derive(Debug)]
pub struct QuicCommunicator {
    rank: Rank,
    inbox: Arc<Inbox>,
    bulk_numbers: Vec<u64>,
    /// By rank.
    ways: Vec<Way>,
    /// Of the exchange that is being started.
    outgoing: Vec<(Rank, Bytes)>,
    hub: Arc<Hub>,
}

/// How to reach a rank.
#[derive(Debug)]
pub(super) enum Way {
    /// This rank itself, and absent ones.
    None,
    /// A rank of this process.
    Here(Arc<Inbox>),
    Link(LinkSender),
}

impl QuicCommunicator {
    /// The ranks of a process that has joined, in order.
    pub(super) fn all(joined: Joined, core: Arc<Core>) -> Vec<Self> {
        let process = core.options.rank.index();
        let (hub, mut senders) = Hub::start(joined, core);
        let ranks: Vec<Rank> =
            hub.roster.members().get(process).into_iter().flat_map(Member::ranks).collect();
        ranks.into_iter().map(|rank| Self::new(rank, &hub, &mut senders)).collect()
    }

    fn new(rank: Rank, hub: &Arc<Hub>, senders: &mut Senders) -> Self {
        let inbox_of =
            |rank: Rank| rank.index().checked_sub(hub.first.index()).and_then(|at| hub.inboxes.get(at));
        let way = |to: Rank| match (inbox_of(to), senders.remove(&(rank, to))) {
            (Some(inbox), _) if to != rank => Way::Here(Arc::clone(inbox)),
            (None, Some(sender)) => Way::Link(sender),
            _ => Way::None,
        };
        let world_size = hub.roster.world_size();
        let ways = (0..world_size).map(Rank::from).map(way).collect();
        let inbox = Arc::clone(&hub.inboxes[rank.index() - hub.first.index()]);
        let outgoing = Vec::with_capacity(world_size);
        Self { rank, inbox, bulk_numbers: vec![0; world_size], ways, outgoing, hub: Arc::clone(hub) }
    }

    /// Which world this is, and which life of it.
    pub fn world(&self) -> WorldName {
        self.hub.world
    }

    /// What rank 0 gave every rank to know ([`JoinOptions::settings`](super::JoinOptions::settings)).
    pub fn settings(&self) -> &[u8] {
        &self.hub.settings
    }

    /// UDP address of this rank's process.
    pub fn local_address(&self) -> SocketAddr {
        self.hub.core.bound.address
    }

    /// Every process of the world, absent ones included.
    pub fn roster(&self) -> &Roster {
        &self.hub.roster
    }

    /// What each connection of this process is like now, by the first rank of the peer's process.
    pub fn links(&self) -> Vec<LinkReport> {
        self.hub.links()
    }

    /// Ranks of which nothing was heard for a second, as far as this process knows or rank 0 tells.
    pub fn suspects(&self) -> Vec<Rank> {
        self.hub.core.suspects.ranks()
    }

    /// Background bytes that still wait for their turn towards `to`.
    pub fn unsent_bulk(&self, to: Rank) -> usize {
        self.inbox.unsent_bulk(to)
    }

    /// Has the driver's thread drive while this rank waits elsewhere. One that only looks leaves the driving as it is: between
    /// two exchanges it would cost the next one two changes of thread.
    fn wake_to_wait(&self, timeout: Duration) {
        if !timeout.is_zero() {
            self.hub.core.runtime.wake();
        }
    }

    fn header(&self, round: RoundId) -> FrameHeader {
        FrameHeader {
            class: round.class,
            layer: round.layer,
            world: self.hub.world.id,
            epoch: self.hub.world.epoch,
            source: self.rank,
            number: round.number,
            length: 0,
        }
    }

    /// Starts a round and gives its frames to the writers of the links.
    fn hand_over(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<(), TransportError> {
        self.inbox.start(round, send, &mut self.outgoing)?;
        let header = self.header(round);
        for (to, payload) in self.outgoing.drain(..) {
            match &self.ways[to.index()] {
                Way::Here(inbox) => inbox.take_here(self.rank, round, payload),
                Way::Link(sender) => put(&sender.rows, header, payload),
                Way::None => {}
            }
        }
        Ok(())
    }
}

/// Hands a frame to a writer. One that has ended has lost its connection, which its reader reports.
fn put(queue: &mpsc::UnboundedSender<Outgoing>, header: FrameHeader, payload: Bytes) {
    let _ = queue.send((FrameHeader { length: payload.len() as u32, ..header }, payload));
}

impl Communicator for QuicCommunicator {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.ways.len()
    }

    fn absent(&self) -> &[Rank] {
        &self.hub.absent
    }

    fn exchange(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<Vec<Bytes>, TransportError> {
        if self.hub.core.runtime.is_free() {
            let runtime = Arc::clone(&self.hub.core.runtime);
            return runtime.drive(async {
                self.hand_over(round, send)?;
                self.inbox.finish_here(round).await
            });
        }
        self.hand_over(round, send)?;
        let result = self.inbox.finish(round);
        self.hub.core.runtime.reserve();
        result
    }

    fn start_exchange(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<(), TransportError> {
        self.hand_over(round, send)?;
        self.hub.core.runtime.wake();
        Ok(())
    }

    fn finish_exchange(&mut self, round: RoundId) -> Result<Vec<Bytes>, TransportError> {
        self.inbox.finish(round)
    }

    fn arrivals(&mut self, round: RoundId, wait: bool) -> Result<Arrivals, TransportError> {
        self.inbox.arrivals(round, wait)
    }

    fn send_bulk(&mut self, to: Rank, payload: Bytes) -> Result<(), TransportError> {
        self.inbox.reserve_bulk(to, payload.len())?;
        let number = self.bulk_numbers[to.index()];
        self.bulk_numbers[to.index()] += 1;
        match &self.ways[to.index()] {
            Way::Here(inbox) => {
                self.inbox.bulk_sent(to, payload.len());
                inbox.deliver_bulk(self.rank, payload);
            }
            Way::Link(sender) => {
                let header = self.header(RoundId { number, class: ByteClass::Kv, layer: u16::MAX });
                put(&sender.bulk, header, payload);
            }
            Way::None => self.inbox.bulk_sent(to, payload.len()),
        }
        self.hub.core.runtime.wake();
        Ok(())
    }

    fn recv_bulk(&mut self, timeout: Duration) -> Result<Option<(Rank, Bytes)>, TransportError> {
        self.wake_to_wait(timeout);
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
        match &self.ways[to.index()] {
            Way::Here(inbox) => inbox.deliver_message(self.rank, class, layer, payload),
            Way::Link(sender) => {
                self.inbox.queue_message(to, payload.len())?;
                put(&sender.rows, self.header(RoundId { number, class, layer }), payload);
            }
            Way::None => {}
        }
        self.hub.core.runtime.wake();
        Ok(())
    }

    fn recv_message(&mut self, timeout: Duration) -> Result<Option<Message>, TransportError> {
        self.wake_to_wait(timeout);
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
        // Dropped ways end their streams when their writers have sent all, which says that it left in order.
        self.hub.left(self.rank, reason, std::mem::take(&mut self.ways));
    }
}
