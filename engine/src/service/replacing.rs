//! Moves experts where the text that is served calls for it: by routes that were counted lately, against what a
//! crossing and a move take here.

use super::routes::COUNT_AT;
use crate::options::Schedule;
use crate::runtime::{MoveEnd, RankStats};
use exflow_placement::{
    Affinity, MoveTerms, PlacementTable, Reconsidered, SolveError, SolveOptions, reconsider,
};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

/// A solve may take so long, on one thread.
const TIME_LIMIT: Duration = Duration::from_secs(2);
/// Of the crossings, so many must be saved: counts are of few tokens.
const LEAST_SHARE: f64 = 0.05;
/// Bytes of experts that a rank reads and packs in a second, until a move has shown how many they are.
const BYTES_PER_SECOND: f64 = 100e6;
/// After a table was refused, so many times as many tokens are counted before the next one.
const BACK_OFF: f64 = 4.0;

/// See the module.
pub(super) struct Replacing {
    /// Tokens after which it is looked again; counts fall to a half over as many.
    every: f64,
    recent: Affinity,
    /// Tokens counted since it was looked last, and how many there must be.
    counted: f64,
    due: f64,
    solving: Option<Receiver<Result<Reconsidered, SolveError>>>,
    seconds_per_expert: f64,
    lately: Lately,
}

/// What tokens and ranks took lately; what was minutes ago counts less.
#[derive(Default)]
struct Lately {
    /// No rank knows what a token of it spends between two.
    flow: bool,
    /// Seconds between a sequence's tokens.
    gaps: f64,
    /// Seconds that ranks tell of decoded tokens, those apart that they waited for rows and partials.
    spent: f64,
    waited: f64,
    /// Rows and partials that travelled.
    crossings: f64,
}

impl Lately {
    fn seconds_per_crossing(&self) -> f64 {
        let between = if self.flow { (self.gaps - self.spent).max(0.0) } else { self.waited };
        between / self.crossings.max(1.0)
    }
}

impl Replacing {
    /// For a model of (MoE layers, experts, experts of a token, bytes of an expert); looks every `every` tokens, or as many
    /// as make a profile.
    pub(super) fn new(
        (layers, experts, top_k, expert_bytes): (usize, usize, usize, u64),
        every: Option<usize>,
        schedule: Schedule,
    ) -> Self {
        let every = every.unwrap_or(100 * experts / top_k.max(1)).max(1) as f64;
        Self {
            every,
            recent: Affinity::zeros(layers, experts),
            counted: 0.0,
            due: every,
            solving: None,
            seconds_per_expert: expert_bytes as f64 / BYTES_PER_SECOND,
            lately: Lately { flow: schedule == Schedule::Flow, ..Lately::default() },
        }
    }

    /// Tokens whose routes are counted together: few against those after which it is looked.
    pub(super) fn count_at(&self) -> usize {
        ((self.every / 8.0) as usize).clamp(64, COUNT_AT)
    }

    /// Takes in routes that were counted.
    pub(super) fn count(&mut self, counts: &Affinity) {
        let tokens = counts.tokens();
        self.recent.scale(0.5_f64.powf(tokens / self.every));
        if let Err(error) = self.recent.merge(counts, 1.0) {
            tracing::warn!(%error, "routes that cannot be counted");
        }
        self.counted += tokens;
    }

    /// A token came so many seconds after the one before it.
    pub(super) fn token(&mut self, gap: f64) {
        self.lately.gaps += gap;
    }

    /// Takes in what a rank reports: what its tokens' time went into, and how many rows travelled.
    pub(super) fn report(&mut self, stats: &RankStats) {
        if stats.crossings == 0 {
            return;
        }
        const KEPT: f64 = 0.98;
        let (of, now) = (&mut self.lately, &stats.waited);
        for (sum, seconds) in [
            (&mut of.gaps, 0.0),
            (&mut of.spent, now.compute + now.context + now.ids + now.queue),
            (&mut of.waited, now.dispatch + now.combine),
            (&mut of.crossings, stats.crossings as f64),
        ] {
            *sum = KEPT * *sum + seconds;
        }
    }

    /// Begins to solve, where there is enough to go by and experts do not move already.
    pub(super) fn look(&mut self, now: &PlacementTable, wake: impl FnOnce() + Send + 'static) {
        if self.solving.is_some() || self.counted < self.due || self.lately.crossings == 0.0 {
            return;
        }
        (self.counted, self.due) = (0.0, self.every);
        let (to, solved) = channel();
        let (now, counts) = (now.clone(), self.recent.clone());
        let options = SolveOptions { time_limit: TIME_LIMIT, ..SolveOptions::default() };
        let solve = move || {
            // The owner that does not listen any more has ended.
            let _ = to.send(reconsider(&now, &counts, &options));
            wake();
        };
        match std::thread::Builder::new().name("placement".into()).spawn(solve) {
            Ok(_) => self.solving = Some(solved),
            Err(error) => tracing::warn!(%error, "no thread to place experts anew"),
        }
    }

    /// A table that is worth a move, where one was found.
    pub(super) fn found(&mut self) -> Option<PlacementTable> {
        let solved = match self.solving.as_ref()?.try_recv() {
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => {
                self.solving = None;
                return None;
            }
            Ok(solved) => solved,
        };
        self.solving = None;
        let other = match solved {
            Ok(other) => other,
            Err(error) => {
                tracing::warn!(%error, "experts cannot be placed anew");
                return None;
            }
        };
        let terms = self.terms();
        let pays = other.pays(&terms);
        let verdict = if pays { "experts move" } else { "experts stay: it would not pay" };
        tracing::info!(
            ms_per_crossing = 1e3 * terms.seconds_per_crossing,
            crossings_now = other.crossings_now,
            crossings_then = other.crossings_then,
            experts = other.moved,
            saved_s = other.saved_seconds(&terms),
            costs_s = other.moved as f64 * terms.seconds_per_expert,
            "{verdict}"
        );
        pays.then_some(other.table)
    }

    fn terms(&self) -> MoveTerms {
        MoveTerms {
            seconds_per_crossing: self.lately.seconds_per_crossing(),
            seconds_per_expert: self.seconds_per_expert,
            // As much as is remembered is expected to come.
            tokens: self.recent.tokens(),
            least_share: LEAST_SHARE,
        }
    }

    /// Learns from how a move ended.
    pub(super) fn ended(&mut self, end: &MoveEnd) {
        match (&end.outcome, end.experts) {
            (Ok(_), 0) => {}
            (Ok(_), experts) => self.seconds_per_expert = end.seconds / experts as f64,
            (Err(_), _) => self.due = BACK_OFF * self.every,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Waited;
    use exflow_placement::Generator;
    use std::time::Instant;

    fn counts(text: u64) -> Affinity {
        Affinity::from_trace(&Generator::new(4, 8, 1).trace(900, text, text), 8).expect("counts")
    }

    fn solved(replacing: &mut Replacing) -> Option<PlacementTable> {
        let began = Instant::now();
        while replacing.solving.is_some() && began.elapsed() < Duration::from_secs(60) {
            if let Some(table) = replacing.found() {
                return Some(table);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    #[test]
    fn it_moves_when_the_text_has_changed_and_crossings_cost_something() {
        let mut replacing = Replacing::new((4, 8, 1, 1000), None, Schedule::Rounds);
        let mut table = PlacementTable::round_robin(4, 8, 4);
        replacing.count(&counts(1));
        replacing.look(&table, || ());
        assert!(replacing.solving.is_none(), "nobody has told what a crossing takes");
        let mut stats = RankStats { crossings: 1000, ..RankStats::default() };
        stats.waited.dispatch = 0.5;
        replacing.report(&stats);
        replacing.look(&table, || ());
        table = solved(&mut replacing).expect("round robin knows nothing of this text");
        replacing.count(&counts(1));
        replacing.look(&table, || ());
        assert_eq!(solved(&mut replacing), None, "the same text");
        // Another text: a half of what is remembered is of it at first, then nearly all.
        for _ in 0..3 {
            replacing.count(&counts(2));
        }
        replacing.look(&table, || ());
        assert!(solved(&mut replacing).is_some_and(|other| other.assignment != table.assignment));
    }

    #[test]
    fn in_flow_a_crossing_takes_what_no_rank_accounts_for() {
        let mut replacing = Replacing::new((4, 8, 1, 1000), None, Schedule::Flow);
        (0..10).for_each(|_| replacing.token(0.03));
        let mut stats = RankStats { crossings: 20, ..RankStats::default() };
        (stats.waited.compute, stats.waited.queue) = (0.1, 0.05);
        replacing.report(&stats);
        let seconds = replacing.terms().seconds_per_crossing;
        assert!((seconds - (0.98 * 0.3 - 0.15) / 20.0).abs() < 1e-9, "{seconds}");
        replacing.report(&RankStats { waited: Waited { compute: 9.0, ..Waited::default() }, ..stats });
        assert_eq!(replacing.terms().seconds_per_crossing, 0.0, "less than nothing is nothing");
    }

    #[test]
    fn a_refusal_makes_it_wait() {
        let mut replacing = Replacing::new((4, 8, 1, 1000), Some(500), Schedule::Rounds);
        replacing.ended(&MoveEnd::refused("no room".into()));
        replacing.report(&RankStats { crossings: 9, ..RankStats::default() });
        replacing.count(&counts(1));
        replacing.look(&PlacementTable::round_robin(4, 8, 4), || ());
        assert!(replacing.solving.is_none());
    }
}
