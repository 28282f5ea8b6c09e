//! Rank 0's part of a move: it orders each step when all ranks have done the one before.

use super::super::sequence::{Sequence, Sequences};
use super::super::tables::{Edition, Tables};
use super::{MoveNews, MoveOrder};
use exflow_placement::{PlacementTable, Rank};
use std::collections::BTreeSet;
use std::time::Instant;

/// How a move ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MoveEnd {
    /// The table that all go by now, or why they stay with the old one.
    pub(crate) outcome: Result<PlacementTable, String>,
    /// Experts read, on all ranks.
    pub(crate) experts: u64,
    /// Tokens told from the order to read them until the last rank had them, and the contexts that go with them.
    pub(crate) tokens: u64,
    pub(crate) seconds: f64,
}

/// The tokens that went by the new table are the last ones that were heard of, with that before them: what comes before
/// was all made before.
fn ends(sequences: &Sequences) -> Vec<(u32, u32)> {
    let end = |(&id, sequence): (&u32, &Sequence)| (id, sequence.tokens().saturating_sub(2) as u32);
    sequences.running.iter().map(end).collect()
}

impl MoveEnd {
    /// Of a move that did not begin.
    pub(crate) fn refused(why: String) -> Self {
        Self { outcome: Err(why), experts: 0, tokens: 0, seconds: 0.0 }
    }
}

/// Rank 0's state of the move that is under way, if there is one.
#[derive(Default)]
pub(crate) struct Director {
    move_: Option<Move>,
}

struct Move {
    edition: Edition,
    table: PlacementTable,
    step: Step,
    /// The ranks that have done this step.
    done: BTreeSet<Rank>,
    experts: u64,
    tokens: u64,
    began: Instant,
    /// Why it was given up.
    refused: Option<String>,
}

impl Move {
    fn go_to(&mut self, step: Step) {
        self.step = step;
        self.done.clear();
    }
}

#[derive(PartialEq, Eq)]
enum Step {
    Load,
    /// Tokens of the old table are under way.
    Turn,
    Settle,
}

/// What rank 0 knows when it decides about a move.
pub(crate) struct View<'a> {
    pub(crate) tables: &'a Tables,
    pub(crate) sequences: &'a Sequences,
    /// Ranks that are there.
    pub(crate) ranks: usize,
}

impl Director {
    /// Whether experts move.
    pub(crate) fn is_busy(&self) -> bool {
        self.move_.is_some()
    }

    /// Begins a move to `table`, where none is under way; says why not otherwise.
    pub(crate) fn begin(&mut self, table: PlacementTable, tables: &Tables) -> Result<MoveOrder, String> {
        if self.move_.is_some() {
            return Err("experts are moving already".into());
        }
        let edition = tables.edition().next();
        let PlacementTable { assignment, replicas, outlook, .. } = table.clone();
        self.move_ = Some(Move {
            edition,
            table,
            step: Step::Load,
            done: BTreeSet::new(),
            experts: 0,
            tokens: 0,
            began: Instant::now(),
            refused: None,
        });
        Ok(MoveOrder::Load { edition, assignment, replicas, outlook })
    }

    /// Takes note of what a rank has done.
    pub(crate) fn hear(&mut self, from: Rank, news: MoveNews) {
        let Some(move_) = &mut self.move_ else { return };
        match news {
            MoveNews::Loaded(count) if move_.step == Step::Load => {
                move_.experts += u64::from(count);
                move_.done.insert(from);
            }
            MoveNews::Settled if move_.step == Step::Settle => drop(move_.done.insert(from)),
            MoveNews::Refused(why) => drop(move_.refused.get_or_insert(why)),
            // One refused before it had loaded.
            MoveNews::Loaded(_) | MoveNews::Settled => {}
        }
    }

    /// A token was told.
    pub(crate) fn token(&mut self) {
        if let Some(move_) = self.move_.as_mut().filter(|move_| move_.step == Step::Load) {
            move_.tokens += 1;
        }
    }

    /// What comes next, if it is time for it: an order, or the end.
    pub(crate) fn next(&mut self, view: &View<'_>) -> (Option<MoveOrder>, Option<MoveEnd>) {
        let Some(move_) = &mut self.move_ else { return (None, None) };
        match move_.step {
            Step::Load if move_.refused.is_some() => {
                move_.go_to(Step::Settle);
                (Some(MoveOrder::GiveUp), None)
            }
            Step::Load if move_.done.len() == view.ranks => {
                move_.go_to(Step::Turn);
                (Some(MoveOrder::Turn), None)
            }
            // Orders are carried out later than they are given.
            Step::Turn
                if view.tables.edition() == move_.edition && view.sequences.all_go_by(move_.edition) =>
            {
                move_.go_to(Step::Settle);
                (Some(MoveOrder::Settle { ends: ends(view.sequences) }), None)
            }
            Step::Settle if move_.done.len() == view.ranks => (None, self.end()),
            _ => (None, None),
        }
    }

    fn end(&mut self) -> Option<MoveEnd> {
        let Move { table, experts, tokens, began, refused, .. } = self.move_.take()?;
        let outcome = refused.map_or(Ok(table), Err);
        Some(MoveEnd { outcome, experts, tokens, seconds: began.elapsed().as_secs_f64() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::sequence::{Admission, Order};
    use super::*;

    fn table(ranks: usize) -> PlacementTable {
        PlacementTable::linear(2, 4, ranks)
    }

    #[test]
    fn each_step_waits_for_all_ranks_and_the_last_for_every_token() {
        let mut tables = Tables::new(table(2));
        let mut sequences = Sequences::new(8, 64, Vec::new());
        let start = Admission { prompt: vec![1; 3], max_tokens: 9, ..Admission::default() };
        sequences.apply(Order::Admit(start)).expect("room");
        sequences.sampled(0, 5);
        let mut director = Director::default();
        director.begin(PlacementTable::round_robin(2, 4, 2), &tables).expect("nothing moves");
        assert!(director.begin(table(2), &tables).is_err(), "one at a time");
        macro_rules! next {
            () => {
                director.next(&View { tables: &tables, sequences: &sequences, ranks: 2 })
            };
        }
        director.hear(Rank(1), MoveNews::Loaded(3));
        director.token();
        assert!(matches!(next!(), (None, None)));
        director.hear(Rank(0), MoveNews::Loaded(1));
        assert!(matches!(next!(), (Some(MoveOrder::Turn), None)));
        assert!(matches!(next!(), (None, None)), "it has not been carried out");
        director.token();
        let new = Edition(1);
        tables.add(new, PlacementTable::round_robin(2, 4, 2));
        tables.turn();
        sequences.turn_to(new);
        assert!(matches!(next!(), (None, None)), "its token goes by the old one");
        sequences.sampled(0, 6);
        sequences.went_by(0, new);
        let (Some(MoveOrder::Settle { ends }), None) = next!() else { panic!("all go by the new one") };
        assert_eq!(ends, [(0, 3)], "its last token but one went by the new table");
        (0..2).for_each(|rank| director.hear(Rank(rank), MoveNews::Settled));
        let (None, Some(end)) = next!() else { panic!("it is over") };
        assert_eq!((end.outcome.map(|table| table.assignment), end.experts, end.tokens), {
            (Ok(PlacementTable::round_robin(2, 4, 2).assignment), 4, 1)
        });
        assert!(!director.is_busy());
    }

    #[test]
    fn one_refusal_ends_it_for_all() {
        let (tables, sequences) = (Tables::new(table(2)), Sequences::new(8, 64, Vec::new()));
        let view = View { tables: &tables, sequences: &sequences, ranks: 2 };
        let mut director = Director::default();
        director.begin(table(2), &tables).expect("nothing moves");
        director.hear(Rank(1), MoveNews::Refused("no room".into()));
        assert!(matches!(director.next(&view), (Some(MoveOrder::GiveUp), None)));
        director.hear(Rank(0), MoveNews::Loaded(2)); // it had not heard of that yet
        (0..2).for_each(|rank| director.hear(Rank(rank), MoveNews::Settled));
        let (None, Some(end)) = director.next(&view) else { panic!("it is over") };
        assert_eq!(end.outcome, Err("no room".into()));
    }
}
