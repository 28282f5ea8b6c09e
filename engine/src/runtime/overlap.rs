//! What may run while rows travel, in rounds, and whether it pays, by what waiting and working were seen to take.

use crate::options::Overlap;

/// A mean in which what was seen lately counts most.
#[derive(Debug, Clone, Copy, Default)]
struct Lately(Option<f64>);

impl Lately {
    /// Share of the newest value.
    const WEIGHT: f64 = 0.125;

    fn take(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + Self::WEIGHT * (value - mean)));
    }
}

/// Whether the rows of a peer start before those of others have come. Starting them by themselves costs one launch more,
/// and saves it where the others' rows take longer to come than that: their launch then finds less to do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Peers {
    /// Seconds from the first rows that came alone until all had.
    gap: Lately,
    /// Seconds of starting what has come.
    start: Lately,
}

impl Peers {
    /// Whether to start what has come, now that others are to be waited for.
    pub(crate) fn start_now(&self, overlap: Overlap) -> bool {
        match overlap {
            Overlap::Off | Overlap::Own => false,
            Overlap::Peers => true,
            Overlap::Auto => {
                matches!((self.gap.0, self.start.0), (Some(gap), Some(start)) if gap > start)
            }
        }
    }

    /// The others' rows came so many seconds after the first; 0 where nobody had to be waited for.
    pub(crate) fn waited(&mut self, seconds: f64) {
        self.gap.take(seconds);
    }

    /// Starting what had come took so many seconds.
    pub(crate) fn started(&mut self, seconds: f64) {
        self.start.take(seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_start_by_themselves_where_others_take_longer_than_a_launch() {
        let mut peers = Peers::default();
        assert!(!peers.start_now(Overlap::Auto), "nothing is known yet");
        assert!(peers.start_now(Overlap::Peers) && !peers.start_now(Overlap::Own));
        peers.started(1e-4);
        peers.waited(1e-3);
        assert!(peers.start_now(Overlap::Auto));
        (0..40).for_each(|_| peers.waited(2e-5));
        assert!(!peers.start_now(Overlap::Auto), "the links became fast");
        (0..40).for_each(|_| peers.waited(5e-4));
        assert!(peers.start_now(Overlap::Auto));
        (0..40).for_each(|_| peers.started(6e-4));
        assert!(!peers.start_now(Overlap::Auto), "launches became dear");
    }
}
