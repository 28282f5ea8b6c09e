//! Who is in the world: hellos, their checks, and the seats that rank 0 gives.
//!
//! Every rank sends rank 0 a [`Hello`]. Rank 0 answers with a [`Refusal`] at once, or, when all seats are taken,
//! with a [`Welcome`] that names world, epoch and the address of every rank. Each rank then greets the lower
//! ranks with the same hello, now with the world's name in it, and is joined when all have accepted.

use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::time::Duration;

/// Version of everything that is said after the secure handshake.
pub const PROTOCOL_VERSION: u16 = 1;
/// Largest hello or refusal, bytes.
pub const HELLO_CAP: u32 = 4096;
/// Largest welcome, bytes: it carries what rank 0 decided, such as a placement table.
pub const WELCOME_CAP: u32 = 16 << 20;

/// SHA-256 of what must be the same everywhere.
pub type Digest = [u8; 32];

/// Which world, and which life of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorldName {
    /// Drawn by rank 0 when the world was first complete.
    pub id: u64,
    /// Counts its lives, from 0.
    pub epoch: u32,
}

/// How a rank introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol: u16,
    /// Its rank.
    pub rank: Rank,
    /// How many ranks it expects.
    pub world_size: u16,
    /// Digest of its model.
    pub model: Digest,
    /// Digest of its placement table; `None`: it takes rank 0's.
    pub table: Option<Digest>,
    /// Name of the numerics mode, at most 32 bytes.
    pub numerics: String,
    /// Largest frame payload that it takes, bytes; the smallest of all is agreed.
    pub max_frame_bytes: u32,
    /// UDP port on which it listens.
    pub port: u16,
    /// The lowest epoch that it may join: one more than the last it was in.
    pub epoch: u32,
    /// The world that it was welcomed to; `None` in the hello to rank 0.
    pub world: Option<WorldName>,
}

/// Rank 0's answer when the world is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Which world this is.
    pub world: WorldName,
    /// Agreed largest frame payload, bytes.
    pub max_frame_bytes: u32,
    /// Address of every rank, by rank; rank 0's own entry is not used.
    pub addresses: Vec<SocketAddr>,
    /// What rank 0's program wants every rank to know before it loads: opaque here.
    pub settings: Vec<u8>,
}

/// Why a hello was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message says what it is")]
pub enum Refusal {
    #[error("protocol version {theirs} where {ours} is spoken; run the same exflow everywhere")]
    Protocol { ours: u16, theirs: u16 },
    #[error("it does not speak {name}; run the same exflow everywhere")]
    ProtocolName { name: String },
    #[error("world size {theirs} where it is {ours}; give every rank the same --world-size")]
    WorldSize { ours: u16, theirs: u16 },
    #[error("rank {rank} does not exist among {world_size} ranks; ranks count from 0")]
    NoSuchRank { rank: Rank, world_size: u16 },
    #[error("rank {rank} has already joined; give every process its own --rank")]
    DuplicateRank { rank: Rank },
    #[error("the certificate is not rank {rank}'s; use the identity that was issued for this rank")]
    CertificateRank { rank: Rank },
    #[error("another model ({theirs} here {ours}); give every rank the same model files")]
    Model { ours: String, theirs: String },
    #[error("another placement table ({theirs} here {ours}); leave --placement out to take rank 0's")]
    Table { ours: String, theirs: String },
    #[error("numerics mode {theirs} where it is {ours}; give every rank the same --numerics")]
    Numerics { ours: String, theirs: String },
    #[error("epoch {theirs} where the world is at {ours}; start the rank again")]
    Epoch { ours: u32, theirs: u32 },
    #[error("another world of the same cluster; give both sides the same leader")]
    World,
    #[error("the hello cannot be read; run the same exflow everywhere")]
    Malformed,
    #[error("the group is not complete, rank {} missing; start all ranks", list(.missing))]
    Incomplete { missing: Vec<Rank> },
}

fn list(ranks: &[Rank]) -> String {
    ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What is said on a control stream while joining.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// First message of the side that dialled.
    Hello(Hello),
    /// Rank 0's answer when the world is complete.
    Welcome(Welcome),
    /// Answer of the other ranks to a hello that names their world.
    Accept,
    /// Answer to a hello that does not fit.
    Refuse(Refusal),
}

impl Message {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        // Plain data into a growing buffer: there is nothing that could fail.
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Reads a message; bytes left over make it unreadable.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        match postcard::take_from_bytes(bytes) {
            Ok((message, [])) => Some(message),
            _ => None,
        }
    }
}

/// Checks a hello against this rank's own, apart from seats and worlds.
pub fn check(ours: &Hello, theirs: &Hello) -> Result<(), Refusal> {
    if theirs.protocol != ours.protocol {
        return Err(Refusal::Protocol { ours: ours.protocol, theirs: theirs.protocol });
    }
    if theirs.world_size != ours.world_size {
        return Err(Refusal::WorldSize { ours: ours.world_size, theirs: theirs.world_size });
    }
    if theirs.rank.0 >= ours.world_size {
        return Err(Refusal::NoSuchRank { rank: theirs.rank, world_size: ours.world_size });
    }
    if theirs.rank == ours.rank {
        return Err(Refusal::DuplicateRank { rank: theirs.rank });
    }
    if theirs.model != ours.model {
        return Err(Refusal::Model { ours: short(&ours.model), theirs: short(&theirs.model) });
    }
    if let (Some(our_table), Some(their_table)) = (&ours.table, &theirs.table)
        && our_table != their_table
    {
        return Err(Refusal::Table { ours: short(our_table), theirs: short(their_table) });
    }
    if theirs.numerics != ours.numerics {
        let theirs = theirs.numerics.chars().filter(|c| !c.is_control()).take(32).collect();
        return Err(Refusal::Numerics { ours: ours.numerics.clone(), theirs });
    }
    Ok(())
}

/// First bytes of a digest, as people compare them.
fn short(digest: &Digest) -> String {
    digest[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A seat that is taken.
#[derive(Debug, Clone, Copy)]
struct Seat {
    guest: u64,
    address: SocketAddr,
}

/// Result of looking at the lobby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LobbyPoll {
    /// Ranks are missing; look again when one came, at the latest at this time.
    Waiting {
        /// When the waiting ends.
        deadline: Duration,
    },
    /// All are there: address by rank (rank 0's is a placeholder) and the agreed largest frame payload.
    Full {
        /// Address of every rank.
        addresses: Vec<SocketAddr>,
        /// Agreed largest frame payload, bytes.
        max_frame_bytes: u32,
        /// The epoch of this life of the world.
        epoch: u32,
    },
    /// It took too long.
    Expired {
        /// Ranks that did not come.
        missing: Vec<Rank>,
    },
}

/// Rank 0 while its world is not complete. Guests are named by a number that the driver chooses.
#[derive(Debug)]
pub struct Lobby {
    own: Hello,
    seats: Vec<Option<Seat>>,
    max_frame_bytes: u32,
    epoch: u32,
    deadline: Duration,
}

impl Lobby {
    /// A lobby for the world that `own` (rank 0's hello) describes, open until `deadline`.
    pub fn new(own: Hello, deadline: Duration) -> Self {
        let seats = vec![None; usize::from(own.world_size)];
        Self { max_frame_bytes: own.max_frame_bytes, epoch: own.epoch, own, seats, deadline }
    }

    /// Gives a guest its seat, or says why not. `address` is where its packets come from.
    pub fn hear(&mut self, guest: u64, hello: &Hello, address: SocketAddr) -> Result<(), Refusal> {
        check(&self.own, hello)?;
        if hello.world.is_some() {
            return Err(Refusal::World);
        }
        let seat = &mut self.seats[hello.rank.index()];
        if seat.is_some() {
            return Err(Refusal::DuplicateRank { rank: hello.rank });
        }
        *seat = Some(Seat { guest, address: SocketAddr::new(address.ip(), hello.port) });
        self.max_frame_bytes = self.max_frame_bytes.min(hello.max_frame_bytes);
        self.epoch = self.epoch.max(hello.epoch);
        Ok(())
    }

    /// Frees the seat of a guest that went away.
    pub fn leave(&mut self, guest: u64) {
        self.seats
            .iter_mut()
            .filter(|seat| seat.is_some_and(|seat| seat.guest == guest))
            .for_each(|s| *s = None);
    }

    /// Ranks that have no seat yet.
    pub fn missing(&self) -> Vec<Rank> {
        let seats = self.seats.iter().enumerate().skip(1);
        seats.filter(|(_, seat)| seat.is_none()).map(|(rank, _)| Rank::from(rank)).collect()
    }

    /// Looks whether the world is complete.
    pub fn poll(&self, now: Duration) -> LobbyPoll {
        let missing = self.missing();
        if missing.is_empty() {
            let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
            let addresses = self.seats.iter().map(|seat| seat.map_or(nowhere, |seat| seat.address)).collect();
            LobbyPoll::Full { addresses, max_frame_bytes: self.max_frame_bytes, epoch: self.epoch }
        } else if now >= self.deadline {
            LobbyPoll::Expired { missing }
        } else {
            LobbyPoll::Waiting { deadline: self.deadline }
        }
    }
}

/// A rank that has been welcomed and waits for the higher ranks.
#[derive(Debug)]
pub struct Gate {
    own: Hello,
    world: WorldName,
    entered: Vec<bool>,
}

impl Gate {
    /// A gate of rank `own.rank` in `world`.
    pub fn new(own: Hello, world: WorldName) -> Self {
        let entered = vec![false; usize::from(own.world_size)];
        Self { own, world, entered }
    }

    /// Lets a higher rank of the same world in, once.
    pub fn hear(&mut self, hello: &Hello) -> Result<(), Refusal> {
        check(&self.own, hello)?;
        match hello.world {
            Some(world) if world == self.world => {}
            Some(world) if world.id == self.world.id => {
                return Err(Refusal::Epoch { ours: self.world.epoch, theirs: world.epoch });
            }
            _ => return Err(Refusal::World),
        }
        let entered = &mut self.entered[hello.rank.index()];
        if hello.rank < self.own.rank || *entered {
            return Err(Refusal::DuplicateRank { rank: hello.rank });
        }
        *entered = true;
        Ok(())
    }

    /// Higher ranks that are not in yet.
    pub fn missing(&self) -> Vec<Rank> {
        let entered = self.entered.iter().enumerate().skip(self.own.rank.index() + 1);
        entered.filter(|(_, entered)| !**entered).map(|(rank, _)| Rank::from(rank)).collect()
    }
}

#[cfg(test)]
#[path = "membership_tests.rs"]
mod tests;
