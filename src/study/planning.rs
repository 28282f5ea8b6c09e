//! Planning a run: what a world measured, what its model routes, and what each setting will make of both.

use super::grid::{self, of_mean_time, quantile};
use super::{StudyError, decode_rate};
use exflow_engine::plan::{Load, Measurements, Prediction, Setting, Shape, Workload, predict};
use exflow_engine::{
    Cluster, ClusterOptions, Combine, Linger, Overlap, PlacementSource, Progress, RoutingTrace, Schedule,
    Strategy,
};
use exflow_placement::{PlacementTable, Rank, SolveOptions};
use serde::Serialize;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Sequences and tokens of the text that the model writes to be planned on. Tables are solved on the first half, and
/// predictions made from the second: a table does better on the text that it was solved on than on any other.
const OWN_TEXT: (usize, usize) = (16, 24);

/// Least and most tokens of each sequence in a trial: one for each that decodes beside it, as it takes the longer from the
/// first that begins to the last the more there are, and more where the model is quick.
const TRIAL: (usize, usize) = (12, 32);
/// The same before it, while everything is still to be made for the first time.
const TRIAL_WARM_UP: usize = 3;
/// The ways take turns so often, of which the median counts: a machine is slower in some seconds than in others, and so are
/// the first ones of a world.
const TRIAL_TURNS: usize = 3;
/// In a turn a trial is made longer and repeated until so much time has passed: a short one is over in less than a
/// scheduler's moods last, and mostly beginning and end, while not all sequences decode.
const TRIAL_TIME: Duration = Duration::from_millis(500);
/// A trial that takes longer by itself has no further turns: it waits for links, whose latency has no moods.
const LONG_TRIAL: Duration = Duration::from_secs(2);

/// A way to run.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Where tokens go.
    pub strategy: Strategy,
    /// What a rank waits for.
    pub schedule: Schedule,
    /// The table's name.
    pub table: String,
    /// The table.
    pub placement: PlacementTable,
    /// What it is called among ablations, which may overlap less.
    pub ablation: Option<&'static str>,
    /// What runs while rows are on their way, in rounds.
    pub overlap: Overlap,
    /// How long rows are held back, in flow.
    pub linger: Linger,
}

impl Candidate {
    /// These options with what this candidate changes of them.
    pub fn options(&self, options: &ClusterOptions) -> ClusterOptions {
        ClusterOptions {
            strategy: self.strategy,
            schedule: self.schedule,
            overlap: self.overlap,
            linger: self.linger,
            placement: PlacementSource::Table(self.placement.clone()),
            ..options.clone()
        }
    }

    /// Whether a planner may pick it: it leaves to the ranks what they overlap and how long they linger.
    pub(super) fn may_be_picked(&self) -> bool {
        let lingers = self.linger == Linger::Auto || self.schedule == Schedule::Rounds;
        self.overlap == Overlap::Auto && lingers
    }
}

impl std::fmt::Display for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}, {}", self.strategy, self.schedule, self.table)
    }
}

/// A candidate with what it is predicted to do.
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
        Ok(Self { measured, shape, groups, combine, routes, profile })
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
    /// cluster is left in the last way.
    ///
    /// # Errors
    /// What the engine refuses.
    pub fn try_out(
        &mut self,
        cluster: &mut Cluster,
        ways: &[(Strategy, Schedule)],
        sequences: usize,
    ) -> Result<(), StudyError> {
        let prompts = grid::trial_prompts(cluster, sequences.max(2))?;
        let table = cluster.placement().clone();
        let mut turns: Vec<Vec<Trial>> = vec![Vec::new(); ways.len()];
        for _ in 0..TRIAL_TURNS {
            for (&(strategy, schedule), turns) in ways.iter().zip(&mut turns) {
                if turns.iter().all(|trial| trial.longest < LONG_TRIAL) {
                    cluster.change(strategy, schedule, None)?;
                    turns.push(Trial::run(cluster, &prompts, sequences)?);
                }
            }
        }
        for (&(strategy, schedule), turns) in ways.iter().zip(&turns) {
            let mut rates: Vec<f64> = turns.iter().map(|trial| trial.tokens_per_s).collect();
            let (combine, groups) = (self.combine, &self.groups[..]);
            let setting = Setting { strategy, schedule, combine, table: &table, groups };
            let work = Workload { routes: &self.routes, sequences };
            let load = Load::of(&self.measured, &self.shape, work, setting, quantile(&mut rates, 0.5));
            self.measured.loads.push(load);
        }
        Ok(())
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
    pub fn rank(&self, candidates: &[Candidate], sequences: usize) -> Vec<(Candidate, Prediction)> {
        let each = candidates.iter().map(|candidate| (candidate.clone(), self.predict(candidate, sequences)));
        let mut all: Vec<_> = each.collect();
        all.sort_by(|(_, a), (_, b)| b.tokens_per_s.total_cmp(&a.tokens_per_s));
        all
    }

    /// What was measured, as a topology file: costs in microseconds per row; `hosts` of each rank.
    pub fn topology(&self, hosts: &[String]) -> String {
        let (measured, row) = (&self.measured, self.shape.hidden_bytes);
        let speed = |rank: usize| measured.ranks[rank].hop.coherent.at(4);
        let fastest = (0..measured.world_size()).map(speed).fold(f64::INFINITY, f64::min);
        let mut text = String::from(
            "# Measured by `exflow plan`: microseconds for a row of this model, from rank to rank.\n",
        );
        let _ = writeln!(text, "row_bytes = {row}\nranks = [");
        for (rank, host) in hosts.iter().enumerate() {
            let speed = if speed(rank) > 0.0 { fastest / speed(rank) } else { 1.0 };
            let _ = writeln!(text, "    {{ host = {host:?}, speed = {speed:.3} }},");
        }
        text += "]\ncost = [\n";
        for (from, links) in measured.links.iter().enumerate() {
            let cost = |(to, link): (usize, &exflow_engine::plan::LinkTime)| match to == from {
                true => "0".to_owned(),
                false => format!("{:.1}", 1e6 * (link.latency_s + row / link.bytes_per_s)),
            };
            let costs: Vec<String> = links.iter().enumerate().map(cost).collect();
            let _ = writeln!(text, "    [{}],", costs.join(", "));
        }
        text += "]\n";
        for (class, same) in [("host", true), ("network", false)] {
            let pairs = measured.links.iter().enumerate().flat_map(|(from, links)| {
                links.iter().enumerate().filter(move |(to, _)| *to != from).map(move |(to, l)| (from, to, l))
            });
            let of_class = pairs.filter(|(from, to, _)| (hosts[*from] == hosts[*to]) == same);
            let (mut latencies, mut rates): (Vec<f64>, Vec<f64>) =
                of_class.map(|(_, _, link)| (1e6 * link.latency_s, 8e-9 * link.bytes_per_s)).unzip();
            if !latencies.is_empty() {
                latencies.sort_by(f64::total_cmp);
                rates.sort_by(f64::total_cmp);
                let (latency, rate) = (latencies[latencies.len() / 2], rates[rates.len() / 2]);
                let _ = writeln!(text, "[link.{class}]\nlatency_us = {latency:.1}\ngbit_per_s = {rate:.6}");
            }
        }
        text
    }
}

/// One turn of a way.
#[derive(Clone, Copy)]
struct Trial {
    tokens_per_s: f64,
    /// What the longest run took.
    longest: Duration,
}

impl Trial {
    /// Decodes so many sequences for a while, each time after other prompts.
    fn run(cluster: &mut Cluster, prompts: &[Vec<u32>], sequences: usize) -> Result<Self, StudyError> {
        let mut turned = 0;
        let mut timed = |max_tokens: usize| {
            let prompts: Vec<_> = prompts.iter().cycle().skip(turned).take(sequences).cloned().collect();
            turned += 1;
            let began = Instant::now();
            let rate = decode_rate(cluster, &grid::requests(&prompts, max_tokens))?;
            Ok::<_, StudyError>((rate, began.elapsed()))
        };
        timed(TRIAL_WARM_UP)?;
        let least = sequences.clamp(TRIAL.0, TRIAL.1);
        let (rate, took) = timed(least)?;
        if took >= TRIAL_TIME {
            return Ok(Self { tokens_per_s: rate, longest: took });
        }
        let as_long = least as f64 * TRIAL_TIME.as_secs_f64() / took.as_secs_f64().max(1e-9);
        let tokens = (as_long.ceil() as usize).clamp(least, TRIAL.1);
        let (began, mut rates, mut longest) = (Instant::now(), Vec::new(), took);
        while rates.is_empty() || began.elapsed() < TRIAL_TIME {
            let (rate, took) = timed(tokens)?;
            rates.push(rate);
            longest = longest.max(took);
        }
        Ok(Self { tokens_per_s: of_mean_time(&rates), longest })
    }
}

/// Every strategy with every schedule on these tables.
pub fn candidates(tables: &[(String, PlacementTable)], schedules: &[Schedule]) -> Vec<Candidate> {
    let mut all = Vec::new();
    for (table, placement) in tables {
        for strategy in [Strategy::Vanilla, Strategy::Coherent] {
            for &schedule in schedules {
                all.push(Candidate {
                    strategy,
                    schedule,
                    table: table.clone(),
                    placement: placement.clone(),
                    ablation: None,
                    overlap: Overlap::Auto,
                    linger: Linger::Auto,
                });
            }
        }
    }
    all
}

/// The strategies and schedules among the candidates, each once.
pub fn ways(candidates: &[Candidate]) -> Vec<(Strategy, Schedule)> {
    let mut ways = Vec::new();
    for way in candidates.iter().map(|candidate| (candidate.strategy, candidate.schedule)) {
        if !ways.contains(&way) {
            ways.push(way);
        }
    }
    ways
}

/// The ordinary layer split: each layer whole on one rank, in contiguous blocks of layers.
///
/// # Errors
/// Never for shapes of at least one layer, expert and rank.
pub fn layer_split(layers: usize, experts: usize, ranks: usize) -> Result<PlacementTable, StudyError> {
    let row = |layer: usize| vec![Rank::from(layer * ranks / layers.max(1)); experts];
    let mut table = PlacementTable::from_assignment((0..layers).map(row).collect(), ranks)?;
    table.source = Some("layers".into());
    Ok(table)
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
    use exflow_placement::Topology;

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
        assert!(ranked.windows(2).all(|w| w[0].1.tokens_per_s >= w[1].1.tokens_per_s));
        // A token keeps its expert and its successor takes the other one: one crossing a token, or four latencies for
        // every other token, or there and back between layers.
        assert_eq!(ranked[0].0.to_string(), "coherent, flow, round_robin");
    }
}
