//! Ranks and bytes: the all-to-all-v of expert parallelism, in process and over QUIC, mutually authenticated.
//!
//! [`Communicator`] is all that the runtime sees. [`local::world`] makes the ranks of one process;
//! [`quic::loopback_world`] makes them talk over real QUIC connections within one process, and [`quic::join`]
//! over any number of processes and hosts. The protocol itself is in [`proto`]: state machines without socket,
//! thread or clock.

pub mod bench;
mod comm;
mod error;
pub mod identity;
mod identity_files;
mod inbox;
pub mod launch;
pub mod link;
pub mod local;
mod os;
mod pool;
pub mod proto;
pub mod quic;
mod stats;

pub use comm::{ByteClass, Communicator, Message, RoundId};
pub use error::{LossCause, TransportError};
pub use os::cpu_time;
pub use pool::Pool;
pub use proto::membership::Refusal;
pub use proto::round::{Arrivals, Violation};
pub use stats::{ClassStats, LinkStats, RoundStats, WireStats};
