//! Time, handed in: the solver asks a `Clock` and owns none.

use std::time::{Duration, Instant};

/// Time since some moment that does not change.
pub trait Clock: Send + Sync {
    /// Time elapsed.
    fn elapsed(&self) -> Duration;
}

/// The system's monotonic clock: the one place of this crate that reads it, for callers at the edge.
#[derive(Debug, Clone, Copy)]
pub struct StdClock(Instant);

impl StdClock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Clock for StdClock {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}
