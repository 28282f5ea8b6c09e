//! Sequences and their cache blocks. Every rank applies the same admissions and the same sampled ids in the
//! same order, so that all hold the same state without asking each other.

use crate::sampling::Sampling;
use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Positions per cache block.
pub(crate) const BLOCK: usize = exflow_shaders::KV_BLOCK;

/// A sequence's start, as rank 0 announces it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Admission {
    /// Never reused.
    pub(crate) id: u32,
    /// The rank that prefills it.
    pub(crate) home: Rank,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: u32,
    pub(crate) ignore_eos: bool,
    pub(crate) sampling: Sampling,
    /// Tokens to go on with in place of those sampled (teacher forcing).
    pub(crate) forced: Vec<u32>,
    /// Whether routes are handed to the driver.
    pub(crate) capture_routes: bool,
    /// Whether the logits of every position are handed to the driver.
    pub(crate) capture_logits: bool,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended the text.
    Stop,
    /// The token limit or the model's context was reached.
    Length,
}

#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub(crate) start: Admission,
    /// Sampled so far; the last one is the token of the next decode step.
    pub(crate) output: Vec<u32>,
    /// Where that token starts.
    pub(crate) residence: Rank,
    pub(crate) prefilled: bool,
    /// Cache blocks, by position / [`BLOCK`].
    pub(crate) blocks: Vec<u32>,
}

impl Sequence {
    /// The cache slot of a position.
    pub(crate) fn slot(&self, position: u32) -> u32 {
        let block = self.blocks[position as usize / BLOCK];
        block * BLOCK as u32 + position % BLOCK as u32
    }

    /// The next decode step's token and its position.
    pub(crate) fn next_token(&self) -> Option<(u32, u32)> {
        let token = *self.output.last()?;
        Some((token, (self.start.prompt.len() + self.output.len() - 1) as u32))
    }
}

/// How many positions an admission needs cache for.
pub(crate) fn positions_needed(prompt: usize, max_tokens: usize, context: usize) -> usize {
    (prompt + max_tokens).min(context).max(prompt)
}

/// All sequences that run, in order of admission.
pub(crate) struct Sequences {
    pub(crate) running: BTreeMap<u32, Sequence>,
    free: Vec<u32>,
    context: usize,
    eos: Vec<u32>,
}

impl Sequences {
    pub(crate) fn new(blocks: usize, context: usize, eos: Vec<u32>) -> Self {
        Self { running: BTreeMap::new(), free: (0..blocks as u32).rev().collect(), context, eos }
    }

    /// Cache blocks in use, and all that there are.
    pub(crate) fn blocks(&self) -> (u64, u64) {
        let used: usize = self.running.values().map(|s| s.blocks.len()).sum();
        (used as u64, (used + self.free.len()) as u64)
    }

    /// Whether the cache has room for one more.
    pub(crate) fn fits(&self, prompt: usize, max_tokens: usize) -> bool {
        positions_needed(prompt, max_tokens, self.context).div_ceil(BLOCK) <= self.free.len()
    }

    /// Starts a sequence; `false` where the cache has no room, which rank 0 has ruled out.
    pub(crate) fn admit(&mut self, start: Admission) -> bool {
        let positions = positions_needed(start.prompt.len(), start.max_tokens as usize, self.context);
        let needed = positions.div_ceil(BLOCK);
        if needed > self.free.len() {
            return false;
        }
        let blocks = self.free.split_off(self.free.len() - needed);
        let residence = start.home;
        let id = start.id;
        self.running.insert(id, Sequence { start, output: Vec::new(), residence, prefilled: false, blocks });
        true
    }

    /// Takes note of a sampled token. Returns the token that counts (a forced one in its place), and why the
    /// sequence ended, where it did; its blocks are free then. A token that ends the text is not put out.
    pub(crate) fn sampled(
        &mut self,
        id: u32,
        token: u32,
        residence: Rank,
    ) -> Option<(u32, Option<FinishReason>)> {
        let sequence = self.running.get_mut(&id)?;
        let token = sequence.start.forced.get(sequence.output.len()).copied().unwrap_or(token);
        sequence.prefilled = true;
        sequence.residence = residence;
        let ended = !sequence.start.ignore_eos && self.eos.contains(&token);
        if !ended {
            sequence.output.push(token);
        }
        let tokens = sequence.start.prompt.len() + sequence.output.len();
        let finish = match ended {
            true => Some(FinishReason::Stop),
            false if sequence.output.len() >= sequence.start.max_tokens as usize => {
                Some(FinishReason::Length)
            }
            false if tokens > self.context => Some(FinishReason::Length),
            false => None,
        };
        if finish.is_some() {
            self.cancel(id);
        }
        Some((token, finish))
    }

    /// Ends a sequence that nobody waits for any more; its blocks are free then.
    pub(crate) fn cancel(&mut self, id: u32) {
        if let Some(gone) = self.running.remove(&id) {
            self.free.extend(gone.blocks.into_iter().rev());
        }
    }

    /// The most rows that a step may ask the head for, on all ranks together: one of each sequence, or each
    /// position of a prompt where logits are captured.
    pub(crate) fn heads(&self, decode: bool) -> usize {
        let of = |s: &Sequence| if !decode && s.start.capture_logits { s.start.prompt.len() } else { 1 };
        self.running.values().filter(|s| s.prefilled == decode).map(of).sum()
    }

    /// The sequences whose prompts come next, up to `limit` tokens but at least one.
    pub(crate) fn to_prefill(&self, limit: usize) -> Vec<u32> {
        let mut tokens = 0;
        let waiting = self.running.values().filter(|s| !s.prefilled);
        let fits = |s: &&Sequence| {
            let first = tokens == 0;
            tokens += s.start.prompt.len();
            first || tokens <= limit
        };
        waiting.take_while(fits).map(|s| s.start.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(id: u32, prompt: usize, max_tokens: u32) -> Admission {
        Admission {
            id,
            home: Rank(0),
            prompt: vec![1; prompt],
            max_tokens,
            ignore_eos: false,
            sampling: Sampling::default(),
            forced: Vec::new(),
            capture_routes: false,
            capture_logits: false,
        }
    }

    #[test]
    fn blocks_come_back_when_a_sequence_ends() {
        let mut sequences = Sequences::new(4, 64, vec![9]);
        assert!(sequences.admit(admission(1, 20, 10)));
        assert!(sequences.fits(20, 10) && !sequences.fits(30, 10));
        assert_eq!(sequences.sampled(1, 5, Rank(0)), Some((5, None)));
        assert_eq!(sequences.sampled(1, 9, Rank(0)), Some((9, Some(FinishReason::Stop))));
        assert!(sequences.fits(54, 10), "all four blocks are free");
    }

    #[test]
    fn a_context_that_is_full_ends_a_sequence() {
        let mut sequences = Sequences::new(4, 32, vec![]);
        assert!(sequences.admit(admission(1, 32, 100)));
        assert_eq!(sequences.sampled(1, 5, Rank(0)), Some((5, Some(FinishReason::Length))));
    }

    #[test]
    fn prefill_takes_whole_prompts_in_order() {
        let mut sequences = Sequences::new(64, 512, vec![]);
        for (id, prompt) in [(1, 300), (2, 200), (3, 100)] {
            assert!(sequences.admit(admission(id, prompt, 1)));
        }
        assert_eq!(sequences.to_prefill(512), [1, 2]);
        assert_eq!(sequences.to_prefill(10), [1], "one at least");
    }
}
