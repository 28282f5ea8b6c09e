//! The planner of a cell, with a cluster to try out in: what it predicts, and what it picks.

use super::clusters::Clusters;
use super::turns::Entry;
use crate::study::planning::{Trials, Way, trials_of};
use crate::study::{Candidate, Planner, StudyError};
use exflow_engine::RoutingTrace;
use exflow_engine::plan::Prediction;
use exflow_placement::PlacementTable;

/// The planner, and where it tries out; what it picks runs there as well.
pub(super) struct Auto {
    planner: Planner,
    /// The place of its cluster.
    cluster: usize,
    /// Of each number of sequences, on the table that the cluster began with.
    trials: Vec<Trials<Way>>,
    table: PlacementTable,
}

impl Auto {
    /// Has the world of a cluster measure itself, which runs in rounds, and tries out the ways with so many turns each;
    /// `routes` are those of text like that to come.
    pub(super) fn new(
        clusters: &mut Clusters<'_>,
        cluster: usize,
        routes: RoutingTrace,
        (ways, sequences): (&[Way], &[usize]),
        turns: usize,
    ) -> Result<Self, StudyError> {
        let table = clusters.at(cluster).placement().clone();
        let trying = clusters.trying(cluster);
        let mut planner = Planner::measure(trying, routes)?;
        planner.turns = turns;
        let mut trials: Vec<_> = sequences.iter().map(|&n| trials_of(ways.to_vec(), n)).collect();
        for trials in &mut trials {
            trials.finish(trying, turns)?;
            planner.learn(&table, trials.sequences(), trials.usual());
        }
        Ok(Self { planner, cluster, trials, table })
    }

    /// Picks one of those that are offered.
    pub(super) fn pick(
        &mut self,
        clusters: &mut Clusters<'_>,
        offered: &[Candidate],
        sequences: usize,
    ) -> Result<Option<Entry>, StudyError> {
        let chosen = self.planner.choose(clusters.trying(self.cluster), offered, sequences)?;
        Ok(chosen.into_iter().next().map(|best| Entry::new(best.candidate, true, self.cluster)))
    }

    pub(super) fn predict(&self, setting: &Candidate, sequences: usize) -> Prediction {
        self.planner.predict(setting, sequences)
    }

    /// Tries the ways once more; from now on predictions go by the mood of this turn.
    pub(super) fn try_again(
        &mut self,
        clusters: &mut Clusters<'_>,
        sequences: usize,
    ) -> Result<(), StudyError> {
        let Self { planner, cluster, trials, table, .. } = self;
        if let Some(trials) = trials.iter_mut().find(|trials| trials.sequences() == sequences) {
            let cluster = clusters.trying(*cluster);
            let options = cluster.options();
            cluster.change(options.strategy, options.schedule, Some(table.clone()))?;
            trials.turn(cluster)?;
            planner.learn(table, sequences, trials.latest());
        }
        Ok(())
    }
}
