//! Expert placement: pure numbers, no sockets, no GPU, no clock of its own.
//!
//! A [`RoutingTrace`] is counted into an [`Affinity`]; [`solve`] turns it and a [`Topology`] into a
//! [`PlacementTable`] with its cost and a proven lower bound; [`PlacementTable::route`] plans the way of
//! a token; [`score_trace`] says how good a table is on tokens that were not profiled.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

mod affinity;
mod assign;
mod bound;
mod capacity;
mod clock;
mod cost;
mod evict;
mod generate;
mod ids;
mod interchange;
mod load;
pub mod npy;
mod outlook;
mod reconsider;
mod replicas;
mod rng;
mod route;
mod score;
mod simulate;
mod solve;
mod table;
mod topology;
mod trace;

pub use affinity::{Affinity, AffinityError};
pub use capacity::{Balance, Capacity, CapacityError, Memory};
pub use clock::{Clock, StdClock};
pub use cost::Weights;
pub use evict::Shortage;
pub use generate::Generator;
pub use ids::{ExpertId, HostId, LayerId, Rank};
pub use interchange::{TableFormat, TableShape};
pub use outlook::Outlook;
pub use reconsider::{MoveTerms, Reconsidered, reconsider};
pub use rng::Rng;
pub use route::{Route, Strategy, UnknownStrategy};
pub use score::{Score, score_affinity, score_trace, score_trace_on};
pub use simulate::{SimulateError, SimulateOptions, Simulation, simulate};
pub use solve::{SolveError, SolveOptions, SolveProgress, baselines, solve};
pub use table::{Moment, PlacementTable, Replica, TABLE_VERSION, TableError};
pub use topology::{Link, Links, RankSpec, Topology, TopologyError};
pub use trace::{RoutingTrace, TraceError};
