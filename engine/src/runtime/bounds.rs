//! Which ranks the tokens of a sequence may live on, where `--domain` bounds them to a group around its home: nobody
//! outside gets their keys and values. `groups` has the group of every rank, and is empty where nothing is bounded.

use exflow_placement::{ExpertId, LayerId, PlacementTable, Rank, Route, Strategy};

/// Whether a sequence of `home` may have a token on `rank`.
fn allows(groups: &[u16], home: Rank, rank: Rank) -> bool {
    groups.is_empty() || groups.get(home.index()) == groups.get(rank.index())
}

/// The ranks whose attention a token of `home` may meet at a layer, ascending; `before`: the MoE layer before it. Bounded
/// it is the whole group but for ranks that hold nothing, as a token whose expert is outside stays wherever it is.
pub(crate) fn domain(
    groups: &[u16],
    table: &PlacementTable,
    before: Option<LayerId>,
    home: Rank,
) -> Vec<Rank> {
    if groups.is_empty() {
        return table.domain(before, home);
    }
    let held = table.experts_per_rank();
    let in_use = |rank: &Rank| *rank == home || held[rank.index()] > 0;
    (0..table.ranks).map(Rank::from).filter(|rank| allows(groups, home, *rank)).filter(in_use).collect()
}

/// The route of a token of `home` that is on `residence`: one that would leave the group comes back.
pub(crate) fn route(
    groups: &[u16],
    table: &PlacementTable,
    (strategy, layer): (Strategy, LayerId),
    (home, residence): (Rank, Rank),
    experts: &[ExpertId],
    weights: &[f32],
) -> Route {
    let route = table.route(strategy, layer, residence, experts, weights);
    match allows(groups, home, route.next) {
        true => route,
        false => Route { next: residence, ..route },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_token_never_leaves_its_group() {
        // Expert e of every layer is on rank e.
        let table = PlacementTable::linear(2, 4, 4);
        let pairs = [0, 0, 1, 1];
        let on = |groups: &[u16], residence: u16, expert: u16| {
            let at = (Strategy::Coherent, LayerId(0));
            route(groups, &table, at, (Rank(0), Rank(residence)), &[ExpertId(expert)], &[1.0])
        };
        for (residence, expert, next) in [(0, 1, 1), (1, 1, 1), (1, 3, 1), (0, 2, 0)] {
            let bounded = on(&pairs, residence, expert);
            assert_eq!((bounded.next, &bounded.serving[..]), (Rank(next), &[Rank(expert)][..]));
            assert_eq!(on(&[], residence, expert).next, Rank(expert));
        }
        assert_eq!(domain(&pairs, &table, Some(LayerId(0)), Rank(3)), [Rank(2), Rank(3)]);
        assert_eq!(domain(&[], &table, Some(LayerId(0)), Rank(3)).len(), 4);
        // Who holds nothing gets nothing, but for the home.
        let small = PlacementTable::from_assignment(vec![vec![Rank(2); 4]; 2], 4).expect("a table");
        assert_eq!(domain(&pairs, &small, None, Rank(3)), [Rank(2), Rank(3)]);
        assert_eq!(domain(&pairs, &small, None, Rank(2)), [Rank(2)]);
    }
}
