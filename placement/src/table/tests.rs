//! Tests of the table.

use super::*;

fn replica(layer: u16, expert: u16, rank: u16) -> Replica {
    Replica { layer: LayerId(layer), expert: ExpertId(expert), rank: Rank(rank) }
}

#[test]
fn round_robin_and_linear() {
    let rr = PlacementTable::round_robin(2, 5, 2);
    assert_eq!(rr.assignment[1], [0, 1, 0, 1, 0].map(Rank));
    let linear = PlacementTable::linear(1, 5, 3);
    assert_eq!(linear.assignment[0], [0, 0, 1, 1, 2].map(Rank));
    assert_eq!(PlacementTable::linear(1, 2, 3).ranks_of(LayerId(0)), [Rank(0), Rank(1)]);
}

#[test]
fn holders_domains_and_copies() {
    let mut table = PlacementTable::linear(2, 4, 4);
    table.set_replicas(vec![replica(0, 1, 3), replica(0, 1, 0), replica(0, 1, 1), replica(0, 1, 0)]);
    table.check().unwrap();
    assert_eq!(table.holders(LayerId(0), ExpertId(1)).collect::<Vec<_>>(), [1, 0, 3].map(Rank));
    assert_eq!(table.holders(LayerId(9), ExpertId(1)).count(), 0);
    assert_eq!(table.experts_of(LayerId(0), Rank(0)), [ExpertId(0), ExpertId(1)]);
    assert_eq!(table.experts_per_rank(), [3, 2, 2, 3]);
    let small =
        PlacementTable::from_assignment(vec![vec![Rank(1), Rank(1)], vec![Rank(0), Rank(2)]], 4).unwrap();
    assert_eq!(small.domain(Some(LayerId(0)), Rank(3)), [Rank(1)]);
    assert_eq!(small.domain(None, Rank(3)), [0, 2, 3].map(Rank));
}

#[test]
fn round_trip_and_fit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.json");
    let mut table = PlacementTable::round_robin(3, 4, 2);
    table.model_digest = Some("abc".into());
    table.set_replicas(vec![replica(2, 0, 1)]);
    table.save(&path).unwrap();
    let read = PlacementTable::load(&path).unwrap();
    assert_eq!(read, table);
    read.check_fits(3, 4, 2, None).unwrap();
    read.check_fits(3, 4, 2, Some("abc")).unwrap();
    assert!(matches!(read.check_fits(3, 4, 2, Some("x")), Err(TableError::OtherDigest { .. })));
    assert!(matches!(read.check_fits(3, 8, 2, None), Err(TableError::OtherModel { what: "experts", .. })));
}

#[test]
fn wrong_tables_are_named_errors() {
    let good = PlacementTable::round_robin(2, 2, 2);
    let broken = |change: &dyn Fn(&mut PlacementTable)| {
        let mut table = good.clone();
        change(&mut table);
        table.check().unwrap_err()
    };
    assert!(matches!(broken(&|t| t.version = 2), TableError::Version(2)));
    assert!(matches!(broken(&|t| t.ranks = 0), TableError::Dimension { what: "ranks", .. }));
    assert!(matches!(broken(&|t| t.layers = 3), TableError::Layers { found: 2, .. }));
    assert!(matches!(broken(&|t| t.assignment[1].clear()), TableError::Experts { layer: LayerId(1), .. }));
    assert!(matches!(broken(&|t| t.assignment[1][0] = Rank(2)), TableError::RankOutside { .. }));
    assert!(matches!(broken(&|t| t.replicas = vec![replica(2, 0, 0)]), TableError::ReplicaOutside { .. }));
    assert!(matches!(broken(&|t| t.replicas = vec![replica(0, 0, 0)]), TableError::ReplicaTwice { .. }));
    assert!(matches!(
        broken(&|t| t.replicas = vec![replica(1, 0, 1), replica(0, 0, 1)]),
        TableError::ReplicaOrder { .. }
    ));
    assert!(PlacementTable::from_assignment(vec![], 2).is_err());
}
