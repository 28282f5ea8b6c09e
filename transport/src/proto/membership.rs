//! Who is in the world: hellos, their checks, and the seats that rank 0 gives.
//!
//! Every process sends rank 0 a [`Hello`]. Rank 0 answers with a [`Refusal`] at once, or, when the world can start,
//! with a [`Welcome`] that names world, epoch and every process with its ranks and address. Each process then greets
//! the lower ones with the same hello, now with the world's name in it, and is joined when all have accepted.
//!
//! Processes are numbered like the ranks that their certificates name. One that hosts several ranks says how many;
//! the ranks of the world are counted through, process by process. A world is complete at its first start; in a later
//! epoch processes may be absent, and their ranks keep their numbers.

mod lobby;

pub use lobby::{Gate, Lobby, LobbyPoll, LobbyTerms, Party};

use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Version of everything that is said after the secure handshake.
pub const PROTOCOL_VERSION: u16 = 1;
/// Largest hello or refusal, bytes.
pub const HELLO_CAP: u32 = 4096;
/// Largest offer within a hello, bytes.
pub const OFFER_CAP: usize = 2048;
/// Most ranks of a world.
pub const MOST_RANKS: usize = 4096;
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
    /// The number of its process, which its certificate names: its rank where every process hosts one.
    pub rank: Rank,
    /// How many processes it expects.
    pub world_size: u16,
    /// How many ranks it hosts.
    pub ranks: u16,
    /// What its program wants rank 0's to know, such as its memory: opaque here, at most [`OFFER_CAP`] bytes.
    pub offer: Vec<u8>,
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

/// One process of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its first rank.
    pub first: Rank,
    /// How many ranks it hosts.
    pub ranks: u16,
    /// Its UDP address; `None`: it is absent in this epoch. Rank 0's own is a placeholder.
    pub address: Option<SocketAddr>,
}

impl Member {
    /// Its ranks.
    pub fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        let first = self.first.index();
        (first..first + usize::from(self.ranks)).map(Rank::from)
    }
}

/// Every process of a world, by its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster(Vec<Member>);

impl Roster {
    /// Counts the ranks through; `hosts`: ranks of each process and where it is.
    pub fn new(hosts: impl IntoIterator<Item = (u16, Option<SocketAddr>)>) -> Self {
        let mut first = 0usize;
        let member = |(ranks, address): (u16, Option<SocketAddr>)| {
            let member = Member { first: Rank::from(first), ranks, address };
            first += usize::from(ranks);
            member
        };
        Self(hosts.into_iter().map(member).collect())
    }

    /// Whether the ranks are counted through and within bounds: what comes from the wire may be anything.
    pub fn check(&self) -> bool {
        let total: usize = self.0.iter().map(|member| usize::from(member.ranks)).sum();
        let again = Self::new(self.0.iter().map(|member| (member.ranks, member.address)));
        (1..=MOST_RANKS).contains(&total) && self.0.iter().all(|member| member.ranks > 0) && again == *self
    }

    /// Every process, by its number.
    pub fn members(&self) -> &[Member] {
        &self.0
    }

    /// How many ranks the world has, absent ones included.
    pub fn world_size(&self) -> usize {
        self.0.iter().map(|member| usize::from(member.ranks)).sum()
    }

    /// Whether a process is there.
    pub fn is_present(&self, process: usize) -> bool {
        self.0.get(process).is_some_and(|member| member.address.is_some())
    }

    /// Ranks whose processes are absent.
    pub fn absent(&self) -> Vec<Rank> {
        self.0.iter().filter(|member| member.address.is_none()).flat_map(Member::ranks).collect()
    }
}

/// Rank 0's answer when the world can start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Which world this is.
    pub world: WorldName,
    /// Agreed largest frame payload, bytes.
    pub max_frame_bytes: u32,
    /// Every process with its ranks.
    pub roster: Roster,
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
    #[error("{theirs} ranks in a process that had {ours}; start it with the same devices as before")]
    Ranks { ours: u16, theirs: u16 },
    #[error("rank 0 cannot start the group: {}", plain(.what))]
    NotStarted { what: String },
}

/// Words of a peer, without what could upset a terminal.
fn plain(what: &str) -> String {
    what.chars().filter(|c| !c.is_control()).take(400).collect()
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
    if theirs.ranks == 0 || usize::from(theirs.ranks) > MOST_RANKS || theirs.offer.len() > OFFER_CAP {
        return Err(Refusal::Malformed);
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

#[cfg(test)]
#[path = "membership_tests.rs"]
mod tests;
