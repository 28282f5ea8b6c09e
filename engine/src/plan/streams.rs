//! The routes that are played: stretches of a trace's texts, one for each sequence.

use super::{Setting, TOKENS};
use crate::runtime::bounds;
use exflow_placement::{ExpertId, LayerId, Rank, Route, RoutingTrace};
use std::ops::Range;

/// Plays of other parts of the trace whose mean is taken, least and most, and the sequences that are played in all of them
/// where neither holds: a few tokens of a few sequences may be unlike the rest.
pub(super) const DRAWS: (usize, usize) = (2, 8);
const PLAYED: usize = 64;

/// As many streams of a trace as sequences run, each a stretch of one text: what a sequence is about stays with it, and with
/// that the ranks that it is at home or away on, which makes some sequences quick and others slow for long.
pub(super) struct Streams<'a> {
    routes: &'a RoutingTrace,
    /// `[sequences]` tokens of the trace that come first.
    pub(super) begins: Vec<usize>,
}

impl<'a> Streams<'a> {
    /// Plays of other stretches each, as far as the trace has them. Where they come round again, each begins later and is at
    /// home elsewhere: equal sequences choose equal experts, which fills launches as no real text does.
    pub(super) fn draws(routes: &'a RoutingTrace, sequences: usize) -> impl ExactSizeIterator<Item = Self> {
        let stretches = stretches(routes);
        let draws = (PLAYED / sequences).clamp(DRAWS.0, DRAWS.1).min(stretches.len());
        let turns = (draws * sequences).div_ceil(stretches.len().max(1));
        (0..draws).map(move |draw| {
            let nth = |n: usize| {
                let turn = n / stretches.len();
                stretches[(n + turn) % stretches.len()] + turn * TOKENS / turns
            };
            let begins = (draw * sequences..(draw + 1) * sequences).map(nth).collect();
            Self { routes, begins }
        })
    }

    pub(super) fn sequences(&self) -> usize {
        self.begins.len()
    }

    /// Experts of a token at each MoE layer.
    pub(super) fn top_k(&self) -> usize {
        self.routes.k().max(1)
    }

    /// The token of the trace that a sequence's token `token` is.
    pub(super) fn token(&self, sequence: usize, token: usize) -> usize {
        (self.begins[sequence] + token) % self.routes.tokens()
    }

    pub(super) fn route(&self, setting: &Setting<'_>, at: Place, residence: Rank) -> Route {
        let token = self.token(at.sequence, at.token);
        let chosen = self.routes.chosen(token, at.moe.min(self.routes.layers() - 1));
        let experts: Vec<ExpertId> = chosen.iter().map(|&id| ExpertId(id.max(0) as u16)).collect();
        let home = Rank::from(at.sequence % setting.table.ranks.max(1));
        let layer = (setting.strategy, LayerId::from(at.moe));
        bounds::route(setting.groups, setting.table, layer, (home, residence), &experts, &[])
    }
}

/// Where the stretches of a trace begin that are [`TOKENS`] long and each of one text; a text that is shorter is one, and
/// runs on into the next.
pub(super) fn stretches(routes: &RoutingTrace) -> Vec<usize> {
    let of = |text: Range<usize>| {
        let (parts, tokens) = ((text.len() / TOKENS).max(1), text.len());
        (0..parts).map(move |part| {
            let (from, to) = (part * tokens / parts, (part + 1) * tokens / parts);
            // From the middle: a text's first tokens are its prompt.
            text.start + from + (to - from).saturating_sub(TOKENS) / 2
        })
    };
    routes.texts().flat_map(of).collect()
}

/// Where in the streams.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) sequence: usize,
    pub(super) token: usize,
    pub(super) moe: usize,
}
