//! The one interface between the runtime and whatever carries its bytes.

use crate::{Arrivals, TransportError, WireStats};
use bytes::Bytes;
use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// What a frame carries; every byte on the wire is counted under exactly one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum ByteClass {
    /// Rows on their way to experts.
    Dispatch = 0,
    /// Partial expert outputs on their way to a token's next residence.
    Combine = 1,
    /// Keys and values that keep contexts coherent.
    Kv = 2,
    /// Sampled token ids and what rank 0 decides.
    Ids = 3,
    /// Hello, heartbeats, goodbye.
    Control = 4,
}

impl ByteClass {
    /// Every class, in the order of its number.
    pub const ALL: [Self; 5] = [Self::Dispatch, Self::Combine, Self::Kv, Self::Ids, Self::Control];

    /// The class with this number, if there is one.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Dispatch),
            1 => Some(Self::Combine),
            2 => Some(Self::Kv),
            3 => Some(Self::Ids),
            4 => Some(Self::Control),
            _ => None,
        }
    }

    /// The class as reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dispatch => "dispatch",
            Self::Combine => "combine",
            Self::Kv => "kv",
            Self::Ids => "ids",
            Self::Control => "control",
        }
    }

    /// Whether frames of this class belong to rounds (all-to-all-v exchanges).
    pub const fn is_round(self) -> bool {
        matches!(self, Self::Dispatch | Self::Combine | Self::Ids)
    }
}

impl fmt::Display for ByteClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Names one exchange; every rank must call the same rounds in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoundId {
    /// Counts every exchange of this world since it was joined, from 0.
    pub number: u64,
    /// Dispatch, Combine or Ids.
    pub class: ByteClass,
    /// MoE layer that the round belongs to; `u16::MAX` where it belongs to none.
    pub layer: u16,
}

impl fmt::Display for RoundId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {} ({}", self.number, self.class)?;
        match self.layer {
            u16::MAX => f.write_str(")"),
            layer => write!(f, ", MoE layer {layer})"),
        }
    }
}

/// What one rank sends another outside all rounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The rank that sent it.
    pub from: Rank,
    /// What it is counted under; [`ByteClass::Kv`] where it came on the bulk stream.
    pub class: ByteClass,
    /// MoE layer that it belongs to, as the sender gave it; `u16::MAX` on the bulk stream.
    pub layer: u16,
    /// The bytes.
    pub payload: Bytes,
}

/// A group of ranks that exchange rows.
///
/// Calls block the calling thread (a rank's own thread, which has a GPU to wait for anyway) and end in
/// bounded time: with data, or with an error that names the rank, the round and the peer.
pub trait Communicator: Send {
    /// This rank.
    fn rank(&self) -> Rank;

    /// How many ranks there are.
    fn world_size(&self) -> usize;

    /// Ranks of the world that are not there in this epoch: nothing goes to them, and what they would send counts
    /// as there and empty.
    fn absent(&self) -> &[Rank] {
        &[]
    }

    /// All-to-all-v: `send[r]` goes to rank `r` (an empty payload is still a frame, so that its absence is
    /// noticed); returns what every rank sent here, by rank. `send[self]` comes back untouched.
    fn exchange(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<Vec<Bytes>, TransportError>;

    /// Begins an exchange: hands the payloads to the driver and returns, so that work can go on while they travel.
    fn start_exchange(&mut self, round: RoundId, send: Vec<Bytes>) -> Result<(), TransportError>;

    /// Waits for the frames of an exchange begun by [`Communicator::start_exchange`].
    fn finish_exchange(&mut self, round: RoundId) -> Result<Vec<Bytes>, TransportError>;

    /// Frames of an exchange begun by [`Communicator::start_exchange`] that have come and were not given out yet, as they
    /// come; where there are none, waits for one, or with `wait` off gives none. After the last, and only then, the
    /// exchange is over and [`Arrivals::whole`] says so. It fails as [`Communicator::finish_exchange`] does, perhaps after
    /// some frames were given out: what was made from them is then to be thrown away.
    fn arrivals(&mut self, round: RoundId, wait: bool) -> Result<Arrivals, TransportError>;

    /// Every rank's payload at every rank.
    fn all_gather(&mut self, round: RoundId, payload: Bytes) -> Result<Vec<Bytes>, TransportError> {
        let send = vec![payload; self.world_size()];
        self.exchange(round, send)
    }

    /// Hands `payload` to the background (bulk) stream towards `to`: ordered per peer, delivered while rounds
    /// go on, at lower priority than they have. Counted under [`ByteClass::Kv`].
    fn send_bulk(&mut self, to: Rank, payload: Bytes) -> Result<(), TransportError>;

    /// The next bulk payload from any peer; waits up to `timeout` (zero: only looks). `None` where none came.
    fn recv_bulk(&mut self, timeout: Duration) -> Result<Option<(Rank, Bytes)>, TransportError>;

    /// Sends a message to `to`, of class Dispatch, Combine or Ids: ordered per peer, at the priority of rounds, and
    /// without waiting for anything.
    fn send_message(
        &mut self,
        to: Rank,
        class: ByteClass,
        layer: u16,
        payload: Bytes,
    ) -> Result<(), TransportError>;

    /// The next message from any peer or, where there is none, the next bulk payload; waits up to `timeout` (zero:
    /// only looks). `None` where nothing came; an error once a peer is gone, also one that left, and nothing
    /// that came before is left.
    fn recv_message(&mut self, timeout: Duration) -> Result<Option<Message>, TransportError>;

    /// Bytes and frames so far, by peer and class, as they were put on the wire.
    fn stats(&self) -> WireStats;
}
