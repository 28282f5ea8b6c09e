//! Replays of a trace over several tables, strategies and numbers of ranks.

use exflow_placement::{
    Affinity, Link, PlacementTable, RoutingTrace, SimulateError, SimulateOptions, Simulation, SolveError,
    SolveOptions, Strategy, TableError, TableShape, Topology, simulate, solve,
};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;
use thiserror::Error;

/// Why a replay is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// A table that does not fit the trace.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A trace that does not fit.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
    /// A sweep's table cannot be solved.
    #[error(transparent)]
    Solve(#[from] SolveError),
    /// Nobody says how many ranks there are.
    #[error("{0} is for any number of ranks: give --ranks, --topology or a table's file beside it")]
    Ranks(String),
}

/// A table and what it is called.
#[derive(Debug, Clone)]
pub struct TableChoice {
    /// File or rule.
    pub name: String,
    /// The table.
    pub table: PlacementTable,
}

impl TableChoice {
    /// `round_robin`, `linear` or a table's file, for a model of this shape.
    pub fn named(
        name: &str,
        layers: usize,
        experts: usize,
        ranks: Option<usize>,
    ) -> Result<Self, ReplayError> {
        let of_ranks = || ranks.ok_or_else(|| ReplayError::Ranks(name.to_owned()));
        let table = match name {
            "round_robin" => PlacementTable::round_robin(layers, experts, of_ranks()?),
            "linear" => PlacementTable::linear(layers, experts, of_ranks()?),
            path => PlacementTable::read(Path::new(path), Some(TableShape { experts, ranks }))?,
        };
        Ok(Self { name: name.to_owned(), table })
    }
}

/// One replay.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Replayed {
    /// Name of the table.
    pub placement: String,
    /// R.
    pub ranks: usize,
    /// Strategy.
    pub strategy: Strategy,
    /// What was counted.
    #[serde(flatten)]
    pub simulation: Simulation,
}

/// Every table under every strategy.
pub fn replay(
    trace: &RoutingTrace,
    tables: &[TableChoice],
    topology: &Topology,
    strategies: &[Strategy],
    base: &SimulateOptions,
) -> Result<Vec<Replayed>, ReplayError> {
    let mut rows = Vec::new();
    for choice in tables {
        for &strategy in strategies {
            let simulation =
                simulate(&choice.table, trace, topology, &SimulateOptions { strategy, ..*base })?;
            rows.push(Replayed {
                placement: choice.name.clone(),
                ranks: choice.table.ranks,
                strategy,
                simulation,
            });
        }
    }
    Ok(rows)
}

/// For each number of ranks: round-robin, and a table solved on the first half of the trace; both replayed over the
/// second half.
pub fn sweep(
    trace: &RoutingTrace,
    experts: usize,
    ranks: &[usize],
    link: Link,
    strategies: &[Strategy],
    base: &SimulateOptions,
    time_limit: Duration,
) -> Result<Vec<Replayed>, ReplayError> {
    let half = trace.tokens() / 2;
    let counts = Affinity::from_trace(&trace.slice(0..half), experts).map_err(SolveError::from)?;
    let unseen = trace.slice(half..trace.tokens());
    let mut rows = Vec::new();
    for &ranks in ranks {
        let topology = Topology::uniform(ranks);
        let options = SolveOptions { time_limit, ..SolveOptions::default() };
        let solved = solve(&counts, &topology, &options, &mut |_| ())?;
        let tables = [
            TableChoice {
                name: "round_robin".into(),
                table: PlacementTable::round_robin(trace.layers(), experts, ranks),
            },
            TableChoice { name: "affinity".into(), table: solved },
        ];
        rows.extend(replay(&unseen, &tables, &topology.or_linked(link), strategies, base)?);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use exflow_placement::Generator;

    #[test]
    fn a_sweep_shows_what_ranks_cost_and_tables_save() {
        let trace = Generator::new(6, 16, 1).trace(8000, 1, 2);
        let link = Link { latency_us: 100.0, gbit_per_s: 1.0 };
        let base = SimulateOptions {
            strategy: Strategy::Coherent,
            batch: 4,
            row_bytes: 1000.0,
            kv_bytes: 100.0,
            combine_sum: false,
        };
        let both = [Strategy::Vanilla, Strategy::Coherent];
        let rows =
            sweep(&trace, 16, &[1, 2, 4], link, &both, &base, Duration::from_millis(200)).expect("sweep");
        assert_eq!(rows.len(), 12);
        let find = |ranks, placement: &str, strategy| {
            &rows
                .iter()
                .find(|r| r.ranks == ranks && r.placement == placement && r.strategy == strategy)
                .expect("row")
                .simulation
        };
        assert_eq!(find(1, "affinity", Strategy::Coherent).dispatch_bytes, 0.0);
        let (rr, solved) =
            (find(4, "round_robin", Strategy::Coherent), find(4, "affinity", Strategy::Coherent));
        assert!(solved.stay_rate > rr.stay_rate + 0.1 && solved.flow_ms < rr.flow_ms);
        assert_eq!(
            (rr.exchanges_per_layer, find(4, "round_robin", Strategy::Vanilla).exchanges_per_layer),
            (1.0, 2.0)
        );
        assert!(matches!(TableChoice::named("linear", 2, 2, None), Err(ReplayError::Ranks(_))));
    }
}
