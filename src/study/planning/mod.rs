//! Planning a run: what a world measured, what its model routes, and what each setting will make of both.

mod candidate;
mod race;
mod topology;
mod trial;

pub use candidate::{Candidate, candidates, layer_split, ways};
pub(super) use trial::{TURNS, Trials};

use super::{StudyError, grid};
use exflow_engine::plan::{Load, Measurements, Prediction, Setting, Shape, Tried, Workload, predict};
use exflow_engine::{Cluster, Combine, Progress, RoutingTrace, Schedule, Strategy};
use exflow_placement::{PlacementTable, SolveOptions};
use serde::Serialize;

/// Sequences and tokens of the text that the model writes to be planned on. Tables are solved on the first half, and
/// predictions made from the second: a table does better on the text that it was solved on than on any other.
const OWN_TEXT: (usize, usize) = (16, 24);

/// A candidate with what it is predicted to do.
#[derive(Debug, Clone)]
pub struct Ranked {
    /// The way to run.
    pub candidate: Candidate,
    /// What it will do.
    pub prediction: Prediction,
    /// Tokens per second on trial; none where it was predicted to be too far behind.
    pub tried: Option<f64>,
    /// Tokens per second by both, each weighed by how sure it is, in the mood of the prediction.
    pub expected: f64,
}

/// The same, to be written to a file.
#[derive(Debug, Clone, Serialize)]
pub struct Planned {
    /// Sequences at once.
    pub sequences: usize,
    /// `vanilla` or `coherent`.
    pub strategy: String,
    /// `rounds` or `flow`.
    pub schedule: String,
    /// The table's name.
    pub table: String,
    /// What it will do.
    pub prediction: Prediction,
    /// What it made on trial; none where it was predicted to be too far behind.
    pub tried_tokens_per_s: Option<f64>,
    /// By both.
    pub expected_tokens_per_s: f64,
}

/// What predictions are made from.
#[derive(Debug)]
pub struct Planner {
    /// What the world measured of itself.
    pub measured: Measurements,
    shape: Shape,
    groups: Vec<u16>,
    combine: Combine,
    routes: RoutingTrace,
    /// To solve tables on.
    profile: RoutingTrace,
    /// Turns that each way has in trials to learn from.
    pub(super) turns: usize,
}

impl Planner {
    /// Has the world measure itself; `routes` are those of text like that to come.
    ///
    /// # Errors
    /// What [`Cluster::measure`] refuses.
    pub fn measure(cluster: &mut Cluster, routes: RoutingTrace) -> Result<Self, StudyError> {
        let profile = routes.slice(0..0);
        let measured = cluster.measure()?;
        let shape = Shape::of(cluster.spec(), cluster.options().kv_dtype, cluster.options().kv_wire);
        let (combine, groups) = (cluster.options().combine, cluster.groups().to_vec());
        Ok(Self { measured, shape, groups, combine, routes, profile, turns: TURNS })
    }

    /// The same, on text that the model writes itself.
    ///
    /// # Errors
    /// What the engine refuses.
    pub fn of_own_text(
        cluster: &mut Cluster,
        seed: u64,
        progress: &dyn Progress,
    ) -> Result<Self, StudyError> {
        let routes = grid::own_routes(cluster, OWN_TEXT, seed, progress)?;
        let half = routes.tokens() / 2;
        let kept = routes.slice(half..routes.tokens());
        Ok(Self { profile: routes.slice(0..half), ..Self::measure(cluster, kept)? })
    }

    /// Has the cluster decode a few tokens of the model's own text in each way, by turns, with the table that it has. What
    /// comes out says by how much the ranks' times grow while all is at work at once, and all later predictions go by it. The
    /// cluster is left in any of the ways.
    ///
    /// # Errors
    /// What the engine refuses.
    pub fn try_out(
        &mut self,
        cluster: &mut Cluster,
        ways: &[Way],
        sequences: usize,
    ) -> Result<(), StudyError> {
        let mut trials = trials_of(ways.to_vec(), sequences);
        trials.finish(cluster, self.turns)?;
        self.learn(cluster.placement(), sequences, trials.usual());
        Ok(())
    }

    /// The same from what trials with a table came to. What was learnt of the same ways and sequences before is forgotten.
    pub(super) fn learn(&mut self, table: &PlacementTable, sequences: usize, each: Vec<(Way, Tried)>) {
        for ((strategy, schedule), tried) in each {
            let (combine, groups) = (self.combine, &self.groups[..]);
            let setting = Setting { strategy, schedule, combine, table, groups };
            let work = Workload { routes: &self.routes, sequences };
            let load = Load::of(&self.measured, &self.shape, work, setting, tried);
            let other =
                |one: &Load| (one.strategy, one.schedule, one.sequences) != (strategy, schedule, sequences);
            self.measured.loads.retain(other);
            self.measured.loads.push(load);
        }
    }

    /// What a candidate will do with so many sequences.
    pub fn predict(&self, candidate: &Candidate, sequences: usize) -> Prediction {
        let Candidate { strategy, schedule, placement, .. } = candidate;
        let setting = Setting {
            strategy: *strategy,
            schedule: *schedule,
            combine: self.combine,
            table: placement,
            groups: &self.groups,
        };
        predict(&self.measured, &self.shape, Workload { routes: &self.routes, sequences }, setting)
    }

    /// Every candidate's prediction, the best first.
    fn rank(&self, candidates: &[Candidate], sequences: usize) -> Vec<Ranked> {
        let each = candidates.iter().map(|candidate| {
            let prediction = self.predict(candidate, sequences);
            let expected = prediction.tokens_per_s;
            Ranked { candidate: candidate.clone(), prediction, tried: None, expected }
        });
        let mut all: Vec<_> = each.collect();
        all.sort_by(best_first);
        all
    }

    /// Every candidate with what it is expected to make, the best first; those that were tried before the others. The cluster
    /// decodes on trial as each of those says that may be the best by their predictions, until one is, or nearly, and what is
    /// expected of them goes by both; where only one may, nothing is tried. The cluster is left in any of them.
    ///
    /// # Errors
    /// What the engine refuses.
    pub fn choose(
        &self,
        cluster: &mut Cluster,
        candidates: &[Candidate],
        sequences: usize,
    ) -> Result<Vec<Ranked>, StudyError> {
        let mut ranked = self.rank(candidates, sequences);
        let tried = race::run(&mut ranked, sequences, self.turns, cluster)?;
        ranked[..tried].sort_by(best_first);
        Ok(ranked)
    }
}

fn best_first(a: &Ranked, b: &Ranked) -> std::cmp::Ordering {
    b.expected.total_cmp(&a.expected)
}

/// A strategy with a schedule.
pub(super) type Way = (Strategy, Schedule);

/// Trials of ways with the table that the cluster has.
pub(super) fn trials_of(ways: Vec<Way>, sequences: usize) -> Trials<Way> {
    Trials::new(ways, sequences, |way, cluster| cluster.change(way.0, way.1, None))
}

/// A table solved on the planner's own text, for equal ranks.
///
/// # Errors
/// What the solver refuses.
pub fn planned_table(
    planner: &Planner,
    experts: usize,
    options: &SolveOptions,
) -> Result<PlacementTable, StudyError> {
    grid::grid_table(&planner.profile, experts, planner.measured.world_size(), None, options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use exflow_engine::plan::{ByStrategy, Curve, LinkTime, RankTimes};
    use exflow_placement::{Rank, Topology};

    fn planner() -> Planner {
        let link = LinkTime { latency_s: 0.002, bytes_per_s: 1e6, message_s: 0.0 };
        let flat = |s: f64| Curve(vec![(1, s), (16, s)]);
        let hop = |s: f64| ByStrategy { coherent: flat(s), vanilla: flat(s) };
        let rank = |s: f64| RankTimes { hop: hop(s), attend: hop(s), crowded: 1.0, ..RankTimes::default() };
        let shape = Shape { layers: vec![Some(0), Some(1)], hidden_bytes: 1000.0, kv_bytes: 2000.0 };
        let mut routes = RoutingTrace::new(2, 1);
        (0..40).for_each(|i| routes.push_token(&[i % 2, i % 2]));
        Planner {
            measured: Measurements {
                ranks: vec![rank(0.001), rank(0.004)],
                links: vec![vec![link; 2]; 2],
                exchange_s: 0.002,
                loads: Vec::new(),
            },
            shape,
            groups: Vec::new(),
            combine: Combine::Exact,
            profile: routes.clone(),
            routes,
            turns: TURNS,
        }
    }

    #[test]
    fn a_measured_topology_can_be_read() {
        let text = planner().topology(&["a".into(), "b".into()]);
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), &text).expect("written");
        let topology = Topology::load(file.path()).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(topology.cost, [0.0, 3000.0, 3000.0, 0.0], "2 ms and 1000 bytes at 1 MB/s");
        assert_eq!((topology.ranks[0].speed, topology.ranks[1].speed), (1.0, 0.25));
        let (class, link) = topology.link_between(Rank(0), Rank(1)).expect("a link");
        assert_eq!((class, link.latency_us, link.gbit_per_s), ("network", 2000.0, 0.008));
    }

    #[test]
    fn the_best_comes_first() {
        let split = layer_split(2, 2, 2).expect("a table");
        assert_eq!(split.assignment, [[Rank(0), Rank(0)], [Rank(1), Rank(1)]]);
        let tables = [("round_robin".into(), PlacementTable::round_robin(2, 2, 2)), ("layers".into(), split)];
        let ranked = planner().rank(&candidates(&tables, &[Schedule::Rounds, Schedule::Flow]), 1);
        assert_eq!(ranked.len(), 8);
        assert!(ranked.windows(2).all(|w| w[0].prediction.tokens_per_s >= w[1].prediction.tokens_per_s));
        // A token keeps its expert and its successor takes the other one: one crossing a token, or four latencies for
        // every other token, or there and back between layers.
        assert_eq!(ranked[0].candidate.to_string(), "coherent, flow, round_robin");
    }
}
