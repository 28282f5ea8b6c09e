//! What is written on streams besides rounds: how each begins, and the messages of joining.

use crate::ByteClass;
use crate::proto::frame::{FrameHeader, HEADER_BYTES};
use crate::proto::membership::Message;
use crate::proto::round::Violation;
use exflow_placement::Rank;
use quinn::{ConnectionError, ReadExactError, RecvStream, SendStream, VarInt, WriteError};

/// Close codes. The reason phrase says more.
pub(crate) const CLOSE_LEFT: u32 = 0;
/// The closing rank has failed.
pub(crate) const CLOSE_FAILED: u32 = 1;
/// The hello was refused.
pub(crate) const CLOSE_REFUSED: u32 = 2;
/// The peer broke the protocol.
pub(crate) const CLOSE_PROTOCOL: u32 = 3;

const PREFACE_BYTES: usize = 12;

/// The long-lived streams of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum StreamKind {
    Control = 0,
    Rows = 1,
    Bulk = 2,
}

impl StreamKind {
    /// Order in which quinn sends what is ready.
    pub(crate) const fn priority(self) -> i32 {
        match self {
            Self::Control => 2,
            Self::Rows => 1,
            Self::Bulk => 0,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Control, Self::Rows, Self::Bulk].into_iter().find(|kind| *kind as u8 == number)
    }
}

/// How a stream begins: what it is, and between which ranks. A control stream is between processes and names none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Preface {
    pub(crate) kind: StreamKind,
    /// Rank at the side that dialled.
    pub(crate) dialler: Rank,
    /// Rank at the side that accepted.
    pub(crate) acceptor: Rank,
}

impl Preface {
    const NOBODY: Rank = Rank(u16::MAX);

    pub(crate) const CONTROL: Self =
        Self { kind: StreamKind::Control, dialler: Self::NOBODY, acceptor: Self::NOBODY };

    fn encode(self) -> [u8; PREFACE_BYTES] {
        let ([a, b], [c, d]) = (self.dialler.0.to_le_bytes(), self.acceptor.0.to_le_bytes());
        [b'E', b'X', b'F', b'S', 1, self.kind as u8, a, b, c, d, 0, 0]
    }

    fn decode(bytes: [u8; PREFACE_BYTES]) -> Option<Self> {
        let [_, _, _, _, _, kind, a, b, c, d, ..] = bytes;
        let (dialler, acceptor) = (Rank(u16::from_le_bytes([a, b])), Rank(u16::from_le_bytes([c, d])));
        let preface = Self { kind: StreamKind::from_number(kind)?, dialler, acceptor };
        (preface.encode() == bytes).then_some(preface)
    }
}

/// Both directions of one stream.
pub(crate) type Duplex = (SendStream, RecvStream);

/// Why a message could not be exchanged.
#[derive(Debug)]
pub(crate) enum WireError {
    Connection(ConnectionError),
    Violation(Violation),
}

impl From<ConnectionError> for WireError {
    fn from(error: ConnectionError) -> Self {
        Self::Connection(error)
    }
}

impl From<Violation> for WireError {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl From<WriteError> for WireError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => Self::Connection(error),
            _ => Self::Violation(Violation::Reset { stream: "control" }),
        }
    }
}

impl From<ReadExactError> for WireError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => Self::Connection(error),
            ReadExactError::ReadError(_) => Self::Violation(Violation::Reset { stream: "control" }),
            ReadExactError::FinishedEarly(_) => Self::Violation(Violation::Truncated { stream: "control" }),
        }
    }
}

/// Opens a stream of this kind and says so, which makes it visible to the peer.
pub(crate) async fn open(connection: &quinn::Connection, preface: Preface) -> Result<Duplex, WireError> {
    let (mut send, recv) = connection.open_bi().await?;
    // The stream was just opened, so it is not closed.
    let _ = send.set_priority(preface.kind.priority());
    send.write_all(&preface.encode()).await?;
    Ok((send, recv))
}

/// Accepts the next stream and reads which kind it is.
pub(crate) async fn accept(connection: &quinn::Connection) -> Result<(Preface, Duplex), WireError> {
    let (send, mut recv) = connection.accept_bi().await?;
    let mut preface = [0; PREFACE_BYTES];
    recv.read_exact(&mut preface).await?;
    let preface = Preface::decode(preface).ok_or(Violation::BadPreface)?;
    let _ = send.set_priority(preface.kind.priority());
    Ok((preface, (send, recv)))
}

/// Writes a message of joining; gives its payload bytes, to be counted.
pub(crate) async fn write_message(
    send: &mut SendStream,
    from: Rank,
    message: &Message,
) -> Result<usize, WireError> {
    let payload = message.encode();
    let header = FrameHeader {
        class: ByteClass::Control,
        layer: u16::MAX,
        world: 0,
        epoch: 0,
        source: from,
        number: 0,
        length: payload.len() as u32,
    };
    send.write_all(&header.encode()).await?;
    send.write_all(&payload).await?;
    Ok(payload.len())
}

/// Reads a message of joining of at most `cap` bytes; gives it with its sender's claimed rank and its bytes.
pub(crate) async fn read_message(
    recv: &mut RecvStream,
    cap: u32,
) -> Result<(Rank, Message, usize), WireError> {
    let mut head = [0; HEADER_BYTES];
    recv.read_exact(&mut head).await?;
    let header = FrameHeader::decode(&head, cap)?;
    if header.class != ByteClass::Control {
        return Err(Violation::WrongStream { class: header.class, stream: "control" }.into());
    }
    let mut payload = vec![0; header.length as usize];
    recv.read_exact(&mut payload).await?;
    let message = Message::decode(&payload).ok_or(Violation::Malformed { message: "hello" })?;
    Ok((header.source, message, payload.len()))
}

/// Closes a connection with a code and words for the peer.
pub(crate) fn close(connection: &quinn::Connection, code: u32, reason: &str) {
    connection.close(VarInt::from_u32(code), reason.as_bytes());
}
