//! From passages to a placement: routes, counts, the solved table, and its score on what was kept back.

use super::{Corpus, StudyError};
use crate::report::StayFacts;
use exflow_engine::{Cluster, Progress};
use exflow_placement::{
    Affinity, PlacementTable, RoutingTrace, SolveError, SolveOptions, SolveProgress, Topology, score_trace,
    solve,
};
use std::time::{Duration, Instant};

/// Cost and bound are shown so often.
const TOLD_EVERY: Duration = Duration::from_millis(200);

/// Routes of a corpus.
#[derive(Debug, Clone)]
pub struct Profiled {
    /// Routes of the profiled passages.
    pub trace: RoutingTrace,
    /// Routes of the passages that were kept back.
    pub held_out: RoutingTrace,
    /// Wall clock of both, in seconds.
    pub seconds: f64,
}

/// A solved placement and how it does on text that was not profiled.
#[derive(Debug, Clone)]
pub struct Placed {
    /// Counts that were solved on.
    pub affinity: Affinity,
    /// The solved table, with cost and bound.
    pub table: PlacementTable,
    /// Round-robin, linear, load alone and affinity, on the held-out routes.
    pub stay: Vec<StayFacts>,
    /// Wall clock of the solver, in seconds.
    pub seconds: f64,
}

/// Routes every passage of the corpus through the model.
pub fn profile(
    cluster: &mut Cluster,
    corpus: &Corpus,
    progress: &dyn Progress,
) -> Result<Profiled, StudyError> {
    let start = Instant::now();
    let trace = cluster.profile(&corpus.profile, progress)?;
    let held_out = cluster.profile(&corpus.held_out, progress)?;
    Ok(Profiled { trace, held_out, seconds: start.elapsed().as_secs_f64() })
}

/// Counts affinity, solves for `ranks` equal ranks, and scores on the held-out routes beside three baselines.
pub fn place(
    profiled: &Profiled,
    experts: usize,
    ranks: usize,
    options: &SolveOptions,
    progress: &dyn Progress,
) -> Result<Placed, StudyError> {
    let affinity = Affinity::from_trace(&profiled.trace, experts)?;
    let topology = Topology::uniform(ranks);
    let start = Instant::now();
    let mut table = solve_with_progress(&affinity, &topology, options, progress)?;
    let seconds = start.elapsed().as_secs_f64();
    table.source = Some("affinity".into());
    let by_load = solve(&independent(&affinity), &topology, &load_options(options), &mut |_| {})?;
    let layers = affinity.layers;
    let candidates = [
        ("round-robin", &PlacementTable::round_robin(layers, experts, ranks)),
        ("linear", &PlacementTable::linear(layers, experts, ranks)),
        ("load skew alone", &by_load),
        ("affinity", &table),
    ];
    let stay = candidates.map(|(label, table)| stay_facts(label, table, &profiled.held_out)).to_vec();
    Ok(Placed { affinity, table, stay, seconds })
}

/// Solves, and reports time against the limit, cost and bound.
pub fn solve_with_progress(
    affinity: &Affinity,
    topology: &Topology,
    options: &SolveOptions,
    progress: &dyn Progress,
) -> Result<PlacementTable, SolveError> {
    const STAGE: &str = "solve placement";
    let limit = options.time_limit.as_secs_f64().ceil().max(1.0) as u64;
    let mut told = Duration::ZERO;
    let mut last = String::new();
    let table = solve(affinity, topology, options, &mut |state| {
        last = course(&state);
        if state.elapsed >= told {
            told = state.elapsed + TOLD_EVERY;
            progress.detail(STAGE, &last);
            progress.update(STAGE, state.elapsed.as_secs().min(limit.saturating_sub(1)), limit, "s");
        }
    })?;
    progress.detail(STAGE, &last);
    progress.update(STAGE, limit, limit, "s");
    Ok(table)
}

/// `cost 812, bound 790 (gap 2.7 %)`.
fn course(state: &SolveProgress) -> String {
    let gap = if state.cost > 0.0 { (1.0 - state.lower_bound / state.cost).max(0.0) } else { 0.0 };
    format!("cost {:.0}, bound {:.0} (gap {:.1} %)", state.cost, state.lower_bound, 100.0 * gap)
}

/// What the counts would be if a token's next expert did not depend on its last: load skew and nothing else.
pub(super) fn independent(affinity: &Affinity) -> Affinity {
    let e = affinity.experts;
    let load = affinity.load_or_derived();
    let mut flat = Affinity { wrap: None, coactivation: None, ..affinity.clone() };
    for (pair, counts) in flat.transitions.chunks_exact_mut(e * e).enumerate() {
        let (from, to) = (&load[pair * e..][..e], &load[(pair + 1) * e..][..e]);
        let total: f64 = to.iter().sum::<f64>().max(1.0);
        for (at, count) in counts.iter_mut().enumerate() {
            *count = from[at / e] * to[at % e] / total;
        }
    }
    flat
}

/// The baseline needs no more than a moment: with independent counts, sorting by load is already best.
fn load_options(options: &SolveOptions) -> SolveOptions {
    SolveOptions { time_limit: options.time_limit.min(Duration::from_secs(2)), ..options.clone() }
}

fn stay_facts(label: &str, table: &PlacementTable, held_out: &RoutingTrace) -> StayFacts {
    let score = score_trace(table, held_out);
    StayFacts {
        label: label.into(),
        stay_rate: score.stay_rate,
        crossings_per_token: score.crossings_per_token,
        imbalance: score.worst_load,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn independent_counts_keep_the_load_and_lose_the_order() {
        let mut trace = RoutingTrace::new(2, 1);
        for token in [[0, 1], [0, 1], [1, 0], [0, 0]] {
            trace.push_token(&token);
        }
        let affinity = Affinity::from_trace(&trace, 2).expect("counts");
        let flat = independent(&affinity);
        assert_eq!(flat.transitions, [1.5, 1.5, 0.5, 0.5]);
        assert_eq!(flat.load, affinity.load);
    }
}
