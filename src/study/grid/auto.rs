//! The planner of a cell, with a cluster of its own: what it predicts, and what it picks.

use super::turns::Entry;
use super::{WARM_UP, requests};
use crate::study::planning::{Trials, Way, trials_of};
use crate::study::{Candidate, Planner, StudyError};
use exflow_engine::plan::Prediction;
use exflow_engine::{Cluster, RoutingTrace};
use exflow_placement::PlacementTable;

/// The planner, and the cluster that tries out for it and then runs as it picks.
pub(super) struct Auto {
    planner: Planner,
    cluster: Cluster,
    /// Of each number of sequences, on the table that the cluster began with.
    trials: Vec<Trials<Way>>,
    table: PlacementTable,
}

impl Auto {
    /// Has the world of a cluster measure itself; `routes` are those of text like that to come.
    pub(super) fn new(
        mut cluster: Cluster,
        routes: RoutingTrace,
        ways: &[Way],
        sequences: &[usize],
    ) -> Result<Self, StudyError> {
        let trials = sequences.iter().map(|&n| trials_of(ways.to_vec(), n)).collect();
        let table = cluster.placement().clone();
        Ok(Self { planner: Planner::measure(&mut cluster, routes)?, cluster, trials, table })
    }

    /// A turn of every trial.
    pub(super) fn turn(&mut self) -> Result<(), StudyError> {
        self.trials.iter_mut().try_for_each(|trials| trials.turn(&mut self.cluster))
    }

    /// Learns from the trials, once all their turns are over.
    pub(super) fn learn(&mut self) -> Result<(), StudyError> {
        for trials in &mut self.trials {
            let rates = trials.rates(&mut self.cluster)?;
            self.planner.learn(&self.table, trials.sequences(), rates);
        }
        Ok(())
    }

    /// Picks one of those that are offered and has the cluster run so; what predicts it and the others.
    pub(super) fn pick(
        &mut self,
        offered: &[Candidate],
        sequences: usize,
        prompts: &[Vec<u32>],
    ) -> Result<(Outlook<'_>, Option<Entry<'_>>), StudyError> {
        let Self { planner, cluster, trials, table } = self;
        let mut ranked = planner.rank(offered, sequences);
        planner.confirm(cluster, &mut ranked, sequences)?;
        let mut entry = None;
        if let Some(best) = ranked.into_iter().next() {
            let mut picked = Entry::new(best.candidate, true, cluster);
            settle(&mut picked, prompts)?;
            entry = Some(picked);
        }
        let trials = trials.iter_mut().find(|trials| trials.sequences() == sequences);
        Ok((Outlook { planner, trials, table, sequences }, entry))
    }
}

/// What predicts the settings of a cell.
pub(super) struct Outlook<'a> {
    planner: &'a mut Planner,
    trials: Option<&'a mut Trials<Way>>,
    table: &'a PlacementTable,
    sequences: usize,
}

impl Outlook<'_> {
    pub(super) fn predict(&self, setting: &Candidate) -> Prediction {
        self.planner.predict(setting, self.sequences)
    }

    /// Tries the ways once more in the cluster of the planner's pick, which then runs as before; from now on predictions go
    /// by this turn alone.
    pub(super) fn try_again(
        &mut self,
        picked: &mut Entry<'_>,
        prompts: &[Vec<u32>],
    ) -> Result<(), StudyError> {
        if let Some(trials) = &mut self.trials {
            let Candidate { strategy, schedule, .. } = picked.setting;
            picked.cluster.change(strategy, schedule, Some(self.table.clone()))?;
            trials.turn(picked.cluster)?;
            self.planner.learn(self.table, self.sequences, trials.latest());
            settle(picked, prompts)?;
        }
        Ok(())
    }
}

/// Has the cluster run as picked, for a few tokens that are not measured.
fn settle(picked: &mut Entry<'_>, prompts: &[Vec<u32>]) -> Result<(), StudyError> {
    picked.setting.apply(picked.cluster)?;
    picked.cluster.generate(&requests(prompts, WARM_UP), &mut |_| {})?;
    Ok(())
}
