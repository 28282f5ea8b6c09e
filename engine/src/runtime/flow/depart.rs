//! Where a token goes from a layer's router: which rows leave, and what stays.

use super::super::frames::{Choice, PartialFrame, RowFrame};
use super::super::step::expected;
use super::board::{Serve, Token};
use crate::options::Combine;
use exflow_placement::{Rank, Route};

/// What a layer's router decided of a token on a rank.
#[derive(Clone, Copy)]
pub(crate) struct Departure<'a> {
    pub(crate) me: Rank,
    pub(crate) route: &'a Route,
    /// In router order.
    pub(crate) choices: &'a [Choice],
    pub(crate) combine: Combine,
    /// `[H]` behind the attention.
    pub(crate) residual: &'a [f32],
}

/// A row, and the rank that it goes to.
pub(crate) type Leaving<'a> = (Rank, RowFrame<&'a [f32]>);

impl<'a> Departure<'a> {
    /// Sends a token on: returns the rows to ranks that serve it, and whether the token stays here, with what the next hop needs
    /// noted in it. One that leaves while it is served here too has a row to this rank among them, as it has to any other.
    pub(crate) fn depart(&self, token: &mut Token) -> (Vec<Leaving<'a>>, bool) {
        let Self { me, route, .. } = *self;
        let (expects, main) = (expected(route, self.combine), route.serving[0]);
        let stays = route.next == me;
        let leaving = route.ranks().into_iter().filter(|rank| *rank != me || !stays);
        let row = |to: Rank| {
            let Token { sequence, position, edition, .. } = *token;
            let (choices, residual) = (self.served_by(to), self.residual);
            let next = route.next;
            (to, RowFrame { sequence, position, edition, next, main, expects, choices, residual })
        };
        let rows = leaving.map(row).collect();
        if stays {
            self.stay(token);
        }
        (rows, stays)
    }

    /// Notes in a token that stays here what its next hop needs.
    pub(crate) fn stay(&self, token: &mut Token) {
        token.main = Some(self.route.serving[0]);
        token.choices = self.served_by(self.me);
        token.missing = expected(self.route, self.combine);
        token.partials.clear();
        token.residual = self.residual.to_vec();
    }

    fn served_by(&self, rank: Rank) -> Vec<Choice> {
        let of = self.choices.iter().zip(&self.route.serving).filter(|(_, serving)| **serving == rank);
        of.map(|(choice, _)| *choice).collect()
    }
}

/// One-way latencies that a token waits for at a layer: none where all its experts are where it is, one where all are
/// where it goes or where it comes from, else two.
pub(crate) fn latencies(me: Rank, route: &Route) -> u64 {
    let all_on = |ranks: &[Rank]| route.serving.iter().all(|serving| ranks.contains(serving));
    match route.next == me {
        true if all_on(&[me]) => 0,
        false if all_on(&[me, route.next]) => 1,
        _ => 2,
    }
}

/// The partials of what was served, with where they go. `values` is `[choices, H]` in rows of `stride`.
pub(crate) fn partials(
    me: Rank,
    serves: &[Serve],
    values: &[f32],
    (stride, hidden): (usize, usize),
    combine: Combine,
) -> Vec<(Rank, PartialFrame)> {
    let mut out: Vec<(Rank, PartialFrame)> = Vec::new();
    let mut rows = values.chunks_exact(stride.max(1));
    for serve in serves {
        let frame = &serve.frame;
        let sums = combine == Combine::Sum && frame.next != me;
        for (i, choice) in frame.choices.iter().enumerate() {
            let Some(row) = rows.next() else { return out };
            match out.last_mut().filter(|_| sums && i > 0) {
                Some((_, sum)) => sum.values.iter_mut().zip(&row[..hidden]).for_each(|(sum, v)| *sum += v),
                None => {
                    let (sequence, position) = (frame.sequence, frame.position);
                    let values = row[..hidden].to_vec();
                    out.push((frame.next, PartialFrame { sequence, position, k: choice.k, values }));
                }
            }
        }
    }
    out
}
