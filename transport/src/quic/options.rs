//! What can be set about the QUIC driver, with the reasons for the defaults.

use crate::TransportError;
use crate::identity::Identity;
use crate::inbox::InboxLimits;
use crate::link::LinkSpec;
use crate::proto::frame::HEADER_BYTES;
use crate::proto::membership::{Digest, Hello, MOST_RANKS, OFFER_CAP, PROTOCOL_VERSION, Party};
use crate::proto::round::RoundLimits;
use exflow_placement::Rank;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// UDP payload that every path must carry (RFC 9000).
pub const MIN_UDP_PAYLOAD: u16 = 1200;
/// UDP payload of a 1500 byte Ethernet frame with room for IPv6.
pub const ETHERNET_UDP_PAYLOAD: u16 = 1452;
/// UDP payload of a 9000 byte jumbo frame with room for IPv6.
pub const JUMBO_UDP_PAYLOAD: u16 = 8952;
/// UDP payload for the loopback interface, which takes up to 65,507 bytes: a frame of 16 KiB fits into one, and more
/// per packet gains nothing.
pub const LOOPBACK_UDP_PAYLOAD: u16 = 16_700;

/// How much may be in flight towards a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Congestion {
    /// CUBIC, for networks that are shared with others.
    Cubic,
    /// So many that packets wait about a millisecond in queues, and never more than this many bytes per peer; CUBIC
    /// towards peers whose address is public.
    ShortQueue {
        /// Most bytes in flight per peer.
        most_bytes: u64,
    },
    /// At most this many bytes per peer, for private links: refused where a peer's address is public.
    Bounded {
        /// Bytes in flight per peer.
        window_bytes: u64,
    },
}

/// Whether an address is one of a private network.
pub(crate) fn is_private(address: &SocketAddr) -> bool {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

/// Which thread drives the sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverThreads {
    /// One per rank.
    PerRank,
    /// One for all ranks of [`loopback_world`](super::loopback_world).
    Shared,
}

/// Settings of the QUIC driver.
#[derive(Debug, Clone)]
pub struct QuicOptions {
    /// How long a round may take from its start. Generous, so that slow GPU work is not taken for death.
    pub round_timeout: Duration,
    /// A connection on which nothing is heard for this long is dead: every rank must know of a lost rank 0 within 2 s.
    /// Keep-alives come five times as often, from a thread that no GPU work blocks.
    pub idle_timeout: Duration,
    /// Whether processes tell each other five times a second that they live and whom they miss; all of a world alike, as who
    /// sends none is suspect to the others. Ranks of one process live and die together: to four of them it is the work of
    /// twelve links for nothing, 1.5 % of a core at rest.
    pub heartbeats: bool,
    /// How long a rank waits until all have joined.
    pub join_timeout: Duration,
    /// How long a connected peer may take to say hello.
    pub hello_timeout: Duration,
    /// How long a closing rank waits for its last frames to be acknowledged while nothing more of them can be sent;
    /// ten times that where they go on flowing.
    pub linger: Duration,
    /// Rounds that a rank may have open at once.
    pub max_open_rounds: usize,
    /// Largest payload of one frame, bytes; the smallest of all ranks is agreed.
    pub max_frame_bytes: u32,
    /// Bytes of frames of later rounds kept per peer before its rows are no longer read.
    pub early_bytes: usize,
    /// Background bytes kept per peer, unread by the program, before its bulk stream is no longer read.
    pub bulk_unread_bytes: usize,
    /// Background bytes waiting for a peer before `send_bulk` waits.
    pub bulk_unsent_bytes: usize,
    /// Bytes of messages waiting for a peer before it is given up: they must not wait, and it does not read.
    pub messages_unsent_bytes: usize,
    /// Congestion control.
    pub congestion: Congestion,
    /// Largest UDP payload to try, bytes; discovered per path from [`MIN_UDP_PAYLOAD`] up.
    pub max_udp_payload: u16,
    /// Socket buffers to ask the system for, bytes.
    pub socket_buffer_bytes: usize,
    /// Which thread drives the sockets.
    pub threads: DriverThreads,
    /// Shapes what this rank sends; reports must name it.
    pub link: Option<LinkSpec>,
    /// Leaves congestion control, packet sizes, acknowledgements, windows and socket buffers as quinn has them: the
    /// baseline of measurements.
    pub untuned: bool,
}

impl Default for QuicOptions {
    fn default() -> Self {
        Self {
            round_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_millis(1500),
            heartbeats: true,
            join_timeout: Duration::from_secs(60),
            hello_timeout: Duration::from_secs(5),
            linger: Duration::from_secs(1),
            max_open_rounds: 4,
            max_frame_bytes: 64 << 20,
            early_bytes: 64 << 20,
            bulk_unread_bytes: 256 << 20,
            bulk_unsent_bytes: 256 << 20,
            messages_unsent_bytes: 256 << 20,
            congestion: Congestion::ShortQueue { most_bytes: 1 << 20 },
            max_udp_payload: JUMBO_UDP_PAYLOAD,
            socket_buffer_bytes: 4 << 20,
            threads: DriverThreads::PerRank,
            link: None,
            untuned: false,
        }
    }
}

impl QuicOptions {
    /// Settings for ranks of one process that talk over the loopback interface.
    pub fn loopback() -> Self {
        let window_bytes = 1 << 20;
        Self {
            congestion: Congestion::Bounded { window_bytes },
            max_udp_payload: LOOPBACK_UDP_PAYLOAD,
            ..Self::default()
        }
    }

    /// This crate's protocol over quinn as it comes, to compare with.
    pub fn quinn_defaults() -> Self {
        let congestion = Congestion::Cubic;
        Self { untuned: true, congestion, max_udp_payload: ETHERNET_UDP_PAYLOAD, ..Self::loopback() }
    }

    pub(crate) fn check(&self) -> Result<(), TransportError> {
        let wrong = |what: String, remedy: &str| Err(TransportError::Options { what, remedy: remedy.into() });
        if !(MIN_UDP_PAYLOAD..=65507).contains(&self.max_udp_payload) {
            return wrong(format!("max_udp_payload {}", self.max_udp_payload), "choose 1200 to 65507 bytes");
        }
        if self.idle_timeout < Duration::from_millis(50) || self.idle_timeout > Duration::from_secs(600) {
            return wrong(format!("idle_timeout {:?}", self.idle_timeout), "choose 50 ms to 10 minutes");
        }
        if self.max_open_rounds == 0 || self.max_open_rounds > 1024 {
            return wrong(format!("max_open_rounds {}", self.max_open_rounds), "choose 1 to 1024");
        }
        if self.max_frame_bytes == 0 {
            return wrong("max_frame_bytes 0".into(), "choose at least the bytes of one row");
        }
        Ok(())
    }

    pub(crate) fn inbox_limits(&self, max_frame_bytes: u32) -> InboxLimits {
        InboxLimits {
            rounds: RoundLimits {
                max_open: self.max_open_rounds,
                max_frame_bytes,
                early_bytes: self.early_bytes,
                timeout: self.round_timeout,
            },
            bulk_unread_bytes: self.bulk_unread_bytes,
            bulk_unsent_bytes: self.bulk_unsent_bytes,
            messages_unsent_bytes: self.messages_unsent_bytes,
            header_bytes: HEADER_BYTES,
        }
    }
}

/// What happens while a group forms and lives, for the program to print.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum JoinEvent {
    /// This rank listens here.
    Listening {
        /// Its UDP address.
        address: SocketAddr,
    },
    /// A rank has been accepted.
    Joined {
        /// Its rank.
        rank: Rank,
        /// Its UDP address.
        address: SocketAddr,
    },
    /// Nothing was heard for a second from the process of these ranks, by this process or, as rank 0 tells, by another.
    Suspect {
        /// Its ranks.
        ranks: Vec<Rank>,
    },
    /// A suspect process is heard again by all.
    Heard {
        /// Its ranks.
        ranks: Vec<Rank>,
    },
    /// A peer was turned away, or an attempt to reach one failed and is repeated.
    Failed {
        /// What happened, in words.
        what: String,
    },
}

/// Receives [`JoinEvent`]s, on the driver's thread: it must not block.
pub type JoinObserver = Arc<dyn Fn(&JoinEvent) + Send + Sync>;

/// What rank 0's program says of those with whom the world could start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ruling {
    /// It starts; every rank is given these settings. At most 8 MiB.
    Start(Vec<u8>),
    /// They are too few, for this reason: more are waited for.
    Wait(String),
    /// It cannot start at all; everybody is told why.
    Never(String),
}

/// Decides about a party, on a thread that may block.
pub type Decide = Arc<dyn Fn(&Party) -> Ruling + Send + Sync>;

/// Which life of a world is to be joined.
#[derive(Debug, Clone, Default)]
pub struct Life {
    /// The lowest epoch to join: one more than the last one.
    pub epoch: u32,
    /// Rank 0: the world's name and the ranks of each process, once it has been complete.
    pub known: Option<(u64, Vec<u16>)>,
    /// Rank 0: how long everybody is waited for before a known world starts with those who are there.
    pub partial_after: Duration,
    /// The others: how long rank 0 may be out of reach before it is lost; `None`: until the join timeout.
    pub contact: Option<Duration>,
}

/// How a process joins its group.
#[derive(Clone)]
pub struct JoinOptions {
    /// The number of this process, which its certificate names: its rank where every process hosts one.
    pub rank: Rank,
    /// How many processes there are.
    pub world_size: usize,
    /// How many ranks this process hosts.
    pub ranks: usize,
    /// What rank 0's program is to know of this process, at most 2048 bytes: see [`Party::offers`].
    pub offer: Vec<u8>,
    /// Rank 0: decides when those who are there can start, and with which settings; `None`: with
    /// [`JoinOptions::settings`], when all are there.
    pub decide: Option<Decide>,
    /// UDP address to listen on; port 0: any.
    pub listen: SocketAddr,
    /// `HOST:PORT` of rank 0; resolved again at each attempt. Rank 0 itself needs none.
    pub leader: Option<String>,
    /// Addresses of other ranks that are to be used instead of those that rank 0 gives, by rank.
    pub peers: Vec<(Rank, SocketAddr)>,
    /// Certificate, key and trust.
    pub identity: Identity,
    /// Digest of the model.
    pub model: Digest,
    /// Digest of the placement table; `None`: takes rank 0's.
    pub table: Option<Digest>,
    /// Name of the numerics mode.
    pub numerics: String,
    /// What rank 0 wants every rank to know before it loads; ignored elsewhere. At most 8 MiB.
    pub settings: Vec<u8>,
    /// The lowest epoch to join: 0 at first, one more after each life of the world.
    pub epoch: u32,
    /// Settings of the driver.
    pub quic: QuicOptions,
    /// Is told what happens while the group forms.
    pub observer: Option<JoinObserver>,
}

impl JoinOptions {
    /// Options for process `rank` of `world_size` with one rank, listening on any port of every interface.
    pub fn new(rank: Rank, world_size: usize, identity: Identity) -> Self {
        Self {
            rank,
            world_size,
            ranks: 1,
            offer: Vec::new(),
            decide: None,
            listen: SocketAddr::from(([0, 0, 0, 0], 0)),
            leader: None,
            peers: Vec::new(),
            identity,
            model: [0; 32],
            table: None,
            numerics: "exact".into(),
            settings: Vec::new(),
            epoch: 0,
            quic: QuicOptions::default(),
            observer: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), TransportError> {
        let wrong = |what: String, remedy: &str| Err(TransportError::Options { what, remedy: remedy.into() });
        if self.world_size == 0 || self.world_size > 4096 {
            return wrong(format!("world size {}", self.world_size), "choose 1 to 4096 ranks");
        }
        if self.rank.index() >= self.world_size {
            return wrong(format!("rank {} of {}", self.rank, self.world_size), "ranks count from 0");
        }
        if self.rank != Rank(0) && self.leader.is_none() {
            return wrong(format!("rank {} has no leader", self.rank), "give rank 0's HOST:PORT");
        }
        if self.ranks == 0 || self.ranks > MOST_RANKS {
            return wrong(format!("{} ranks in a process", self.ranks), "choose 1 to 4096");
        }
        if self.offer.len() > OFFER_CAP {
            return wrong(format!("an offer of {} bytes", self.offer.len()), "keep it under 2 KiB");
        }
        if self.numerics.len() > 32 {
            return wrong("numerics mode name over 32 bytes".into(), "use a shorter name");
        }
        if self.settings.len() > crate::proto::membership::WELCOME_CAP as usize / 2 {
            return wrong(format!("settings of {} bytes", self.settings.len()), "keep them under 8 MiB");
        }
        self.quic.check()
    }

    /// The hello of a life; a table is compared at the first start only, later ones follow from who is there.
    pub(crate) fn hello(&self, port: u16, life: &Life) -> Hello {
        let epoch = self.epoch.max(life.epoch);
        Hello {
            protocol: PROTOCOL_VERSION,
            rank: self.rank,
            world_size: self.world_size as u16,
            ranks: self.ranks as u16,
            offer: self.offer.clone(),
            model: self.model,
            table: self.table.filter(|_| life.epoch == 0),
            numerics: self.numerics.clone(),
            max_frame_bytes: self.quic.max_frame_bytes,
            port,
            epoch,
            world: None,
        }
    }

    pub(crate) fn tell(&self, event: &JoinEvent) {
        tracing::debug!(rank = %self.rank, ?event, "joining");
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }
}

impl fmt::Debug for JoinOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinOptions")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("listen", &self.listen)
            .field("leader", &self.leader)
            .finish_non_exhaustive()
    }
}
