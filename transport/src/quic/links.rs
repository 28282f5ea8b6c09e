//! The tasks of one connection: they move frames between its streams and the rank's inbox.

use super::background::Background;
use super::heart::Heart;
use super::join::{Link, Pair, loss_cause};
use super::wire::{self, CLOSE_PROTOCOL};
use crate::inbox::Inbox;
use crate::proto::frame::{Decoder, FrameHeader, HEADER_BYTES, MESSAGE};
use crate::proto::membership::{HELLO_CAP, WorldName};
use crate::proto::pulse::Beat;
use crate::proto::round::Violation;
use crate::{ByteClass, LossCause, Pool, RoundId};
use bytes::Bytes;
use exflow_placement::Rank;
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Bulk is handed to quinn in pieces of this size, so that a piece of rows never waits for more than one.
const BULK_CHUNK: usize = 64 * 1024;

/// What the tasks of a link need to know.
#[derive(Clone)]
pub(crate) struct LinkContext {
    /// Of this process's ranks, from `first` on.
    pub(crate) inboxes: Arc<[Arc<Inbox>]>,
    pub(crate) first: Rank,
    pub(crate) world: WorldName,
    pub(crate) max_frame_bytes: u32,
    pub(crate) idle_timeout: Duration,
    pub(crate) heart: Arc<Heart>,
    pub(crate) background: Background,
}

impl LinkContext {
    fn inbox(&self, own: Rank) -> &Arc<Inbox> {
        &self.inboxes[own.index() - self.first.index()]
    }
}

/// A frame on its way out.
pub(crate) type Outgoing = (FrameHeader, Bytes);

/// Where frames for a peer are handed in.
#[derive(Debug)]
pub(crate) struct LinkSender {
    pub(crate) rows: mpsc::UnboundedSender<Outgoing>,
    pub(crate) bulk: mpsc::UnboundedSender<Outgoing>,
}

/// Starts the tasks of a link to the process whose first rank is `speaker`. `writers` end, once their senders are
/// dropped, when the peer has acknowledged all.
pub(crate) fn start(
    link: Link,
    speaker: Rank,
    context: &LinkContext,
    writers: &mut JoinSet<()>,
) -> Vec<((Rank, Rank), LinkSender)> {
    let Link { peer: process, connection, control, pairs } = link;
    let fellows: Arc<[Rank]> = pairs.iter().filter(|p| p.own == context.first).map(|p| p.peer).collect();
    let reader = |recv, stream, own, peer| Reader {
        recv,
        stream,
        peer,
        fellows: Arc::clone(&fellows),
        inbox: Arc::clone(context.inbox(own)),
        connection: connection.clone(),
        context: context.clone(),
        decoder: Decoder::new(stream.longest_frame(context)),
        input: Bytes::new(),
    };
    tokio::spawn(beat(control.0, context.clone(), speaker, connection.clone()));
    tokio::spawn(reader(control.1, Stream::Control(process), context.first, speaker).run());
    let mut senders = Vec::new();
    for Pair { own, peer, rows, bulk } in pairs {
        let (rows_sender, rows_queue) = mpsc::unbounded_channel();
        let (bulk_sender, bulk_queue) = mpsc::unbounded_channel();
        let inbox = context.inbox(own);
        inbox.bulk_coming(peer, true);
        writers.spawn(write_rows(rows.0, rows_queue, Arc::clone(inbox), peer));
        writers.spawn(write_bulk(bulk.0, bulk_queue, Arc::clone(inbox), peer, context.background.clone()));
        tokio::spawn(reader(rows.1, Stream::Rows, own, peer).run());
        tokio::spawn(reader(bulk.1, Stream::Bulk, own, peer).run());
        senders.push(((own, peer), LinkSender { rows: rows_sender, bulk: bulk_sender }));
    }
    senders
}

/// Sends every heartbeat; the stream stays open for as long as the connection lives.
async fn beat(mut send: SendStream, context: LinkContext, speaker: Rank, connection: Connection) {
    let mut beats = context.heart.beats();
    let inbox = context.inbox(context.first);
    let mut number = 0;
    while beats.changed().await.is_ok() {
        let payload = beats.borrow_and_update().encode();
        let header = FrameHeader {
            class: ByteClass::Control,
            layer: u16::MAX,
            world: context.world.id,
            epoch: context.world.epoch,
            source: context.first,
            number,
            length: payload.len() as u32,
        };
        number += 1;
        inbox.count_control(speaker, true, payload.len());
        // A peer that does not read them is sent fewer, never more at once.
        if send.write_all(&[&header.encode()[..], &payload].concat()).await.is_err() {
            break;
        }
    }
    connection.closed().await;
}

async fn write_rows(
    mut send: SendStream,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    inbox: Arc<Inbox>,
    peer: Rank,
) {
    let mut heads = heads();
    while let Some((header, payload)) = queue.recv().await {
        let bytes = payload.len();
        let mut parts = [head(&mut heads, &header), payload];
        if send.write_all_chunks(&mut parts).await.is_err() {
            return; // The rows reader of the same connection reports why.
        }
        if header.number & MESSAGE != 0 {
            inbox.message_sent(peer, bytes);
        }
    }
    drain(send).await;
}

async fn write_bulk(
    mut send: SendStream,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    inbox: Arc<Inbox>,
    peer: Rank,
    background: Background,
) {
    let mut heads = heads();
    while let Some((header, mut payload)) = queue.recv().await {
        let bytes = payload.len();
        if send.write_chunk(head(&mut heads, &header)).await.is_err() {
            return;
        }
        while !payload.is_empty() {
            let piece = payload.split_to(payload.len().min(BULK_CHUNK));
            let _there = background.piece();
            if send.write_chunk(piece).await.is_err() {
                return;
            }
        }
        inbox.bulk_sent(peer, bytes);
    }
    drain(send).await;
}

/// Memory for the headers of a stream, about a hundred in a block.
fn heads() -> Pool {
    Pool::new(100 * HEADER_BYTES)
}

fn head(heads: &mut Pool, header: &FrameHeader) -> Bytes {
    let mut buffer = heads.buffer(HEADER_BYTES);
    buffer.extend_from_slice(&header.encode());
    heads.seal(buffer)
}

/// Ends the stream and waits until all of it is acknowledged.
async fn drain(mut send: SendStream) {
    if send.finish().is_ok() {
        let _ = send.stopped().await;
    }
}

enum Ended {
    Lost(ConnectionError),
    Broken(Violation),
}

impl From<Violation> for Ended {
    fn from(violation: Violation) -> Self {
        Self::Broken(violation)
    }
}

/// What a reader reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    /// Of the process with this number.
    Control(Rank),
    Rows,
    Bulk,
}

impl Stream {
    const fn name(self) -> &'static str {
        match self {
            Self::Control(_) => "control",
            Self::Rows => "rows",
            Self::Bulk => "bulk",
        }
    }

    fn longest_frame(self, context: &LinkContext) -> u32 {
        match self {
            Self::Control(_) => HELLO_CAP,
            Self::Rows | Self::Bulk => context.max_frame_bytes,
        }
    }
}

/// Reads one stream of a peer.
struct Reader {
    recv: RecvStream,
    stream: Stream,
    peer: Rank,
    /// All ranks of its process.
    fellows: Arc<[Rank]>,
    inbox: Arc<Inbox>,
    connection: Connection,
    context: LinkContext,
    decoder: Decoder,
    input: Bytes,
}

impl Reader {
    /// Reads to the end and reports how it came. Only the end of the rows stream means that a peer left: all
    /// that it had sent for rounds has then been read.
    async fn run(mut self) {
        let ended = match self.stream {
            Stream::Rows => self.read_rows().await,
            Stream::Bulk => self.read_bulk().await,
            Stream::Control(process) => self.read_control(process).await,
        };
        let (inbox, rows) = (&self.inbox, self.stream == Stream::Rows);
        if self.stream == Stream::Bulk {
            inbox.bulk_coming(self.peer, false);
        }
        match ended {
            Ok(()) if rows => inbox.lose_peer(self.peer, LossCause::Left),
            Ok(()) => {}
            Err(Ended::Broken(violation)) => {
                self.break_process(&violation);
                wire::close(&self.connection, CLOSE_PROTOCOL, &violation.to_string());
            }
            Err(Ended::Lost(error)) if rows => {
                inbox.lose_peer(self.peer, loss_cause(&error, self.context.idle_timeout));
            }
            Err(Ended::Lost(_)) => {}
        }
    }

    /// What one stream breaks is the whole process's fault: the connection ends for all its ranks, and all ranks here
    /// know why before their own readers see that it has ended.
    fn break_process(&self, violation: &Violation) {
        let what = format!("rank {} of its process broke the protocol: {violation}", self.peer);
        for inbox in self.context.inboxes.iter() {
            inbox.break_peer(self.peer, violation.clone());
            for fellow in self.fellows.iter() {
                inbox.lose_peer(*fellow, LossCause::Other { what: what.clone() });
            }
        }
    }

    async fn read_rows(&mut self) -> Result<(), Ended> {
        while let Some(header) = self.header().await? {
            let round = RoundId { number: header.number, class: header.class, layer: header.layer };
            let inbox = Arc::clone(&self.inbox);
            if header.number & MESSAGE != 0 {
                inbox.admit_message(self.peer, header.class, header.number & !MESSAGE)?;
                inbox.message_room(self.peer, header.length as usize).await;
                let payload = self.payload().await?;
                inbox.deliver_message(self.peer, header.class, header.layer, payload);
                continue;
            }
            inbox.admit_when_possible(self.peer, round, header.length).await?;
            let payload = self.payload().await?;
            inbox.deliver(self.peer, round, payload);
        }
        Ok(())
    }

    async fn read_bulk(&mut self) -> Result<(), Ended> {
        let mut expected = 0;
        while let Some(header) = self.header().await? {
            self.check_sequence(&header, ByteClass::Kv, &mut expected)?;
            self.inbox.bulk_room(self.peer, header.length as usize).await;
            let payload = self.payload().await?;
            self.inbox.deliver_bulk(self.peer, payload);
        }
        Ok(())
    }

    async fn read_control(&mut self, process: Rank) -> Result<(), Ended> {
        let mut expected = 0;
        while let Some(header) = self.header().await? {
            self.check_sequence(&header, ByteClass::Control, &mut expected)?;
            let payload = self.payload().await?;
            self.inbox.count_control(self.peer, false, payload.len());
            let beat = Beat::decode(&payload).ok_or(Violation::Malformed { message: "heartbeat" })?;
            self.context.heart.hear(process.index(), beat);
        }
        Ok(())
    }

    fn check_sequence(
        &self,
        header: &FrameHeader,
        class: ByteClass,
        expected: &mut u64,
    ) -> Result<(), Violation> {
        if header.class != class {
            return Err(Violation::WrongStream { class: header.class, stream: self.stream.name() });
        }
        if header.number != *expected {
            let (stream, number) = (self.stream.name(), header.number);
            return Err(Violation::OutOfSequence { stream, number, expected: *expected });
        }
        *expected += 1;
        Ok(())
    }

    /// The next frame's header, checked; `None` at the end of the stream.
    async fn header(&mut self) -> Result<Option<FrameHeader>, Ended> {
        loop {
            if let Some(header) = self.decoder.header(&mut self.input)? {
                self.check(&header)?;
                return Ok(Some(header));
            }
            if !self.fill().await? {
                let whole = self.decoder.is_between_frames();
                return if whole {
                    Ok(None)
                } else {
                    Err(Violation::Truncated { stream: self.stream.name() }.into())
                };
            }
        }
    }

    fn check(&self, header: &FrameHeader) -> Result<(), Violation> {
        let world = self.context.world;
        if header.world != world.id || header.epoch != world.epoch {
            return Err(Violation::WrongWorld { theirs: header.world, epoch: header.epoch });
        }
        if header.source != self.peer {
            return Err(Violation::WrongSource { claimed: header.source });
        }
        Ok(())
    }

    async fn payload(&mut self) -> Result<Bytes, Ended> {
        loop {
            if let Some(payload) = self.decoder.payload(&mut self.input) {
                return Ok(payload);
            }
            if !self.fill().await? {
                return Err(Violation::Truncated { stream: self.stream.name() }.into());
            }
        }
    }

    /// Reads more of the stream; false at its end.
    async fn fill(&mut self) -> Result<bool, Ended> {
        match self.recv.read_chunk(usize::MAX, true).await {
            Ok(Some(chunk)) => {
                self.input = chunk.bytes;
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(quinn::ReadError::ConnectionLost(error)) => Err(Ended::Lost(error)),
            Err(_) => Err(Violation::Reset { stream: self.stream.name() }.into()),
        }
    }
}
