//! What may run while rows travel, in rounds, and whether it pays, by what waiting and working were seen to take.

use crate::options::Overlap;
use exflow_placement::{PlacementTable, Strategy};
use std::collections::BTreeMap;

/// A mean in which what was seen lately counts most.
#[derive(Debug, Clone, Copy, Default)]
struct Lately(Option<f64>);

impl Lately {
    /// Share of the newest value.
    const WEIGHT: f64 = 0.125;

    fn take(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + Self::WEIGHT * (value - mean)));
    }
}

/// Whether the rows of a peer start before those of others have come. Starting them by themselves costs one launch more,
/// and saves it where the others' rows take longer to come than that: their launch then finds less to do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Peers {
    /// Seconds from the first rows that came alone until all had.
    gap: Lately,
    /// Seconds of starting what has come.
    start: Lately,
}

impl Peers {
    /// Whether to start what has come, now that others are to be waited for.
    pub(crate) fn start_now(&self, overlap: Overlap) -> bool {
        match overlap {
            Overlap::Off | Overlap::Own | Overlap::Halves => false,
            Overlap::Peers => true,
            Overlap::Auto => {
                matches!((self.gap.0, self.start.0), (Some(gap), Some(start)) if gap > start)
            }
        }
    }

    /// The others' rows came so many seconds after the first; 0 where nobody had to be waited for.
    pub(crate) fn waited(&mut self, seconds: f64) {
        self.gap.take(seconds);
    }

    /// Starting what had come took so many seconds.
    pub(crate) fn started(&mut self, seconds: f64) {
        self.start.take(seconds);
    }
}

/// Rank 0: whether decode steps run in two halves, of which one computes while the other's rows travel. Halves are
/// tried out where they may pay, and run where they were faster; whether they may pay is seen from how much of a step is
/// spent waiting. Between halves a step can hide no more than the wait, and no more than half of what it computes.
#[derive(Debug, Default)]
pub(crate) struct Halving {
    /// By the sequences of a step, rounded up to a power of two: how many there are changes all the time.
    phases: BTreeMap<usize, Phase>,
    /// That of the last step.
    size: usize,
    /// How the last step ran.
    ran: Option<bool>,
}

#[derive(Debug)]
enum Phase {
    /// Steps run whole; seconds waited and passed in so many of them.
    Watch { steps: usize, waited: f64, passed: f64 },
    /// Both are run in turn: seconds of steps run whole, and in halves.
    Try([Vec<f64>; 2]),
    /// One of the two, for so many more steps.
    Keep { halves: bool, left: usize },
}

/// Steps that are watched.
const WATCHED: usize = 6;
/// What halves must promise to be tried out, as a share of a step, and must have gained to be kept.
const WORTH: f64 = 0.05;
/// Steps of a turn, and of each kind in a trial.
const TURN: usize = 4;
const TRIED: usize = 8;
/// Decode steps of one number of sequences after which it is known whether halves pay: those that are watched and tried out,
/// and of each turn the first, which does not count, and one until the order for the next has come round.
pub const SETTLING_STEPS: usize = WATCHED + 2 * TRIED + 2 * (2 * TRIED / TURN);
/// Steps after which it is all looked at again.
const KEPT: usize = 600;

impl Phase {
    fn watch() -> Self {
        Self::Watch { steps: 0, waited: 0.0, passed: 0.0 }
    }
}

impl Halving {
    /// Goes on with what was found in an epoch before; the next step is the first of its kind.
    fn resumed(self) -> Self {
        Self { ran: None, ..self }
    }

    /// Takes note of a decode step of at most `sequences` tokens, that took `passed` seconds, of which rank 0 `waited` for
    /// others.
    pub(crate) fn stepped(&mut self, sequences: usize, in_halves: bool, passed: f64, waited: f64) {
        let size = sequences.next_power_of_two();
        // The first step of a kind makes what the next ones use.
        let kind = (std::mem::replace(&mut self.size, size), self.ran.replace(in_halves));
        let fresh = kind != (size, Some(in_halves));
        let phase = self.phases.entry(size).or_insert_with(Phase::watch);
        match phase {
            Phase::Watch { .. } | Phase::Try(_) if fresh => {}
            Phase::Watch { steps, waited: all_waited, passed: all_passed } if !in_halves => {
                (*steps, *all_waited, *all_passed) = (*steps + 1, *all_waited + waited, *all_passed + passed);
                if *steps == WATCHED {
                    let share = *all_waited / all_passed.max(1e-9);
                    let promise = share.min((1.0 - share) / 2.0);
                    *phase = match sequences > 1 && promise > WORTH {
                        true => Phase::Try([Vec::new(), Vec::new()]),
                        false => Phase::Keep { halves: false, left: KEPT },
                    };
                }
            }
            Phase::Watch { .. } => {}
            Phase::Try(seconds) => {
                seconds[usize::from(in_halves)].push(passed);
                if seconds.iter().all(|of| of.len() >= TRIED) {
                    let [whole, halves] = seconds.each_mut().map(|of| median(of));
                    *phase = Phase::Keep { halves: halves < (1.0 - WORTH) * whole, left: KEPT };
                }
            }
            Phase::Keep { left, halves } => {
                *left -= 1;
                if *left == 0 {
                    let again = *halves;
                    *phase = if again { Phase::Try([Vec::new(), Vec::new()]) } else { Phase::watch() };
                }
            }
        }
    }

    /// Whether the next steps are to run in halves.
    pub(crate) fn wish(&self) -> bool {
        match self.phases.get(&self.size) {
            None | Some(Phase::Watch { .. }) => false,
            Some(Phase::Keep { halves, .. }) => *halves,
            Some(Phase::Try([whole, halves])) => match (whole.len() >= TRIED, halves.len() >= TRIED) {
                (true, _) => true,
                (_, true) => false,
                // Whole, halves, whole, halves: what the machine does beside hits both alike.
                _ => whole.len() / TURN > halves.len() / TURN,
            },
        }
    }
}

/// What was found of halves in epochs before, by strategy and table, the latest last: a world that comes back to both does
/// not try again.
#[derive(Debug, Default)]
pub(crate) struct Verdicts(Vec<(Strategy, PlacementTable, Halving)>);

/// Verdicts that are kept.
const REMEMBERED: usize = 16;

impl Verdicts {
    /// What is known of this strategy with this table.
    pub(crate) fn take(&mut self, strategy: Strategy, table: &PlacementTable) -> Halving {
        let known = self.0.iter().position(|(of, with, _)| *of == strategy && with == table);
        known.map(|at| self.0.remove(at).2.resumed()).unwrap_or_default()
    }

    /// Keeps what an epoch with both has found.
    pub(crate) fn keep(&mut self, strategy: Strategy, table: PlacementTable, found: Halving) {
        self.0.push((strategy, table, found));
        if self.0.len() > REMEMBERED {
            self.0.remove(0);
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_start_by_themselves_where_others_take_longer_than_a_launch() {
        let mut peers = Peers::default();
        assert!(!peers.start_now(Overlap::Auto), "nothing is known yet");
        assert!(peers.start_now(Overlap::Peers) && !peers.start_now(Overlap::Own));
        peers.started(1e-4);
        peers.waited(1e-3);
        assert!(peers.start_now(Overlap::Auto));
        (0..40).for_each(|_| peers.waited(2e-5));
        assert!(!peers.start_now(Overlap::Auto), "the links became fast");
        (0..40).for_each(|_| peers.waited(5e-4));
        assert!(peers.start_now(Overlap::Auto));
        (0..40).for_each(|_| peers.started(6e-4));
        assert!(!peers.start_now(Overlap::Auto), "launches became dear");
    }

    /// Runs steps as they are wished for, an order late, and returns how the last of so many ran.
    fn run(halving: &mut Halving, steps: usize, sequences: usize, of: impl Fn(bool) -> (f64, f64)) -> bool {
        let mut ran = false;
        for _ in 0..steps {
            let wish = halving.wish();
            let (passed, waited) = of(ran);
            halving.stepped(sequences, ran, passed, waited);
            ran = wish;
        }
        ran
    }

    #[test]
    fn halves_are_kept_where_they_were_faster() {
        let hides = |halves| if halves { (8e-3, 4e-3) } else { (1e-2, 6e-3) };
        let under_fills = |halves| if halves { (1.2e-2, 6e-3) } else { (1e-2, 6e-3) };
        let mut halving = Halving::default();
        assert!(run(&mut halving, SETTLING_STEPS, 8, hides));
        assert!(matches!(halving.phases[&8], Phase::Keep { halves: true, .. }));
        assert!(!run(&mut halving, KEPT + 100, 8, under_fills), "it is looked at again");
        assert!(run(&mut halving, KEPT + 100, 8, hides));
        assert!(!run(&mut halving, 100, 2, under_fills), "fewer sequences are another matter");
        assert!(run(&mut halving, 100, 16, hides));
        assert!(run(&mut halving, 2, 8, hides), "what was found of eight still holds");
    }

    #[test]
    fn a_strategy_and_table_that_come_back_are_not_tried_again() {
        let hides = |halves| if halves { (8e-3, 4e-3) } else { (1e-2, 6e-3) };
        let table = |ranks| PlacementTable::round_robin(2, 8, ranks);
        let mut verdicts = Verdicts::default();
        let mut halving = verdicts.take(Strategy::Vanilla, &table(2));
        assert!(run(&mut halving, SETTLING_STEPS, 8, hides));
        verdicts.keep(Strategy::Vanilla, table(2), halving);
        let unknown = verdicts.take(Strategy::Coherent, &table(2));
        assert!(!unknown.wish() && unknown.phases.is_empty());
        assert!(!verdicts.take(Strategy::Vanilla, &table(4)).wish());
        (0..REMEMBERED - 1).for_each(|_| verdicts.keep(Strategy::Coherent, table(4), Halving::default()));
        let known = verdicts.take(Strategy::Vanilla, &table(2));
        assert!(known.wish(), "before it has run a step");
        verdicts.keep(Strategy::Vanilla, table(2), known);
        (0..REMEMBERED).for_each(|_| verdicts.keep(Strategy::Coherent, table(4), Halving::default()));
        assert!(!verdicts.take(Strategy::Vanilla, &table(2)).wish(), "it was the oldest");
    }

    #[test]
    fn halves_are_not_even_tried_where_they_cannot_pay() {
        for waited in [0.0, 1e-4, 9.5e-3] {
            let mut halving = Halving::default();
            let never = |halves: bool| {
                assert!(!halves, "{waited}");
                (1e-2, waited)
            };
            assert!(!run(&mut halving, 2 * KEPT, 8, never));
        }
        let mut halving = Halving::default();
        assert!(!run(&mut halving, 100, 1, |halves| {
            assert!(!halves, "there is but one row");
            (1e-2, 5e-3)
        }));
    }
}
