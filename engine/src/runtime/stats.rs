//! What one rank counts while it runs; the driver adds the ranks up.

use exflow_transport::{ByteClass, WireStats};
use serde::{Deserialize, Serialize};

/// Seconds of decoded tokens on one rank: in flow of each token, in rounds of the rank's steps, by what they went into.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Waited {
    pub(crate) compute: f64,
    pub(crate) dispatch: f64,
    pub(crate) combine: f64,
    pub(crate) context: f64,
    pub(crate) ids: f64,
    pub(crate) queue: f64,
    pub(crate) linger: f64,
}

impl Waited {
    pub(crate) fn add(&mut self, other: &Self) {
        for (mine, theirs) in [
            (&mut self.compute, other.compute),
            (&mut self.dispatch, other.dispatch),
            (&mut self.combine, other.combine),
            (&mut self.context, other.context),
            (&mut self.ids, other.ids),
            (&mut self.queue, other.queue),
            (&mut self.linger, other.linger),
        ] {
            *mine += theirs;
        }
    }
}

/// Counts of one rank since the last report.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct RankStats {
    /// Bytes and rounds of everything.
    pub(crate) wire: WireStats,
    /// Bytes and rounds of decode steps alone.
    pub(crate) decode_wire: WireStats,
    /// Bytes and rounds of prefill steps alone.
    pub(crate) prefill_wire: WireStats,
    pub(crate) decode_steps: u64,
    pub(crate) prefill_steps: u64,
    /// Decode steps, those in two halves counted twice.
    pub(crate) decode_parts: u64,
    /// Decode steps that were submitted with the one before them.
    pub(crate) joined_steps: u64,
    /// Tokens put through decode steps.
    pub(crate) decode_tokens: u64,
    pub(crate) decode_seconds: f64,
    /// Layer transitions of decode tokens, and how many of them stayed on one rank.
    pub(crate) transitions: u64,
    pub(crate) stays: u64,
    /// Rows and partials of decode tokens that went over a link.
    pub(crate) crossings: u64,
    /// In flow: one-way latencies that decode tokens waited for, all layers together.
    pub(crate) latencies: u64,
    /// In flow: submissions, the rows in them, and the time spent in them and in waiting.
    pub(crate) hops: u64,
    pub(crate) hop_rows: u64,
    pub(crate) busy_seconds: f64,
    pub(crate) idle_seconds: f64,
    /// Of those in waiting: with rows that were held back.
    pub(crate) linger_seconds: f64,
    /// In rounds: seconds that this step has waited for contexts so far.
    pub(crate) context_seconds: f64,
    /// In rounds: launches of a peer's rows that did not wait for the others'.
    pub(crate) peer_starts: u64,
    /// What decoded tokens' time went into.
    pub(crate) waited: Waited,
    /// In flow: frames of sequences that had ended.
    pub(crate) dropped: u64,
    /// (token, expert) pairs worked on.
    pub(crate) pairs: u64,
    /// KV cache blocks in use and there are, when the counts were reported.
    pub(crate) kv_blocks: (u64, u64),
    /// The most blocks that were in use since the last report.
    pub(crate) kv_peak_blocks: u64,
    /// Kernels that were made in between: some step waited for each.
    pub(crate) kernels_made: u64,
    /// Rows and columns of the matrices that matrix units make its products of; 0: it uses none.
    pub(crate) matrix_side: u64,
    /// Bytes that the device has allocated then.
    pub(crate) memory_bytes: Option<u64>,
}

impl RankStats {
    /// Adds the bytes of one step.
    pub(crate) fn add_step(&mut self, decode: bool, wire: &WireStats) {
        match decode {
            true => self.decode_wire.merge(wire),
            false => self.prefill_wire.merge(wire),
        }
    }
}

/// Exchanges of rows (dispatch and combine) that a rank took part in.
pub(crate) fn row_exchanges(wire: &WireStats) -> u64 {
    let of = |class: ByteClass| wire.rounds.iter().map(|r| r.exchanges[class as usize]).max().unwrap_or(0);
    of(ByteClass::Dispatch) + of(ByteClass::Combine)
}

/// Bytes of a class as they went over the wire; payload alone where ranks share memory.
pub(crate) fn class_bytes(wire: &WireStats, class: ByteClass) -> u64 {
    let sum = wire.class(class);
    sum.wire_bytes_sent.max(sum.payload_bytes_sent)
}
