//! Sequences and their cache blocks. Every rank applies the same orders and the same sampled ids, so that all hold
//! the same state without asking each other. Blocks are given and taken by orders alone, in the order in which rank 0
//! gave them: which block is whose does not depend on when a sampled id is heard of.

use super::tables::Edition;
use crate::EngineError;
use crate::sampling::{Logprobs, Sampling};
use exflow_placement::Rank;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
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
    /// The placement table that its prompt goes by.
    pub(crate) edition: Edition,
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
    /// The placement table that it went by.
    pub(crate) edition: Edition,
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

/// What a token comes to.
struct Next {
    /// A forced one in place of the sampled one.
    token: u32,
    finish: Option<FinishReason>,
    stale: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sequence {
    pub(crate) start: Admission,
    /// Sampled so far, as far as it was heard of; the last one is the token of the next decode step.
    pub(crate) output: Vec<u32>,
    /// The placement table that its next token goes by, as far as rank 0's word has come.
    pub(crate) edition: Edition,
    /// The one that the last token went by of which was heard.
    pub(crate) went_by: Edition,
    /// In rounds: whether the last step sampled one more, of which only the rank that did knows yet.
    pub(crate) unheard: bool,
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

    /// The length that a rotary base which grows with the text goes by at a position.
    pub(crate) fn known_at(&self, position: u32) -> usize {
        (self.start.known as usize).max(position as usize + 1)
    }

    /// The next decode step's token and its position; none while it is prefilled, or once it ended.
    pub(crate) fn next_token(&self) -> Option<(u32, u32)> {
        let token = *self.output.last().filter(|_| self.finished.is_none() && !self.stale)?;
        Some((token, self.tokens() as u32 - 1))
    }

    /// Whether the next step may decode it, by what all ranks know: the token that was not heard of yet may still turn
    /// out to end the text.
    fn may_decode(&self, sequences: &Sequences) -> bool {
        match self.unheard {
            false => self.next_token().is_some(),
            true => {
                let (finished, full) = (self.finished.is_some(), self.is_full(1, sequences.context));
                !finished && !full && !self.is_outgrown(1, sequences.remade_beyond)
            }
        }
    }

    /// Whether `more` tokens fill what was asked for, or the model's context.
    fn is_full(&self, more: usize, context: usize) -> bool {
        self.output.len() + more >= self.start.max_tokens as usize || self.tokens() + more > context
    }

    /// Whether `more` tokens make the text longer than what its keys were made for.
    fn is_outgrown(&self, more: usize, remade_beyond: Option<usize>) -> bool {
        remade_beyond
            .is_some_and(|limit| self.tokens() + more > limit && (self.start.known as usize) <= limit)
    }

    /// The placement table that a position goes by which begins its way now.
    pub(crate) fn edition_at(&self, position: u32) -> Edition {
        let of_prompt = (position as usize) < self.start.prompt.len();
        if of_prompt { self.start.edition } else { self.edition }
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
    /// Ids from here on have not been admitted yet.
    unseen: u32,
    /// The most blocks that were held at once since somebody asked.
    peak: usize,
}

/// Where keys and values go that a peer made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Into the cache.
    Granted,
    /// They came before this rank carried out the order that makes room for them.
    Early,
    /// Their sequence ended.
    Ended,
}

impl Sequences {
    pub(crate) fn new(blocks: usize, context: usize, eos: Vec<u32>) -> Self {
        let free = (0..blocks as u32).rev().collect();
        let (running, remade_beyond) = (BTreeMap::new(), None);
        Self { running, free, all: blocks, context, eos, remade_beyond, unseen: 0, peak: 0 }
    }

    /// Has texts that grow beyond so many tokens replayed, so that all of their keys are made for the longer text.
    pub(crate) fn remade_beyond(self, tokens: Option<usize>) -> Self {
        Self { remade_beyond: tokens, ..self }
    }

    /// Cache blocks that sequences hold, and that there are.
    pub(crate) fn blocks(&self) -> (u64, u64) {
        ((self.all - self.free.len()) as u64, self.all as u64)
    }

    /// The most blocks that were held at once since this was asked last.
    pub(crate) fn take_peak(&mut self) -> u64 {
        std::mem::replace(&mut self.peak, self.all - self.free.len()) as u64
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
                let blocks = self.take(start.id, blocks_at_start(&start, self.context))?;
                self.unseen = self.unseen.max(start.id + 1);
                let sequence = Sequence {
                    output: Vec::new(),
                    edition: start.edition,
                    went_by: start.edition,
                    unheard: false,
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
            Some(left) => {
                self.peak = self.peak.max(self.all - left);
                Ok(self.free.split_off(left))
            }
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
    pub(crate) fn sampled(&mut self, id: u32, token: u32) -> Option<Counted> {
        let next = self.outcome(id, token)?;
        let sequence = self.running.get_mut(&id)?;
        let index = sequence.output.len();
        if next.finish != Some(FinishReason::Stop) {
            sequence.output.push(next.token);
        }
        (sequence.finished, sequence.stale, sequence.unheard) = (next.finish, next.stale, false);
        let (request, told) = (sequence.start.request, sequence.start.told as usize);
        Some(Counted { request, token: next.token, finish: next.finish, new: index >= told })
    }

    /// Takes note of the placement table that a sampled token went by.
    pub(crate) fn went_by(&mut self, id: u32, edition: Edition) {
        if let Some(sequence) = self.running.get_mut(&id) {
            sequence.went_by = edition;
        }
    }

    /// Has every sequence's next token go by another placement table.
    pub(crate) fn turn_to(&mut self, edition: Edition) {
        self.running.values_mut().for_each(|sequence| sequence.edition = edition);
    }

    /// Whether no token is under way that goes by another placement table than this one, and none will be.
    pub(crate) fn all_go_by(&self, edition: Edition) -> bool {
        self.running.values().all(|sequence| sequence.went_by == edition && sequence.edition == edition)
    }

    /// What a token that is sampled now comes to; `None` where its sequence does not run any more.
    fn outcome(&self, id: u32, token: u32) -> Option<Next> {
        let sequence = self.running.get(&id).filter(|s| s.finished.is_none())?;
        let token = sequence.start.forced.get(sequence.output.len()).copied().unwrap_or(token);
        let finish = match !sequence.start.ignore_eos && self.eos.contains(&token) {
            true => Some(FinishReason::Stop),
            false => sequence.is_full(1, self.context).then_some(FinishReason::Length),
        };
        let stale = finish.is_none() && sequence.is_outgrown(1, self.remade_beyond);
        Some(Next { token, finish, stale })
    }

    /// The row that follows a token that this rank has just sampled, before anybody is told of it: the row's token and
    /// position. `None` where none follows.
    pub(crate) fn successor(&self, id: u32, token: u32) -> Option<(u32, u32)> {
        let next = self.outcome(id, token).filter(|next| next.finish.is_none() && !next.stale)?;
        Some((next.token, self.running.get(&id)?.tokens() as u32))
    }

    /// Whether the token that is sampled at a position, the last one that is known of or one of those behind it, goes on as the next
    /// step's whatever it is, unless it ends the text: none is forced in its place, there is room for it, and its keys are made as
    /// those before it were.
    pub(crate) fn goes_on(&self, id: u32, position: u32) -> bool {
        self.running.get(&id).is_some_and(|sequence| {
            let Some(unknown) = (position as usize + 1).checked_sub(sequence.tokens()) else { return false };
            let ends = sequence.is_full(unknown + 1, self.context)
                || sequence.is_outgrown(unknown + 1, self.remade_beyond);
            let forced = sequence.start.forced.len() > sequence.output.len() + unknown;
            sequence.finished.is_none() && !ends && !forced && sequence.slot(position + 1).is_some()
        })
    }

    /// How many sequences the next step may decode, by what all ranks know: as many or fewer will be there.
    pub(crate) fn decodable(&self) -> usize {
        self.decoding().count()
    }

    /// They, in order of admission.
    fn decoding(&self) -> impl Iterator<Item = &Sequence> {
        self.running.values().filter(|s| s.may_decode(self))
    }

    /// Those of the sequences that the next step may decode that are in the second of two halves: every other one of each
    /// home, and of homes with one alone every other home, so that few ranks are without work in either.
    pub(crate) fn second_half(&self) -> BTreeSet<u32> {
        let mut of_home: BTreeMap<Rank, Vec<u32>> = BTreeMap::new();
        self.decoding().for_each(|s| of_home.entry(s.start.home).or_default().push(s.start.id));
        let of_homes = of_home.values().enumerate();
        let second = of_homes.flat_map(|(home, ids)| ids.iter().skip((home + 1) % 2).step_by(2));
        second.copied().collect()
    }

    /// Whether there is anything to step for, once all that was sampled is heard of.
    pub(crate) fn is_over(&self, decode: bool) -> bool {
        decode && self.running.values().all(|s| s.next_token().is_none())
    }

    /// Takes note of a step that all ranks ran with what was sampled before it heard of: what it sampled itself is not.
    pub(crate) fn stepped(&mut self, decode: bool) {
        for sequence in self.running.values_mut() {
            let ends_prompt =
                !sequence.chunk().is_empty() && sequence.ordered as usize == sequence.start.prompt.len();
            sequence.unheard = if decode { sequence.next_token().is_some() } else { ends_prompt };
            if !decode {
                sequence.prefilled = sequence.ordered;
            }
        }
    }

    /// Takes note of a sequence that had no part in that step: nothing of it was sampled.
    pub(crate) fn sat_out(&mut self, id: u32) {
        if let Some(sequence) = self.running.get_mut(&id) {
            sequence.unheard = false;
        }
    }

    /// Where keys and values of a position go.
    pub(crate) fn standing(&self, id: u32, position: u32) -> Standing {
        match self.running.get(&id) {
            Some(sequence) if sequence.slot(position).is_some() => Standing::Granted,
            Some(_) => Standing::Early,
            None if id >= self.unseen => Standing::Early,
            None => Standing::Ended,
        }
    }

    /// The sequences with a part of their prompt to prefill, in order of admission.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &Sequence> {
        self.running.values().filter(|s| !s.chunk().is_empty())
    }

    /// The most rows that a step may ask the head for, on all ranks together: one of each sequence, or each
    /// position of a prompt where logits are captured.
    pub(crate) fn heads(&self, decode: bool) -> usize {
        let of_prompt = |s: &Sequence| match s.start.capture_logits {
            true => s.chunk().len(),
            false => usize::from(s.ordered as usize == s.start.prompt.len()),
        };
        match decode {
            true => self.decodable(),
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

/// Blocks that an admission comes with: those of its prompt and of its first token, which is fed before any order that
/// was made after the prompt is carried out.
pub(super) fn blocks_at_start(start: &Admission, context: usize) -> usize {
    let fed = start.prompt.len() + usize::from(start.max_tokens > 1);
    fed.min(context.max(start.prompt.len())).div_ceil(BLOCK)
}

#[cfg(test)]
#[path = "sequence_tests.rs"]
mod tests;
