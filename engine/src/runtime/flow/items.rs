//! What is on a rank's board: tokens between two layers, experts that are to run for tokens elsewhere, and what of both
//! can be done in one go.

use super::super::frames::{Choice, PartialFrame, RowFrame};
use super::super::tables::Edition;
use exflow_placement::Rank;
use std::time::Duration;

/// A token between two layers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token {
    pub(crate) sequence: u32,
    pub(crate) position: u32,
    /// Its id, which the embedding needs.
    pub(crate) id: u32,
    /// The placement table that it goes by.
    pub(crate) edition: Edition,
    /// The rank that served its main choice at the layer before.
    pub(crate) main: Option<Rank>,
    /// `[H]` residual stream before the FFN of the layer that it is leaving; empty before the first.
    pub(crate) residual: Vec<f32>,
    /// Experts of this rank that are still to run for it.
    pub(crate) choices: Vec<Choice>,
    /// Partials that are there: place in router order, `[H]`.
    pub(crate) partials: Vec<(u16, Vec<f32>)>,
    /// Partials that are still to come.
    pub(crate) missing: u16,
}

/// Tokens that go through a layer together: one decoded token, or a chunk of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Unit {
    /// The layer that is entered next; the number of layers: the head.
    pub(crate) stage: usize,
    pub(crate) prefill: bool,
    /// Consecutive positions of one sequence.
    pub(crate) tokens: Vec<Token>,
    /// When it became what it is, in picks.
    pub(super) since: u64,
    pub(super) spent: Spent,
    /// Up to when its time is accounted for.
    pub(super) until: Duration,
}

/// What a token waited for on a rank, between two hops.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Spent {
    /// Partials of other ranks, or of this one's experts beside them.
    pub(crate) partials: Duration,
    /// Keys and values of its own text.
    pub(crate) context: Duration,
    /// Sampled ids before it, and rank 0's word of a cache block.
    pub(crate) ids: Duration,
    /// The rank, which worked on others.
    pub(crate) queue: Duration,
    /// The rank, which held it back so that others might share its launch.
    pub(crate) linger: Duration,
}

/// What a unit that has all its partials still needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lack {
    Nothing,
    Context,
    Ids,
}

impl Unit {
    pub(crate) fn new(stage: usize, prefill: bool, tokens: Vec<Token>) -> Self {
        let (spent, until) = (Spent::default(), Duration::ZERO);
        Self { stage, prefill, tokens, since: 0, spent, until }
    }

    /// What it waited for, up to the moment when it was picked.
    pub(crate) fn spent(&self) -> Spent {
        self.spent
    }

    /// Adds the time since it was last accounted for to one of its causes.
    pub(super) fn account(&mut self, now: Duration, cause: fn(&mut Spent) -> &mut Duration) {
        *cause(&mut self.spent) += now.saturating_sub(std::mem::replace(&mut self.until, now));
    }

    pub(super) fn key(&self) -> (u32, u32) {
        (self.tokens[0].sequence, self.tokens[0].position)
    }

    pub(super) fn is_whole(&self) -> bool {
        self.tokens.iter().all(|token| token.missing == 0)
    }
}

/// Experts of this rank that are to run for a token that is, or will be, elsewhere (or here, where other ranks'
/// partials are waited for at the same time).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Serve {
    /// The layer of the experts, plus one: what the token enters next.
    pub(crate) stage: usize,
    pub(crate) prefill: bool,
    pub(crate) frame: RowFrame,
    pub(super) since: u64,
    /// When it came, and how long it has been held back.
    pub(super) came: Duration,
    pub(super) held: Duration,
    /// Up to when that is accounted for.
    pub(super) until: Duration,
}

impl Serve {
    pub(crate) fn new(stage: usize, prefill: bool, frame: RowFrame) -> Self {
        Self::at(stage, prefill, frame, 0, Duration::ZERO)
    }

    /// One that came at `now`, after so many picks.
    pub(super) fn at(stage: usize, prefill: bool, frame: RowFrame, since: u64, now: Duration) -> Self {
        Self { stage, prefill, frame, since, came: now, held: Duration::ZERO, until: now }
    }
}

/// What can be done in one go.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Picked {
    pub(crate) stage: usize,
    pub(crate) prefill: bool,
    pub(crate) units: Vec<Unit>,
    pub(crate) serves: Vec<Serve>,
}

/// What would be picked next.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ready {
    pub(crate) stage: usize,
    pub(crate) prefill: bool,
    /// Rows of that layer that are ready.
    pub(crate) rows: usize,
    /// Rows that are ready at any layer.
    pub(crate) all: usize,
    /// How long the one that has been held back for longest has been so.
    pub(crate) held: Duration,
    /// The units among those rows, by first token.
    pub(super) units: Vec<(u32, u32)>,
}

impl Picked {
    /// Rows that the device will work on.
    pub(crate) fn rows(&self) -> usize {
        self.units.iter().map(|unit| unit.tokens.len()).sum::<usize>() + self.serves.len()
    }

    /// When each row was ready, where they were picked at `now`.
    pub(super) fn ready_at(&self, now: Duration) -> impl Iterator<Item = Duration> {
        let of = move |unit: &Unit| now.saturating_sub(unit.spent.queue + unit.spent.linger);
        self.units.iter().map(of).chain(self.serves.iter().map(|serve| serve.came))
    }

    /// The tokens of all units, in order.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.units.iter().flat_map(|unit| &unit.tokens)
    }
}

impl Token {
    /// At the beginning of a token's way.
    pub(crate) fn new(sequence: u32, position: u32, id: u32, edition: Edition) -> Self {
        Self {
            sequence,
            position,
            id,
            edition,
            main: None,
            residual: Vec::new(),
            choices: Vec::new(),
            partials: Vec::new(),
            missing: 0,
        }
    }

    pub(super) fn add(&mut self, partial: PartialFrame) {
        self.missing = self.missing.saturating_sub(1);
        self.partials.push((partial.k, partial.values));
    }
}
