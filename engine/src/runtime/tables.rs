//! The placement tables that tokens go by: one, or two while experts move from one to the other.
//!
//! Every token goes by one table from its embedding to its id, and its rows say which: whoever serves them has the
//! experts of both. Its successor goes by the newer one as soon as the rank that it begins on has rank 0's word.

use super::bounds;
use crate::EngineError;
use exflow_placement::{LayerId, PlacementTable, Rank};
use serde::{Deserialize, Serialize};

/// Which table a token goes by; counted from 0 in each epoch, and around.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Edition(pub(crate) u16);

impl Edition {
    pub(crate) fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    /// The later one of two that are live together.
    pub(crate) fn later(self, other: Self) -> Self {
        if other == self.next() { other } else { self }
    }
}

/// The tables that are live.
pub(crate) struct Tables {
    now: (Edition, PlacementTable),
    /// The one that experts move to, or that they came from.
    other: Option<(Edition, PlacementTable)>,
}

impl Tables {
    pub(crate) fn new(table: PlacementTable) -> Self {
        Self { now: (Edition::default(), table), other: None }
    }

    /// The table that new tokens go by.
    pub(crate) fn now(&self) -> &PlacementTable {
        &self.now.1
    }

    /// Which one that is.
    pub(crate) fn edition(&self) -> Edition {
        self.now.0
    }

    /// The table of an edition.
    ///
    /// # Errors
    /// One that is not live: only a rank that does not keep to the order of things can send rows of it.
    pub(crate) fn of(&self, edition: Edition) -> Result<&PlacementTable, EngineError> {
        let other = self.other.as_ref().filter(|(other, _)| *other == edition);
        match other {
            Some((_, table)) => Ok(table),
            None if edition == self.now.0 => Ok(&self.now.1),
            None => {
                let what = format!("a token goes by placement table {}, which is not live", edition.0);
                Err(EngineError::Internal(what))
            }
        }
    }

    /// The ranks that need a layer's keys and values, ascending: wherever a token that goes by a live table may meet its
    /// attention. `before`: the MoE layer before it.
    pub(crate) fn domain(&self, groups: &[u16], before: Option<LayerId>, home: Rank) -> Vec<Rank> {
        let mut ranks = bounds::domain(groups, &self.now.1, before, home);
        if let Some((_, table)) = &self.other {
            ranks.extend(bounds::domain(groups, table, before, home));
            ranks.sort_unstable();
            ranks.dedup();
        }
        ranks
    }

    /// A second table is there, by which no token goes yet.
    pub(super) fn add(&mut self, edition: Edition, table: PlacementTable) {
        self.other = Some((edition, table));
    }

    /// New tokens go by the other table.
    pub(super) fn turn(&mut self) {
        if let Some(other) = &mut self.other {
            std::mem::swap(&mut self.now, other);
        }
    }

    /// No token goes by the other table any more.
    pub(super) fn settle(&mut self) {
        self.other = None;
    }

    /// A rank that would be new in the domain of a layer, were this the table: it has none of the keys and values there.
    /// `before`: of each layer of the model, the MoE layer before it.
    pub(super) fn new_in_a_domain(
        &self,
        groups: &[u16],
        table: &PlacementTable,
        before: impl Iterator<Item = Option<LayerId>>,
    ) -> Option<(usize, Rank)> {
        before.enumerate().find_map(|(layer, before)| {
            let of_home = |home: Rank| {
                let there = bounds::domain(groups, &self.now.1, before, home);
                bounds::domain(groups, table, before, home).into_iter().find(|rank| !there.contains(rank))
            };
            (0..table.ranks).map(Rank::from).find_map(of_home).map(|rank| (layer, rank))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_two_tables_are_told_apart_until_one_is_gone() {
        let mut tables = Tables::new(PlacementTable::linear(2, 4, 4));
        let (old, new) = (Edition(0), Edition(0).next());
        assert!(tables.of(new).is_err());
        tables.add(new, PlacementTable::round_robin(2, 4, 2));
        assert_eq!((tables.edition(), tables.now().ranks), (old, 4));
        tables.turn();
        assert_eq!((tables.edition(), tables.now().ranks), (new, 2));
        assert_eq!(tables.of(old).map(|table| table.ranks).ok(), Some(4));
        tables.settle();
        assert!(tables.of(old).is_err() && tables.of(new).is_ok());
        assert_eq!((old.later(new), new.later(old), new.later(new)), (new, new, new));
        assert_eq!(Edition(u16::MAX).later(Edition(0)), Edition(0), "counted around");
    }

    #[test]
    fn a_domain_is_that_of_both_tables() {
        let on = |rank| PlacementTable::from_assignment(vec![vec![Rank(rank); 4]; 2], 3).expect("a table");
        let mut tables = Tables::new(on(1));
        let before = || [None, Some(LayerId(0))].into_iter();
        assert_eq!(tables.new_in_a_domain(&[], &on(1), before()), None);
        assert_eq!(tables.new_in_a_domain(&[], &on(2), before()), Some((0, Rank(2))));
        tables.add(Edition(1), on(2));
        assert_eq!(tables.domain(&[], Some(LayerId(0)), Rank(0)), [Rank(1), Rank(2)]);
        assert_eq!(tables.domain(&[], None, Rank(0)), [Rank(0), Rank(1), Rank(2)]);
        tables.turn();
        tables.settle();
        assert_eq!(tables.domain(&[], Some(LayerId(0)), Rank(0)), [Rank(2)]);
    }
}
