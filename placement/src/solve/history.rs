//! How cost and bound came about: a moment for every step that is worth a point in a drawing.

use std::time::Duration;

use crate::table::Moment;

/// Most moments that are kept; where there are more, every other one goes.
const MOST: usize = 256;
/// A change of cost or bound by less than this share is not worth a point.
const WORTH: f64 = 1e-4;

/// Moments of one solve.
#[derive(Debug, Default)]
pub(crate) struct History {
    kept: Vec<Moment>,
    last: Option<Moment>,
}

impl History {
    /// Cost and bound at this time, kept if either changed.
    pub(crate) fn push(&mut self, elapsed: Duration, cost: f64, lower_bound: f64) {
        let moment = Moment { seconds: elapsed.as_secs_f64(), cost, lower_bound };
        let changed = |before: &Moment| {
            let least = WORTH * before.cost.abs();
            (before.cost - cost).abs() > least || (before.lower_bound - lower_bound).abs() > least
        };
        if self.kept.last().is_none_or(changed) {
            self.kept.push(moment);
        }
        self.last = Some(moment);
        if self.kept.len() > MOST {
            let mut at = 0;
            self.kept.retain(|_| {
                at += 1;
                at % 2 == 1
            });
        }
    }

    /// All moments, the last one always among them.
    pub(crate) fn finish(mut self) -> Vec<Moment> {
        self.kept.pop_if(|kept| Some(&*kept) == self.last.as_ref());
        self.kept.extend(self.last);
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_and_the_end_are_kept() {
        let mut history = History::default();
        let at = |history: &mut History, seconds: u64, cost: f64| {
            history.push(Duration::from_secs(seconds), cost, 1.0);
        };
        for (seconds, cost) in [(1, 10.0), (2, 10.0), (3, 9.0), (4, 9.0)] {
            at(&mut history, seconds, cost);
        }
        let seconds = |history: History| history.finish().iter().map(|m| m.seconds).collect::<Vec<_>>();
        assert_eq!(seconds(history), [1.0, 3.0, 4.0]);
        let mut long = History::default();
        (0..5000).for_each(|step| at(&mut long, step, 10_000.0 - 1.5 * step as f64));
        let found = seconds(long);
        assert!(found.len() <= MOST + 1 && found.last() == Some(&4999.0) && found[0] == 0.0);
        assert!(found.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
