//! Memory for payloads that is used again once nobody holds a part of it.

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

/// Blocks that a pool keeps. Enough for the rounds that may be open at once: a payload is dropped soon after its round.
const KEPT: usize = 4;
/// Larger blocks are given back to the system, bytes: making one costs little beside filling it.
const LARGEST: usize = 8 << 20;

/// Buffers for one writer: payloads are cut from blocks, one after the other, and a block whose payloads have all been dropped
/// is filled again. Once the blocks are there, a payload costs no allocation.
///
/// A pool keeps at most 4 blocks of at most 8 MiB each, none before its first payload.
#[derive(Debug)]
pub struct Pool {
    block_bytes: usize,
    /// What is left of each block; the one in use first, then the one that has been full for longest.
    blocks: VecDeque<BytesMut>,
}

impl Pool {
    /// Blocks of `block_bytes`, or as large as the payload that needs one.
    pub fn new(block_bytes: usize) -> Self {
        Self { block_bytes, blocks: VecDeque::with_capacity(KEPT + 1) }
    }

    /// An empty buffer with room for `bytes`; [`Pool::seal`] gives what is left of it back.
    pub fn buffer(&mut self, bytes: usize) -> BytesMut {
        for _ in 0..self.blocks.len() {
            let Some(mut block) = self.blocks.pop_front() else { break };
            if block.try_reclaim(bytes) {
                return block;
            }
            self.blocks.push_back(block);
        }
        BytesMut::with_capacity(self.block_bytes.max(bytes.next_power_of_two()))
    }

    /// What was written, without a copy. The rest of the block is kept for the next payload.
    pub fn seal(&mut self, mut buffer: BytesMut) -> Bytes {
        if buffer.capacity() > LARGEST {
            return buffer.freeze();
        }
        let payload = buffer.split().freeze();
        self.blocks.push_front(buffer);
        self.blocks.truncate(KEPT);
        payload
    }
}

impl Default for Pool {
    /// Blocks of 64 KiB.
    fn default() -> Self {
        Self::new(64 << 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(pool: &mut Pool, bytes: usize, value: u8) -> Bytes {
        let mut buffer = pool.buffer(bytes);
        assert!(buffer.is_empty() && buffer.capacity() >= bytes);
        buffer.resize(bytes, value);
        pool.seal(buffer)
    }

    #[test]
    fn a_payload_that_somebody_holds_is_never_written_over() {
        let mut pool = Pool::new(256);
        let held: Vec<Bytes> = (0..100).map(|n| payload(&mut pool, 60, n)).collect();
        for (n, bytes) in held.iter().enumerate() {
            assert!(bytes.len() == 60 && bytes.iter().all(|byte| usize::from(*byte) == n));
        }
        assert_eq!(pool.blocks.len(), KEPT);
    }

    #[test]
    fn blocks_are_used_again_whatever_sizes_come() {
        let mut pool = Pool::new(256);
        let mut places = std::collections::BTreeSet::new();
        for turn in 0..50 {
            let held: Vec<Bytes> = (0..3).map(|n| payload(&mut pool, 300 + 100 * n, turn)).collect();
            places.extend(held.iter().map(|bytes| bytes.as_ptr() as usize));
        }
        assert!(places.len() <= 2 * KEPT, "{} places", places.len());
    }

    #[test]
    fn blocks_of_an_unusual_size_are_not_kept() {
        let mut pool = Pool::new(256);
        drop(payload(&mut pool, LARGEST + 1, 1));
        assert!(pool.blocks.is_empty());
    }
}
