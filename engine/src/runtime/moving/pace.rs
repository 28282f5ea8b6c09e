//! How much of its time a rank gives to experts that move while requests run.

use std::time::{Duration, Instant};

/// A piece is to take so long: a step is held up by no more.
const PIECE: Duration = Duration::from_millis(1);
/// Between two pieces lies so many times what the first one took: in flow a rank may have thousands of hops a second, and
/// would do nothing but take experts in.
const REST: u32 = 12;
/// Bytes of a piece, least and most.
const BYTES: (usize, usize) = (64 << 10, 64 << 20);

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes of the next piece.
    pub(super) bytes: usize,
    /// No piece before.
    next: Option<Instant>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { bytes: 512 << 10, next: None }
    }
}

impl Pace {
    /// Whether others have their turn.
    pub(super) fn rests(&self) -> bool {
        self.next.is_some_and(|next| Instant::now() < next)
    }

    /// A piece took so long.
    pub(super) fn took(&mut self, time: Duration) {
        self.next = Some(Instant::now() + REST * time);
        let bytes = match time {
            time if time < PIECE / 2 => 2 * self.bytes,
            time if time > 2 * PIECE => self.bytes / 2,
            _ => self.bytes,
        };
        self.bytes = bytes.clamp(BYTES.0, BYTES.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_as_large_as_their_time_allows_and_others_have_most_of_it() {
        let mut pace = Pace::default();
        assert!(!pace.rests(), "nothing was held up yet");
        let first = pace.bytes;
        pace.took(PIECE / 4);
        assert_eq!(pace.bytes, 2 * first);
        pace.took(PIECE);
        assert_eq!(pace.bytes, 2 * first, "as long as it is to take");
        pace.took(Duration::from_secs(60));
        assert!(pace.bytes == first && pace.rests());
        (0..60).for_each(|_| pace.took(Duration::ZERO));
        assert!(pace.bytes == BYTES.1 && !pace.rests());
        (0..60).for_each(|_| pace.took(3 * PIECE));
        assert_eq!(pace.bytes, BYTES.0);
    }
}
