//! What a planner chooses among: a strategy with a schedule and a table.

use crate::study::StudyError;
use exflow_engine::{
    Cluster, ClusterOptions, EngineError, Linger, Overlap, PlacementSource, Schedule, Strategy,
};
use exflow_placement::{PlacementTable, Rank};

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

    /// Has a running cluster go on as this candidate says; what it overlaps and how long it lingers stay as they are.
    ///
    /// # Errors
    /// What [`Cluster::change`] refuses.
    pub fn apply(&self, cluster: &mut Cluster) -> Result<(), EngineError> {
        cluster.change(self.strategy, self.schedule, Some(self.placement.clone()))
    }

    /// Whether both are one and the same way to run, whatever they are called.
    pub(in crate::study) fn runs_as(&self, other: &Self) -> bool {
        let way = |one: &Self| (one.strategy, one.schedule, one.overlap, one.linger);
        way(self) == way(other)
            && self.placement.assignment == other.placement.assignment
            && self.placement.replicas == other.placement.replicas
    }

    /// Whether a planner may pick it: it leaves to the ranks what they overlap and how long they linger.
    pub(in crate::study) fn may_be_picked(&self) -> bool {
        let lingers = self.linger == Linger::Auto || self.schedule == Schedule::Rounds;
        self.overlap == Overlap::Auto && lingers
    }
}

impl std::fmt::Display for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}, {}", self.strategy, self.schedule, self.table)
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
