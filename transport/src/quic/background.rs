//! Whether bulk is on its way: only then does anything wait behind what nobody waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Bulk counts as on its way for so long after the last piece of it was handed over: it is not known when it has left.
const HOLD: Duration = Duration::from_millis(100);

/// The bulk of one process, towards whomever: all of it shares the way out.
#[derive(Debug, Clone)]
pub(crate) struct Background(Arc<State>);

#[derive(Debug)]
struct State {
    born: Instant,
    /// Pieces that are being handed over.
    pieces: AtomicUsize,
    /// Microseconds from `born` until which there is bulk.
    until_us: AtomicU64,
}

impl Background {
    pub(crate) fn new() -> Self {
        let (pieces, until_us) = Default::default();
        Self(Arc::new(State { born: Instant::now(), pieces, until_us }))
    }

    /// There is bulk while what this gives lives, and for a while after.
    pub(crate) fn piece(&self) -> Piece<'_> {
        self.0.pieces.fetch_add(1, Ordering::Relaxed);
        Piece(&self.0)
    }

    pub(crate) fn is_there(&self, now: Instant) -> bool {
        let state = &self.0;
        state.pieces.load(Ordering::Relaxed) > 0 || state.us(now) < state.until_us.load(Ordering::Relaxed)
    }
}

impl State {
    fn us(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.born).as_micros() as u64
    }
}

/// A piece of bulk that is being handed over.
#[must_use]
pub(crate) struct Piece<'a>(&'a State);

impl Drop for Piece<'_> {
    fn drop(&mut self) {
        let until = self.0.us(Instant::now()) + HOLD.as_micros() as u64;
        self.0.until_us.fetch_max(until, Ordering::Relaxed);
        self.0.pieces.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_is_there_while_it_is_handed_over_and_a_while_after() {
        let background = Background::new();
        assert!(!background.is_there(Instant::now()));
        let piece = background.piece();
        assert!(background.is_there(Instant::now() + 10 * HOLD));
        drop(piece);
        assert!(background.is_there(Instant::now()));
        assert!(!background.is_there(Instant::now() + 2 * HOLD));
    }
}
