//! What runs on a rank: sequences, contexts, steps with their exchanges, and the loop around them.

mod agree;
pub(crate) mod bounds;
mod coherence;
mod experts;
mod flow;
mod frames;
mod measure;
mod moving;
mod outlet;
mod overlap;
mod rounds;
mod scheduler;
mod sequence;
mod stats;
mod step;
mod tables;
mod worker;

pub(crate) use flow::board::PATIENCE;
pub(crate) use flow::{BULK_BYTES, BULK_HOPS, latencies};
pub(crate) use measure::Measured;
pub(crate) use moving::{MoveEnd, Stock};
pub(crate) use outlet::Outlet;
pub use overlap::SETTLING_STEPS;
pub(crate) use overlap::Verdicts;
pub(crate) use scheduler::{CHUNK, MAX_RUNNING};
pub use sequence::FinishReason;
pub(crate) use sequence::{Admission, BLOCK, positions_needed};
pub(crate) use stats::{RankStats, Waited, class_bytes, row_exchanges};
pub(crate) use step::{BULK_LAYERS, expected};
pub(crate) use worker::{Captured, Command, Ended, Event, Worker, WorkerOptions};
