//! Where a token goes from a layer's router: which rows leave, and what stays.

use super::super::frames::{Choice, PartialFrame, RowFrame};
use super::super::step::expected;
use super::board::{Serve, Token};
use crate::options::Combine;
use exflow_placement::{Rank, Route};

/// Sends a token on: returns the rows to ranks that serve it, and whether the token stays on `me`, with what the next hop needs
/// noted in it. One that leaves while it is served here too has a row to `me` among them, as it has to any other rank.
/// `choices` are in router order.
pub(crate) fn depart(
    me: Rank,
    token: &mut Token,
    route: &Route,
    choices: &[Choice],
    combine: Combine,
    residual: &[f32],
) -> (Vec<(Rank, RowFrame)>, bool) {
    let expects = expected(route, combine);
    let main = route.serving[0];
    let stays = route.next == me;
    let served_by = |rank: Rank| {
        let of = choices.iter().zip(&route.serving).filter(move |(_, serving)| **serving == rank);
        of.map(|(choice, _)| *choice).collect::<Vec<_>>()
    };
    let leaving = route.ranks().into_iter().filter(|rank| *rank != me || !stays);
    let row = |to: Rank| {
        let Token { sequence, position, edition, .. } = *token;
        let (choices, residual) = (served_by(to), residual.to_vec());
        (to, RowFrame { sequence, position, edition, next: route.next, main, expects, choices, residual })
    };
    let rows = leaving.map(row).collect();
    if stays {
        stay(me, token, route, choices, combine, residual);
    }
    (rows, stays)
}

/// Notes in a token that stays on `me` what its next hop needs.
pub(crate) fn stay(
    me: Rank,
    token: &mut Token,
    route: &Route,
    choices: &[Choice],
    combine: Combine,
    residual: &[f32],
) {
    let served = choices.iter().zip(&route.serving).filter(|(_, serving)| **serving == me);
    token.main = Some(route.serving[0]);
    token.choices = served.map(|(choice, _)| *choice).collect();
    token.missing = expected(route, combine);
    token.partials.clear();
    token.residual = residual.to_vec();
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
