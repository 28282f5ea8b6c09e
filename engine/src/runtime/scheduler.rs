//! What rank 0 decides about sequences: who starts, which parts of prompts are prefilled when, who gets cache blocks
//! and who gives them back. It sees what [`Sequences`] holds and answers with orders; it waits for nothing and sends
//! nothing, so that every loop can use it.
//!
//! Requests start in order of arrival. A prompt is prefilled in chunks; while others decode, a chunk and a step of
//! theirs take turns, so that nobody waits for longer than a chunk takes. Blocks are granted as texts grow. Where they
//! run short the youngest request gives all of its blocks back and is replayed later; the oldest never does, so that
//! all get done.

use super::sequence::{Admission, BLOCK, Order, Sequence, Sequences, blocks_at_start};
use super::tables::Edition;
use exflow_placement::Rank;
use std::collections::{BTreeMap, BTreeSet};

/// Sequences that run at once, at most.
pub(crate) const MAX_RUNNING: usize = 256;
/// Tokens of prompts in one step, on all ranks together, while nobody decodes.
pub(crate) const CHUNK: usize = 1024;
/// The same while others decode, who wait for it.
const CHUNK_BESIDE_DECODE: usize = 256;
/// Logits that one step may keep where all of them are captured.
const CAPTURED_LOGITS: usize = 16 << 20;
/// Positions beyond what is known of a sequence that it may need before the next orders are carried out: those of the
/// token that the last step sampled, and of the one that it samples meanwhile.
const LAG: usize = 2;
/// Positions that a sequence is granted ahead where there is room: the next step must not wait for an order.
const AHEAD: usize = BLOCK / 2;

/// Rank 0's policy.
pub(crate) struct Scheduler {
    /// Ranks that prompts may be prefilled on.
    homes: Vec<Rank>,
    /// The placement table that prompts of those who start go by.
    pub(crate) edition: Edition,
    /// V, by which captured logits are bounded.
    vocab: usize,
    next_id: u32,
    /// By request: the oldest comes first.
    waiting: BTreeMap<u32, Admission>,
    cancelled: Vec<u32>,
    /// Whether the last plan ordered chunks.
    prefilling: bool,
}

/// Blocks and orders while a plan is made.
struct Draft<'a> {
    sequences: &'a Sequences,
    free: usize,
    gone: BTreeSet<u32>,
    orders: Vec<Order>,
}

impl Scheduler {
    /// For a world in which `homes` may prefill, and a vocabulary of `vocab`.
    pub(crate) fn new(homes: Vec<Rank>, vocab: usize) -> Self {
        let (waiting, cancelled) = (BTreeMap::new(), Vec::new());
        let edition = Edition::default();
        Self { homes, edition, vocab, next_id: 0, waiting, cancelled, prefilling: false }
    }

    /// Takes a request in. Its `id` and `home` are set when it starts.
    pub(crate) fn submit(&mut self, admission: Admission) {
        self.waiting.insert(admission.request, admission);
    }

    /// Ends a request that nobody waits for any more.
    pub(crate) fn cancel(&mut self, request: u32) {
        if self.waiting.remove(&request).is_none() {
            self.cancelled.push(request);
        }
    }

    /// Whether nobody waits to start.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// A preempted sequence goes back to where its age puts it; call it with what [`Order::Preempt`] took away.
    pub(crate) fn put_back(&mut self, gone: Sequence) {
        if gone.finished.is_none() && !self.cancelled.contains(&gone.start.request) {
            self.submit(gone.again());
        }
    }

    /// The orders that come next. `sequences` may lag behind by one step, and these orders may be carried out a step
    /// later: every sequence that decodes may gain two tokens before, or end.
    pub(crate) fn plan(&mut self, sequences: &Sequences) -> Vec<Order> {
        let mut draft =
            Draft { sequences, free: sequences.free(), gone: BTreeSet::new(), orders: Vec::new() };
        for (&id, sequence) in &sequences.running {
            if sequence.finished.is_some() || self.cancelled.contains(&sequence.start.request) {
                draft.take_back(Order::End(id));
            } else if sequence.stale {
                draft.take_back(Order::Preempt(id));
            }
        }
        self.cancelled.clear();
        draft.grow();
        let preempted = draft.orders.iter().any(|order| matches!(order, Order::Preempt(_)));
        if !preempted {
            self.admit(&mut draft);
        }
        self.prefill(&mut draft);
        draft.orders
    }

    /// Starts those that wait, as far as there is room for their texts so far and a block more for everyone.
    fn admit(&mut self, draft: &mut Draft<'_>) {
        let mut context: BTreeMap<Rank, usize> = self.homes.iter().map(|&home| (home, 0)).collect();
        let mut running = 0;
        for (_, sequence) in draft.staying() {
            *context.entry(sequence.start.home).or_default() += sequence.tokens();
            running += 1;
        }
        while let Some(next) = self.waiting.first_entry() {
            let start = next.get();
            let at_start = blocks_at_start(start, draft.sequences.context);
            let needed = (start.prompt.len() + start.forced.len()).div_ceil(BLOCK).max(at_start);
            let spare = if running == 0 { 0 } else { running + 1 };
            if running >= MAX_RUNNING || needed + spare > draft.free {
                break;
            }
            let mut start = next.remove();
            (start.id, start.edition) = (self.next_id, self.edition);
            self.next_id += 1;
            start.home = self.homes.iter().copied().min_by_key(|home| context[home]).unwrap_or(Rank(0));
            *context.entry(start.home).or_default() += start.prompt.len();
            running += 1;
            draft.free -= at_start;
            // What its replay will take is spoken for, though it is granted later.
            draft.free = draft.free.saturating_sub(needed - at_start);
            draft.orders.push(Order::Admit(start));
        }
    }

    /// Chunks of prompts, oldest first, unless it is the turn of those that decode.
    fn prefill(&mut self, draft: &mut Draft<'_>) {
        let decoding = draft.staying().any(|(_, s)| s.ordered as usize == s.start.prompt.len());
        if self.prefilling && decoding {
            self.prefilling = false;
            return;
        }
        let mut left = if decoding { CHUNK_BESIDE_DECODE } else { CHUNK };
        let mut logits = (CAPTURED_LOGITS / self.vocab.max(1)).max(1);
        let begun = draft.staying().map(|(id, s)| (id, &s.start, s.ordered as usize));
        let fresh = draft.orders.iter().filter_map(|order| match order {
            Order::Admit(start) => Some((start.id, start, 0)),
            _ => None,
        });
        let mut chunks = Vec::new();
        for (sequence, start, from) in begun.chain(fresh) {
            let mut length = (start.prompt.len() - from).min(left);
            if start.capture_logits {
                length = length.min(logits);
                logits -= length;
            }
            left -= length;
            if length > 0 {
                chunks.push(Order::Prefill { sequence, to: (from + length) as u32 });
            }
        }
        self.prefilling = !chunks.is_empty();
        draft.orders.extend(chunks);
    }
}

impl<'a> Draft<'a> {
    /// The sequences that are not taken away by this plan, in order of admission.
    fn staying(&self) -> impl Iterator<Item = (u32, &'a Sequence)> {
        let running = self.sequences.running.iter().map(|(&id, s)| (id, s));
        running.filter(|(id, _)| !self.gone.contains(id))
    }

    fn take_back(&mut self, order: Order) {
        let (Order::End(id) | Order::Preempt(id)) = order else { return };
        if let Some(sequence) = self.sequences.running.get(&id).filter(|_| self.gone.insert(id)) {
            self.free += sequence.blocks().len();
            self.orders.push(order);
        }
    }

    /// Grants blocks to those that decode, oldest request first, at the cost of the youngest where it must be.
    fn grow(&mut self) {
        let mut by_age: Vec<(u32, u32)> = self.staying().map(|(id, s)| (s.start.request, id)).collect();
        by_age.sort_unstable();
        for at in 0..by_age.len() {
            let (_, id) = by_age[at];
            let Some(sequence) = self.sequences.running.get(&id).filter(|_| !self.gone.contains(&id)) else {
                continue;
            };
            // While a prompt is prefilled its first token is still to come.
            let next = sequence.tokens();
            let last = sequence.start.prompt.len() + sequence.start.max_tokens as usize;
            let missing = |positions: usize| {
                let positions = positions.min(last).min(self.sequences.context);
                positions.saturating_sub(sequence.capacity()).div_ceil(BLOCK)
            };
            let (needed, wanted) = (missing(next + LAG), missing(next + LAG + AHEAD));
            for &(_, youngest) in by_age[at..].iter().rev() {
                if self.free >= needed {
                    break;
                }
                self.take_back(Order::Preempt(youngest));
            }
            let granted = wanted.min(self.free);
            if granted > 0 && !self.gone.contains(&id) {
                self.free -= granted;
                self.orders.push(Order::Grant { sequence: id, blocks: granted as u32 });
            }
        }
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
