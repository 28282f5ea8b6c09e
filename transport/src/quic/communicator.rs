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
use tokio::sync::mpsc;
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
    commands: mpsc::UnboundedSender<Command>,
    closed: blocking::Receiver<()>,
    close_within: Duration,
    /// Keeps the door while the world runs.
    doorman: AbortHandle,
    /// Lives until the connections are closed.
    core: Arc<Core>,
}

enum Command {
    Round(FrameHeader, Vec<(Rank, Bytes)>),
    Bulk(Rank, FrameHeader, Bytes),
    Message(Rank, FrameHeader, Bytes),
    /// Close; with a reason: at once.
    Close(Option<String>),
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
        let connections = links.iter().map(|link| (link.peer, link.connection.clone())).collect();
        let context = LinkContext {
            inbox: Arc::clone(&inbox),
            world,
            max_frame_bytes,
            idle_timeout: options.idle_timeout,
        };
        let (commands, queue) = mpsc::unbounded_channel();
        let linger = options.linger;
        let endpoint = core.bound.endpoint.clone();
        let watch = Watch {
            options: Arc::clone(&core.options),
            world,
            roster: roster.clone(),
            lose: lose_process(&inbox, &roster),
        };
        let doorman = core.runtime.handle().spawn(Arc::clone(&core.door).keep(watch)).abort_handle();
        let closed = core.runtime.launch(async move {
            let mut writers = JoinSet::new();
            let mut senders: Vec<Option<LinkSender>> = (0..world_size).map(|_| None).collect();
            for link in links {
                let peer = link.peer;
                senders[peer.index()] = Some(links::start(link, &context, &mut writers));
            }
            Pump { senders, writers, endpoint, linger }.run(queue).await;
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
            commands,
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

    fn command(&self, command: Command) -> Result<(), TransportError> {
        self.commands.send(command).map_err(|_| TransportError::Closed { rank: self.rank })
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

    fn exchange(&mut self, round: RoundId, send: Vec<Vec<u8>>) -> Result<Vec<Bytes>, TransportError> {
        self.start_exchange(round, send)?;
        self.finish_exchange(round)
    }

    fn start_exchange(&mut self, round: RoundId, send: Vec<Vec<u8>>) -> Result<(), TransportError> {
        let mut outgoing = self.inbox.start(round, send)?;
        // Each rank begins with its successor, so that not all send to the same rank first.
        let successor = self.rank.index().min(outgoing.len());
        outgoing.rotate_left(successor);
        self.command(Command::Round(self.header(round), outgoing))
    }

    fn finish_exchange(&mut self, round: RoundId) -> Result<Vec<Bytes>, TransportError> {
        self.inbox.finish(round)
    }

    fn send_bulk(&mut self, to: Rank, payload: Vec<u8>) -> Result<(), TransportError> {
        self.inbox.reserve_bulk(to, payload.len())?;
        let number = self.bulk_numbers[to.index()];
        self.bulk_numbers[to.index()] += 1;
        let header = self.header(RoundId { number, class: ByteClass::Kv, layer: u16::MAX });
        self.command(Command::Bulk(to, header, payload.into()))
    }

    fn recv_bulk(&mut self, timeout: Duration) -> Result<Option<(Rank, Bytes)>, TransportError> {
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
        self.command(Command::Message(to, header, payload))
    }

    fn recv_message(&mut self, timeout: Duration) -> Result<Option<Message>, TransportError> {
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
        if self.command(Command::Close(reason)).is_ok() {
            // If the driver does not answer in time, the process may end without a word to the peers.
            let _ = self.closed.recv_timeout(self.close_within);
        }
    }
}

/// Hands the frames of the rank's thread to the writers of the links.
struct Pump {
    senders: Vec<Option<LinkSender>>,
    writers: JoinSet<()>,
    endpoint: Endpoint,
    linger: Duration,
}

impl Pump {
    async fn run(self, mut queue: mpsc::UnboundedReceiver<Command>) {
        let reason = loop {
            match queue.recv().await {
                Some(Command::Round(header, outgoing)) => {
                    for (to, payload) in outgoing {
                        self.send(to, header, payload, |sender| &sender.rows);
                    }
                }
                Some(Command::Bulk(to, header, payload)) => {
                    self.send(to, header, payload, |sender| &sender.bulk)
                }
                Some(Command::Message(to, header, payload)) => {
                    self.send(to, header, payload, |sender| &sender.rows);
                }
                Some(Command::Close(reason)) => break reason,
                None => break None,
            }
        };
        self.close(reason).await;
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

    async fn close(mut self, reason: Option<String>) {
        let connections: Vec<_> =
            self.senders.into_iter().flatten().map(|sender| sender.connection).collect();
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
