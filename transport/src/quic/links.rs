//! The tasks of one connection: they move frames between its streams and the rank's inbox.

use super::join::{Link, loss_cause};
use super::wire::{self, CLOSE_PROTOCOL};
use crate::inbox::Inbox;
use crate::proto::frame::{Decoder, FrameHeader, MESSAGE};
use crate::proto::membership::{HELLO_CAP, WorldName};
use crate::proto::round::Violation;
use crate::{ByteClass, LossCause, RoundId};
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
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) world: WorldName,
    pub(crate) max_frame_bytes: u32,
    pub(crate) idle_timeout: Duration,
}

/// A frame on its way out.
pub(crate) type Outgoing = (FrameHeader, Bytes);

/// Where frames for a peer are handed in.
#[derive(Debug)]
pub(crate) struct LinkSender {
    pub(crate) rows: mpsc::UnboundedSender<Outgoing>,
    pub(crate) bulk: mpsc::UnboundedSender<Outgoing>,
}

/// Starts the tasks of a link. `writers` end, once their senders are dropped, when the peer has acknowledged all.
pub(crate) fn start(link: Link, context: &LinkContext, writers: &mut JoinSet<()>) -> LinkSender {
    let Link { peer, connection, control, rows, bulk } = link;
    let (rows_sender, rows_queue) = mpsc::unbounded_channel();
    let (bulk_sender, bulk_queue) = mpsc::unbounded_channel();
    writers.spawn(write_rows(rows.0, rows_queue));
    writers.spawn(write_bulk(bulk.0, bulk_queue, Arc::clone(&context.inbox), peer));
    context.inbox.bulk_coming(peer, true);
    let reader = |recv, stream| Reader::new(recv, stream, peer, connection.clone(), context.clone());
    tokio::spawn(reader(rows.1, "rows").run());
    tokio::spawn(reader(bulk.1, "bulk").run());
    tokio::spawn(hold_control(control.0, reader(control.1, "control")));
    LinkSender { rows: rows_sender, bulk: bulk_sender }
}

async fn write_rows(mut send: SendStream, mut queue: mpsc::UnboundedReceiver<Outgoing>) {
    while let Some((header, payload)) = queue.recv().await {
        let mut parts = [Bytes::copy_from_slice(&header.encode()), payload];
        if send.write_all_chunks(&mut parts).await.is_err() {
            return; // The rows reader of the same connection reports why.
        }
    }
    drain(send).await;
}

async fn write_bulk(
    mut send: SendStream,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    inbox: Arc<Inbox>,
    peer: Rank,
) {
    while let Some((header, mut payload)) = queue.recv().await {
        let bytes = payload.len();
        if send.write_chunk(Bytes::copy_from_slice(&header.encode())).await.is_err() {
            return;
        }
        while !payload.is_empty() {
            let piece = payload.split_to(payload.len().min(BULK_CHUNK));
            if send.write_chunk(piece).await.is_err() {
                return;
            }
        }
        inbox.bulk_sent(peer, bytes);
    }
    drain(send).await;
}

/// Ends the stream and waits until all of it is acknowledged.
async fn drain(mut send: SendStream) {
    if send.finish().is_ok() {
        let _ = send.stopped().await;
    }
}

/// Keeps our half of the control stream open for as long as the peer's lives.
async fn hold_control(send: SendStream, reader: Reader) {
    reader.run().await;
    drop(send);
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

/// Reads one stream of a peer.
struct Reader {
    recv: RecvStream,
    stream: &'static str,
    peer: Rank,
    connection: Connection,
    context: LinkContext,
    decoder: Decoder,
    input: Bytes,
}

impl Reader {
    fn new(
        recv: RecvStream,
        stream: &'static str,
        peer: Rank,
        connection: Connection,
        context: LinkContext,
    ) -> Self {
        let cap = if stream == "control" { HELLO_CAP } else { context.max_frame_bytes };
        Self { recv, stream, peer, connection, context, decoder: Decoder::new(cap), input: Bytes::new() }
    }

    /// Reads to the end and reports how it came. Only the end of the rows stream means that a peer left: all
    /// that it had sent for rounds has then been read.
    async fn run(mut self) {
        let ended = match self.stream {
            "rows" => self.read_rows().await,
            "bulk" => self.read_bulk().await,
            _ => self.read_control().await,
        };
        let inbox = &self.context.inbox;
        if self.stream == "bulk" {
            inbox.bulk_coming(self.peer, false);
        }
        match ended {
            Ok(()) if self.stream == "rows" => inbox.lose_peer(self.peer, LossCause::Left),
            Ok(()) => {}
            Err(Ended::Broken(violation)) => {
                inbox.break_peer(self.peer, violation.clone());
                wire::close(&self.connection, CLOSE_PROTOCOL, &violation.to_string());
            }
            Err(Ended::Lost(error)) if self.stream == "rows" => {
                inbox.lose_peer(self.peer, loss_cause(&error, self.context.idle_timeout));
            }
            Err(Ended::Lost(_)) => {}
        }
    }

    async fn read_rows(&mut self) -> Result<(), Ended> {
        while let Some(header) = self.header().await? {
            let round = RoundId { number: header.number, class: header.class, layer: header.layer };
            let inbox = Arc::clone(&self.context.inbox);
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
            self.context.inbox.bulk_room(self.peer, header.length as usize).await;
            let payload = self.payload().await?;
            self.context.inbox.deliver_bulk(self.peer, payload);
        }
        Ok(())
    }

    async fn read_control(&mut self) -> Result<(), Ended> {
        let mut expected = 0;
        while let Some(header) = self.header().await? {
            self.check_sequence(&header, ByteClass::Control, &mut expected)?;
            let payload = self.payload().await?;
            self.context.inbox.count_control(self.peer, false, payload.len());
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
            return Err(Violation::WrongStream { class: header.class, stream: self.stream });
        }
        if header.number != *expected {
            let (stream, number) = (self.stream, header.number);
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
                    Err(Violation::Truncated { stream: self.stream }.into())
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
                return Err(Violation::Truncated { stream: self.stream }.into());
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
            Err(_) => Err(Violation::Reset { stream: self.stream }.into()),
        }
    }
}
