//! What a peer does that the protocol does not allow.

use crate::{ByteClass, RoundId};
use exflow_placement::Rank;

/// How a peer broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message says what it is")]
pub enum Violation {
    #[error("its frame does not begin with the magic number")]
    BadMagic,
    #[error("its frame header fails its checksum")]
    BadChecksum,
    #[error("its frames have layout version {theirs}, ours is 1")]
    FrameVersion { theirs: u8 },
    #[error("its frame has unknown class {number}")]
    UnknownClass { number: u8 },
    #[error("its frame header has reserved bits set")]
    ReservedBits,
    #[error("it announced a frame of {length} bytes, over the agreed {cap}")]
    Oversized { length: u32, cap: u32 },
    #[error("its frame belongs to another world (id {theirs:#x}, epoch {epoch})")]
    WrongWorld { theirs: u64, epoch: u32 },
    #[error("its frame claims to come from rank {claimed}")]
    WrongSource { claimed: Rank },
    #[error("it sent a {class} frame on the {stream} stream")]
    WrongStream { class: ByteClass, stream: &'static str },
    #[error("it replayed round {number}, which is over")]
    Replayed { number: u64 },
    #[error("it sent round {number} twice")]
    Duplicate { number: u64 },
    #[error("it sent round {number} while this rank is at {oldest}, more than {window} ahead")]
    TooFarAhead { number: u64, oldest: u64, window: u64 },
    #[error("it sent {theirs} where this rank has {ours}: the ranks do not run the same exchanges")]
    RoundMismatch { ours: RoundId, theirs: RoundId },
    #[error("it sent message {number} on the {stream} stream, expected {expected}")]
    OutOfSequence { stream: &'static str, number: u64, expected: u64 },
    #[error("its {stream} stream ended inside a frame")]
    Truncated { stream: &'static str },
    #[error("its stream does not begin as one of this protocol")]
    BadPreface,
    #[error("it reset its {stream} stream")]
    Reset { stream: &'static str },
    #[error("its {message} message cannot be read")]
    Malformed { message: &'static str },
}
