//! Ranks that talk over QUIC, within one process or between hosts. Nothing outside this folder names quinn.

mod background;
mod communicator;
mod congestion;
mod door;
mod endpoint;
mod heart;
#[cfg(test)]
mod hostile_tests;
mod hub;
mod join;
mod links;
mod lobby;
mod mesh;
mod options;
mod runtime;
mod shaper;
mod socket;
mod tls;
mod wire;

pub use communicator::{LinkReport, QuicCommunicator};
pub use heart::Suspects;
pub use options::{
    Congestion, Decide, DriverThreads, ETHERNET_UDP_PAYLOAD, JUMBO_UDP_PAYLOAD, JoinEvent, JoinObserver,
    JoinOptions, LOOPBACK_UDP_PAYLOAD, Life, MIN_UDP_PAYLOAD, QuicOptions, Ruling,
};
pub use shaper::link_lateness;

use crate::TransportError;
use crate::identity::{ClusterAuthority, DEFAULT_VALIDITY};
use door::Door;
use endpoint::Bound;
use exflow_placement::Rank;
use join::Joined;
use runtime::RuntimeThread;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use tls::Tls;

/// A process that listens, and may join one life of its world after the other.
pub struct Listener {
    core: Arc<Core>,
}

/// What lives as long as a process belongs to a group.
pub(crate) struct Core {
    pub(crate) options: Arc<JoinOptions>,
    pub(crate) bound: Bound,
    pub(crate) door: Arc<Door>,
    pub(crate) suspects: Suspects,
    pub(crate) runtime: Arc<RuntimeThread>,
}

impl Drop for Core {
    fn drop(&mut self) {
        // Whoever waits at the door hears that nobody is there any more.
        self.bound.endpoint.close(wire::CLOSE_LEFT.into(), b"");
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Listener {
    /// Opens the UDP socket.
    pub fn bind(options: JoinOptions) -> Result<Self, TransportError> {
        options.check()?;
        let runtime = start_runtime(options.rank)?;
        Self::bind_on(options, runtime)
    }

    fn bind_on(options: JoinOptions, runtime: Arc<RuntimeThread>) -> Result<Self, TransportError> {
        options.check()?;
        let options = Arc::new(options);
        let tls = Tls::new(&options.identity)?;
        let _within = runtime.handle().enter();
        let bound = endpoint::bind(options.listen, &tls, &options.quic);
        let bound = bound.map_err(|error| TransportError::System {
            rank: options.rank,
            what: format!("cannot listen on UDP {}", options.listen),
            cause: error.to_string(),
        })?;
        options.tell(&JoinEvent::Listening { address: bound.address });
        let door = Arc::new(Door::open(&bound, Arc::clone(&options)));
        let suspects = Suspects::default();
        let core = Arc::new(Core { options, bound, door, suspects, runtime: Arc::clone(&runtime) });
        Ok(Self { core })
    }

    /// Where this process listens.
    pub fn local_address(&self) -> SocketAddr {
        self.core.bound.address
    }

    /// The ranks that are suspect while a world lives.
    pub fn suspects(&self) -> Suspects {
        self.core.suspects.clone()
    }

    /// Waits until the group is complete, for the only life of its world; the first rank of this process.
    pub fn join(self) -> Result<QuicCommunicator, TransportError> {
        self.begin(Life::default()).first()
    }

    /// Waits until a life of the world can start; its ranks of this process, in order. Drop those of the life before
    /// first. While it lives, rank 0 keeps the door: who comes back ends it ([`LossCause::Rejoins`](crate::LossCause)).
    pub fn form(&self, life: Life) -> Result<Vec<QuicCommunicator>, TransportError> {
        self.begin(life).wait(true)
    }

    fn begin(&self, life: Life) -> Joining {
        let result = self.core.runtime.launch(join::join(Arc::clone(&self.core), life));
        Joining { core: Arc::clone(&self.core), result }
    }
}

/// A process that is joining on its driver's thread.
struct Joining {
    core: Arc<Core>,
    result: mpsc::Receiver<Result<Joined, TransportError>>,
}

impl Joining {
    /// `door`: whether others may come while this life lasts.
    fn wait(self, door: bool) -> Result<Vec<QuicCommunicator>, TransportError> {
        let ended = || TransportError::System {
            rank: self.core.options.rank,
            what: "the driver's thread ended while joining".into(),
            cause: "see its panic message".into(),
        };
        let joined = self.result.recv().map_err(|_| ended())??;
        if !door {
            // The group is complete: nobody else is let in.
            self.core.bound.endpoint.set_server_config(None);
        }
        Ok(QuicCommunicator::all(joined, self.core))
    }

    /// The only rank of a process of a world that nobody comes back to.
    fn first(self) -> Result<QuicCommunicator, TransportError> {
        let rank = self.core.options.rank;
        let none = || TransportError::Misuse { rank, what: "a process without ranks".into() };
        let mut ranks = self.wait(false)?.into_iter();
        ranks.next().ok_or_else(none)
    }
}

/// Joins a group whose other ranks are in other processes or on other hosts; ends within
/// [`QuicOptions::join_timeout`] (and a little) with the complete group or a named error.
pub fn join(options: JoinOptions) -> Result<QuicCommunicator, TransportError> {
    Listener::bind(options)?.join()
}

/// `n` ranks of this process, in order, that talk over real QUIC connections on 127.0.0.1, each with an
/// identity of its own from an authority made on the spot.
pub fn loopback_world(n: usize, options: QuicOptions) -> Result<Vec<QuicCommunicator>, TransportError> {
    let authority = ClusterAuthority::new()?;
    let shared = match options.threads {
        DriverThreads::Shared => Some(start_runtime(Rank(0))?),
        DriverThreads::PerRank => None,
    };
    let mut joining: Vec<Joining> = Vec::with_capacity(n);
    for rank in (0..n).map(Rank::from) {
        let identity = authority.issue(rank, DEFAULT_VALIDITY)?;
        let join = JoinOptions {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            leader: joining.first().map(|leader| leader.core.bound.address.to_string()),
            quic: options.clone(),
            ..JoinOptions::new(rank, n, identity)
        };
        let runtime = shared.clone().map_or_else(|| start_runtime(rank), Ok)?;
        joining.push(Listener::bind_on(join, runtime)?.begin(Life::default()));
    }
    joining.into_iter().map(Joining::first).collect()
}

fn start_runtime(rank: Rank) -> Result<Arc<RuntimeThread>, TransportError> {
    RuntimeThread::start(format!("exflow-quic-{rank}")).map_err(|error| TransportError::System {
        rank,
        what: "cannot start the driver's thread".into(),
        cause: error.to_string(),
    })
}
