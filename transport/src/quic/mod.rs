//! Ranks that talk over QUIC, within one process or between hosts. Nothing outside this folder names quinn.

mod communicator;
mod congestion;
mod endpoint;
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
pub use options::{
    Congestion, DriverThreads, ETHERNET_UDP_PAYLOAD, JUMBO_UDP_PAYLOAD, JoinEvent, JoinObserver, JoinOptions,
    MIN_UDP_PAYLOAD, QuicOptions,
};

use crate::TransportError;
use crate::identity::{ClusterAuthority, DEFAULT_VALIDITY};
use endpoint::Bound;
use exflow_placement::Rank;
use join::Joined;
use runtime::RuntimeThread;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use tls::Tls;

/// A rank that listens and has not joined yet.
pub struct Listener {
    options: Arc<JoinOptions>,
    bound: Bound,
    runtime: Arc<RuntimeThread>,
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
        let tls = Tls::new(&options.identity)?;
        let bound = {
            let _within = runtime.handle().enter();
            endpoint::bind(options.listen, &tls, &options.quic)
        };
        let bound = bound.map_err(|error| TransportError::System {
            rank: options.rank,
            what: format!("cannot listen on UDP {}", options.listen),
            cause: error.to_string(),
        })?;
        options.tell(&JoinEvent::Listening { address: bound.address });
        Ok(Self { options: Arc::new(options), bound, runtime })
    }

    /// Where this rank listens.
    pub fn local_address(&self) -> SocketAddr {
        self.bound.address
    }

    /// Waits until the group is complete.
    pub fn join(self) -> Result<QuicCommunicator, TransportError> {
        self.begin().wait()
    }

    fn begin(self) -> Joining {
        let (options, address) = (self.options, self.bound.address);
        let result = self.runtime.launch(join::join(self.bound, Arc::clone(&options)));
        Joining { options, address, result, runtime: self.runtime }
    }
}

/// A rank that is joining on its driver's thread.
struct Joining {
    options: Arc<JoinOptions>,
    address: SocketAddr,
    result: mpsc::Receiver<Result<Joined, TransportError>>,
    runtime: Arc<RuntimeThread>,
}

impl Joining {
    fn wait(self) -> Result<QuicCommunicator, TransportError> {
        let rank = self.options.rank;
        let ended = || TransportError::System {
            rank,
            what: "the driver's thread ended while joining".into(),
            cause: "see its panic message".into(),
        };
        let joined = self.result.recv().map_err(|_| ended())??;
        let JoinOptions { world_size, quic, .. } = &*self.options;
        Ok(QuicCommunicator::new(rank, *world_size, joined, quic, self.address, self.runtime))
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
            leader: joining.first().map(|leader| leader.address.to_string()),
            quic: options.clone(),
            ..JoinOptions::new(rank, n, identity)
        };
        let runtime = shared.clone().map_or_else(|| start_runtime(rank), Ok)?;
        joining.push(Listener::bind_on(join, runtime)?.begin());
    }
    joining.into_iter().map(Joining::wait).collect()
}

fn start_runtime(rank: Rank) -> Result<Arc<RuntimeThread>, TransportError> {
    RuntimeThread::start(format!("exflow-quic-{rank}")).map_err(|error| TransportError::System {
        rank,
        what: "cannot start the driver's thread".into(),
        cause: error.to_string(),
    })
}
