//! Sequences and their cache blocks. Every rank applies the same orders and the same sampled ids, so that all hold
//! the same state without asking each other. Blocks are given and taken by orders alone, in the order in which rank 0
//! gave them: which block is whose does not depend on when a sampled id is heard of.

use crate::EngineError;
use crate::sampling::{Logprobs, Sampling};
use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// Positions per cache block.
pub(crate) const BLOCK: usize = exflow_shaders::KV_BLOCK;

/// A sequence's start, as rank 0 announces it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Admission {
    /// What ranks know it by; never reused: who is preempted comes back under another one.
    pub(crate) id: u32,
    /// What the driver knows it by, for good; later requests have larger ones.
    pub(crate) request: u32,
    /// The rank that prefills it.
    pub(crate) home: Rank,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: u32,
    pub(crate) ignore_eos: bool,
    pub(crate) sampling: Sampling,
    /// How many alternatives are told with each token and its log-probability.
    pub(crate) logprobs: Option<u16>,
    /// Tokens to go on with in place of those sampled: given ones, or those sampled before it was preempted.
    pub(crate) forced: Vec<u32>,
    /// How many of them were told to the driver already.
    pub(crate) told: u32,
    /// Positions that were known when it was first submitted: what a rotary base that grows with the text goes by.
    pub(crate) known: u32,
    /// Whether routes are handed to the driver.
    pub(crate) capture_routes: bool,
    /// Whether the logits of every position are handed to the driver.
    pub(crate) capture_logits: bool,
}

/// What rank 0 orders about sequences. Every rank applies all of them, in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Starts a sequence and gives it the blocks of its prompt.
    Admit(Admission),
    /// Gives a sequence so many more blocks.
    Grant { sequence: u32, blocks: u32 },
    /// Has a prompt prefilled up to a position (exclusive).
    Prefill { sequence: u32, to: u32 },
    /// Takes a sequence's blocks back. Rank 0 submits it again.
    Preempt(u32),
    /// Ends a sequence, finished or not, and takes its blocks back.
    End(u32),
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

/// A sampled token, as the rank that sampled it tells all others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sampled {
    pub(crate) sequence: u32,
    pub(crate) token: u32,
    pub(crate) logprobs: Option<Logprobs>,
}

/// What a sampled token came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) request: u32,
    /// A forced one in place of the sampled one.
    pub(crate) token: u32,
    pub(crate) finish: Option<FinishReason>,
    /// Whether the driver has not heard of it yet.
    pub(crate) new: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sequence {
    pub(crate) start: Admission,
    /// Sampled so far; the last one is the token of the next decode step.
    pub(crate) output: Vec<u32>,
    /// Where that token starts.
    pub(crate) residence: Rank,
    /// Positions of the prompt that are in the cache.
    pub(crate) prefilled: u32,
    /// Positions of the prompt that rank 0 ordered to be there.
    pub(crate) ordered: u32,
    /// Why it ended; its blocks are its own until rank 0 ends it.
    pub(crate) finished: Option<FinishReason>,
    /// Its text outgrew what its keys were made for: it waits until rank 0 has it replayed.
    pub(crate) stale: bool,
    /// Cache blocks, by position / [`BLOCK`].
    blocks: Vec<u32>,
}

impl Sequence {
    /// The cache slot of a position; `None` where no block was granted for it yet.
    pub(crate) fn slot(&self, position: u32) -> Option<u32> {
        let block = self.blocks.get(position as usize / BLOCK)?;
        Some(block * BLOCK as u32 + position % BLOCK as u32)
    }

    /// Its cache blocks, by position / [`BLOCK`].
    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Positions that it has blocks for.
    pub(crate) fn capacity(&self) -> usize {
        self.blocks.len() * BLOCK
    }

    /// Tokens of its text, prompt and output.
    pub(crate) fn tokens(&self) -> usize {
        self.start.prompt.len() + self.output.len()
    }

    /// The next decode step's token and its position; none while it is prefilled, or once it ended.
    pub(crate) fn next_token(&self) -> Option<(u32, u32)> {
        let token = *self.output.last().filter(|_| self.finished.is_none() && !self.stale)?;
        Some((token, self.tokens() as u32 - 1))
    }

    /// The positions of the prompt that are to be prefilled next.
    pub(crate) fn chunk(&self) -> Range<u32> {
        self.prefilled..self.ordered
    }

    /// What to submit so that it goes on where it was: its tokens are replayed, and not told again.
    pub(crate) fn again(self) -> Admission {
        let told = self.start.told.max(self.output.len() as u32);
        let known = if self.stale { self.tokens() as u32 } else { self.start.known };
        let forced = match self.output.len() > self.start.forced.len() {
            true => self.output,
            false => self.start.forced,
        };
        Admission { forced, told, known, ..self.start }
    }
}

/// How many positions an admission needs cache for, to its very end.
pub(crate) fn positions_needed(prompt: usize, max_tokens: usize, context: usize) -> usize {
    (prompt + max_tokens).min(context).max(prompt)
}

/// All sequences that run, in order of admission.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sequences {
    pub(crate) running: BTreeMap<u32, Sequence>,
    free: Vec<u32>,
    all: usize,
    pub(super) context: usize,
    eos: Vec<u32>,
    /// Tokens beyond which all keys of a text are made anew.
    remade_beyond: Option<usize>,
}

impl Sequences {
    pub(crate) fn new(blocks: usize, context: usize, eos: Vec<u32>) -> Self {
        let free = (0..blocks as u32).rev().collect();
        Self { running: BTreeMap::new(), free, all: blocks, context, eos, remade_beyond: None }
    }

    /// Has texts that grow beyond so many tokens replayed, so that all of their keys are made for the longer text.
    pub(crate) fn remade_beyond(self, tokens: Option<usize>) -> Self {
        Self { remade_beyond: tokens, ..self }
    }

    /// Cache blocks that sequences hold, and that there are.
    pub(crate) fn blocks(&self) -> (u64, u64) {
        ((self.all - self.free.len()) as u64, self.all as u64)
    }

    /// Cache blocks that nobody holds.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Carries an order out. Returns the sequence that it took away.
    ///
    /// # Errors
    /// Where there are no blocks for it, which rank 0 has ruled out.
    pub(crate) fn apply(&mut self, order: Order) -> Result<Option<Sequence>, EngineError> {
        match order {
            Order::Admit(start) => {
                let blocks = self.take(start.id, blocks_at_start(&start))?;
                let sequence = Sequence {
                    residence: start.home,
                    output: Vec::new(),
                    prefilled: 0,
                    ordered: 0,
                    finished: None,
                    stale: false,
                    blocks,
                    start,
                };
                self.running.insert(sequence.start.id, sequence);
            }
            Order::Grant { sequence, blocks } => {
                if self.running.contains_key(&sequence) {
                    let more = self.take(sequence, blocks as usize)?;
                    self.running.entry(sequence).and_modify(|s| s.blocks.extend(more));
                }
            }
            Order::Prefill { sequence, to } => {
                if let Some(sequence) = self.running.get_mut(&sequence) {
                    sequence.ordered = to.min(sequence.start.prompt.len() as u32);
                }
            }
            Order::Preempt(id) | Order::End(id) => {
                let gone = self.running.remove(&id);
                if let Some(gone) = &gone {
                    self.free.extend(gone.blocks.iter().rev());
                }
                return Ok(gone);
            }
        }
        Ok(None)
    }

    fn take(&mut self, sequence: u32, count: usize) -> Result<Vec<u32>, EngineError> {
        match self.free.len().checked_sub(count) {
            Some(left) => Ok(self.free.split_off(left)),
            None => {
                let free = self.free.len();
                let what =
                    format!("sequence {sequence} was granted {count} cache blocks of {free} free ones");
                Err(EngineError::Internal(what))
            }
        }
    }

    /// Takes note of a sampled token; `None` where its sequence does not run any more. A token that ends the text is
    /// not put out.
    pub(crate) fn sampled(&mut self, id: u32, token: u32, residence: Rank) -> Option<Counted> {
        let sequence = self.running.get_mut(&id).filter(|s| s.finished.is_none())?;
        let index = sequence.output.len();
        let token = sequence.start.forced.get(index).copied().unwrap_or(token);
        sequence.residence = residence;
        let ended = !sequence.start.ignore_eos && self.eos.contains(&token);
        if !ended {
            sequence.output.push(token);
        }
        let full =
            sequence.output.len() >= sequence.start.max_tokens as usize || sequence.tokens() > self.context;
        sequence.finished = match ended {
            true => Some(FinishReason::Stop),
            false => full.then_some(FinishReason::Length),
        };
        let outgrown = |limit| sequence.tokens() > limit && (sequence.start.known as usize) <= limit;
        sequence.stale = sequence.finished.is_none() && self.remade_beyond.is_some_and(outgrown);
        let (request, told) = (sequence.start.request, sequence.start.told as usize);
        Some(Counted { request, token, finish: sequence.finished, new: index >= told })
    }

    /// The sequences with a part of their prompt to prefill, in order of admission.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &Sequence> {
        self.running.values().filter(|s| !s.chunk().is_empty())
    }

    /// Takes note that all ordered chunks are in the cache.
    pub(crate) fn chunks_done(&mut self) {
        self.running.values_mut().for_each(|s| s.prefilled = s.ordered);
    }

    /// The most rows that a step may ask the head for, on all ranks together: one of each sequence, or each
    /// position of a prompt where logits are captured.
    pub(crate) fn heads(&self, decode: bool) -> usize {
        let of_prompt = |s: &Sequence| match s.start.capture_logits {
            true => s.chunk().len(),
            false => usize::from(s.ordered as usize == s.start.prompt.len()),
        };
        match decode {
            true => self.running.values().filter(|s| s.next_token().is_some()).count(),
            false => self.chunks().map(of_prompt).sum(),
        }
    }

    /// What must hold at any time: every block is free or belongs to one sequence, and nobody is past its blocks.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        let mut seen = vec![0; self.all];
        let held = self.running.values().flat_map(|s| &s.blocks);
        self.free.iter().chain(held).for_each(|&block| seen[block as usize] += 1);
        assert!(seen.iter().all(|&n| n == 1), "blocks that are nobody's or two sequences': {seen:?}");
        for s in self.running.values() {
            assert!(s.prefilled <= s.ordered && s.ordered as usize <= s.start.prompt.len());
            assert!(s.start.prompt.len() <= s.capacity());
        }
    }
}

/// Blocks that an admission comes with: those of its prompt.
pub(super) fn blocks_at_start(start: &Admission) -> usize {
    start.prompt.len().div_ceil(BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(id: u32, prompt: usize, max_tokens: u32) -> Order {
        Order::Admit(Admission {
            id,
            request: id,
            prompt: vec![1; prompt],
            max_tokens,
            ..Admission::default()
        })
    }

    #[test]
    fn blocks_come_back_when_rank_0_ends_a_sequence() {
        let mut sequences = Sequences::new(4, 64, vec![9]);
        assert_eq!(sequences.apply(admission(1, 20, 10)).expect("room"), None);
        assert_eq!(sequences.blocks(), (2, 4));
        sequences.apply(Order::Grant { sequence: 1, blocks: 1 }).expect("room");
        assert!(sequences.apply(admission(2, 20, 10)).is_err(), "one is left");
        let counted = sequences.sampled(1, 5, Rank(0)).expect("it runs");
        assert_eq!((counted.token, counted.finish, counted.new), (5, None, true));
        let counted = sequences.sampled(1, 9, Rank(0)).expect("it runs");
        assert_eq!((counted.token, counted.finish), (9, Some(FinishReason::Stop)));
        assert_eq!(sequences.sampled(1, 5, Rank(0)), None, "it ended");
        assert_eq!(sequences.free(), 1);
        sequences.apply(Order::End(1)).expect("no blocks are needed");
        assert_eq!(sequences.free(), 4);
        sequences.check();
    }

    #[test]
    fn a_context_that_is_full_ends_a_sequence() {
        let mut sequences = Sequences::new(4, 32, vec![]);
        sequences.apply(admission(1, 32, 100)).expect("room");
        let counted = sequences.sampled(1, 5, Rank(0)).expect("it runs");
        assert_eq!(counted.finish, Some(FinishReason::Length));
    }

    #[test]
    fn who_is_preempted_comes_back_with_its_tokens() {
        let mut sequences = Sequences::new(4, 64, vec![]);
        sequences.apply(admission(1, 3, 10)).expect("room");
        for token in [5, 6] {
            sequences.sampled(1, token, Rank(0)).expect("it runs");
        }
        let gone = sequences.apply(Order::Preempt(1)).expect("nothing is needed").expect("it ran");
        let again = Admission { id: 2, ..gone.again() };
        assert_eq!((&again.forced[..], again.told, again.request), (&[5, 6][..], 2, 1));
        sequences.apply(Order::Admit(again)).expect("room");
        // Its own tokens again, whatever is sampled this time; then new ones.
        let tokens: Vec<_> = [7, 7, 8].map(|t| sequences.sampled(2, t, Rank(0)).expect("it runs")).to_vec();
        assert_eq!(
            tokens.iter().map(|c| (c.token, c.new)).collect::<Vec<_>>(),
            [(5, false), (6, false), (8, true)]
        );
    }
}
