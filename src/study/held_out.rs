//! How a placement does on tokens that it was not solved on: a fifth of the counts is kept back, a table is solved on the
//! rest, and both it and the baselines are scored on what was kept.

use exflow_placement::{
    Affinity, Balance, LayerId, PlacementTable, RoutingTrace, Score, SolveError, SolveOptions, Topology,
    baselines, score_affinity, solve,
};
use std::time::Duration;

/// Share of the counts that a table is solved on.
const SOLVED_ON: f64 = 0.8;
/// Longest that the solve on a part may take.
const LONGEST: Duration = Duration::from_secs(3);
/// Held-out cost above in-sample cost by more than this share: the profile is too small.
const ALARM: f64 = 0.03;

/// Scores on tokens that were not profiled.
#[derive(Debug, Clone)]
pub struct HeldOut {
    /// Tokens scored on.
    pub tokens: f64,
    /// Name and score of each placement; the solved one comes first.
    pub rows: Vec<(&'static str, Score)>,
    /// Crossings per token of the solved table on the tokens that it was solved on.
    pub in_sample: f64,
    /// Tokens that would do, where the profile is too small.
    pub wanted_tokens: Option<f64>,
}

impl HeldOut {
    /// Held-out crossings over in-sample crossings, less one.
    pub fn excess(&self) -> f64 {
        let held_out = self.rows.first().map_or(0.0, |(_, score)| score.crossings_per_token);
        if self.in_sample > 0.0 { held_out / self.in_sample - 1.0 } else { 0.0 }
    }
}

/// Keeps a fifth back: of a trace its last tokens, of counts a random part.
pub fn keep_back(trace: Option<&RoutingTrace>, affinity: &Affinity, seed: u64) -> (Affinity, Affinity) {
    if let Some(trace) = trace.filter(|trace| trace.tokens() >= 10) {
        let at = (trace.tokens() as f64 * SOLVED_ON) as usize;
        let counted = |range| Affinity::from_trace(&trace.slice(range), affinity.experts);
        if let (Ok(first), Ok(second)) = (counted(0..at), counted(at..trace.tokens())) {
            return (first, second);
        }
    }
    affinity.split(SOLVED_ON, seed)
}

/// Solves on `part` and scores on `kept`; `given` is scored in its place where there is one.
pub fn held_out(
    part: &Affinity,
    kept: &Affinity,
    topology: &Topology,
    options: &SolveOptions,
    given: Option<&PlacementTable>,
) -> Result<HeldOut, SolveError> {
    let limit = options.time_limit.mul_f64(0.3).min(LONGEST);
    let table = match given {
        Some(table) => table.clone(),
        None => {
            let options = SolveOptions { time_limit: limit, ..options.clone() };
            solve(part, topology, &options, &mut |_| ())?
        }
    };
    let in_sample = score_affinity(&table, part, topology).crossings_per_token;
    let mut rows = vec![("this table", score_affinity(&table, kept, topology))];
    for (name, baseline) in baselines(part, topology, options)? {
        rows.push((name, score_affinity(&baseline, kept, topology)));
    }
    let mut found = HeldOut { tokens: kept.tokens(), rows, in_sample, wanted_tokens: None };
    // What a solver gains on its own tokens beyond what holds elsewhere falls as 1 / tokens.
    let excess = found.excess();
    if excess > ALARM && given.is_none() {
        let tokens = part.tokens() * excess / ALARM;
        found.wanted_tokens = Some(round_up(tokens));
    }
    Ok(found)
}

/// How far a table of one kind of balance crosses on tokens that it was not solved on.
#[derive(Debug, Clone, PartialEq)]
pub struct BalanceScore {
    /// What is spread evenly.
    pub balance: Balance,
    /// On the tokens that were kept back; none where the ranks cannot hold the experts in this way.
    pub score: Option<Score>,
    /// Ranks that hold any expert of a layer, mean over layers.
    pub ranks_per_layer: f64,
}

/// A table for each kind of balance, solved on `part` for a moment and scored on `kept`: how much less crosses where
/// layers may be left off ranks.
pub fn balances(
    part: &Affinity,
    kept: &Affinity,
    topology: &Topology,
    options: &SolveOptions,
) -> Vec<BalanceScore> {
    let time_limit = options.time_limit.mul_f64(0.15).min(LONGEST.mul_f64(0.5));
    let one = |balance| {
        let options = SolveOptions {
            time_limit,
            balance,
            replicas: false,
            exact: false,
            threads: 1,
            ..options.clone()
        };
        solve(part, topology, &options, &mut |_| ()).ok()
    };
    let (layer, total) = match options.threads {
        0 | 1 => (one(Balance::Layer), one(Balance::Total)),
        _ => std::thread::scope(|scope| {
            let total = scope.spawn(|| one(Balance::Total));
            (one(Balance::Layer), total.join().ok().flatten())
        }),
    };
    let score = |balance, table: Option<&PlacementTable>| {
        let ranks = |table: &PlacementTable| {
            let held = (0..table.layers).map(|layer| table.ranks_of(LayerId::from(layer)).len());
            held.sum::<usize>() as f64 / table.layers as f64
        };
        BalanceScore {
            balance,
            ranks_per_layer: table.map_or(0.0, ranks),
            score: table.map(|table| score_affinity(table, kept, topology)),
        }
    };
    // A table that is even in every layer is even in all, so the wider search never has the worse answer.
    let cost = |table: &Option<PlacementTable>| table.as_ref().and_then(|table| table.cost);
    let wider = match (cost(&layer), cost(&total)) {
        (Some(even), Some(wide)) if even <= wide => &layer,
        _ => &total,
    };
    vec![score(Balance::Layer, layer.as_ref()), score(Balance::Total, wider.as_ref())]
}

/// To two digits, so that nobody takes an estimate for a measurement.
fn round_up(value: f64) -> f64 {
    let unit = 10f64.powf((value.max(1.0).log10().floor() - 1.0).max(0.0));
    (value / unit).ceil() * unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use exflow_placement::Generator;

    fn run(tokens: usize) -> HeldOut {
        let trace = Generator::new(6, 16, 1).trace(tokens, 1, 2);
        let affinity = Affinity::from_trace(&trace, 16).expect("counts");
        let (part, kept) = keep_back(Some(&trace), &affinity, 0);
        let options = SolveOptions { max_rounds: Some(40), ..SolveOptions::default() };
        held_out(&part, &kept, &Topology::uniform(4), &options, None).expect("solved")
    }

    #[test]
    fn a_small_profile_is_told_from_a_large_one() {
        let (small, large) = (run(200), run(20_000));
        assert!(small.wanted_tokens.is_some_and(|n| n > 160.0), "{small:?}");
        assert!(large.wanted_tokens.is_none(), "{large:?}");
        assert_eq!(large.tokens, 4000.0);
        let crossings = |at: usize| large.rows[at].1.crossings_per_token;
        assert!((1..5).all(|baseline| crossings(0) < crossings(baseline)), "{large:?}");
    }

    #[test]
    fn numbers_are_rounded_up() {
        assert_eq!([7.2, 123.0, 98_765.0].map(round_up), [8.0, 130.0, 99_000.0]);
    }
}
