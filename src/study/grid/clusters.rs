//! The clusters of a cell, and what each of them runs as.

use super::requests;
use crate::study::{Candidate, StudyError};
use exflow_engine::{Cluster, ClusterOptions, EngineError, Progress};

/// Tokens that a cluster makes after it was started or changed, before what it does is measured.
const WARM_UP: usize = 4;

/// Running clusters, each by its place.
pub(super) struct Clusters<'a> {
    running: Vec<Running>,
    /// What they warm up with, and are measured on.
    pub(super) prompts: &'a [Vec<u32>],
    /// Settings share a cluster where they can.
    shared: bool,
}

struct Running {
    cluster: Cluster,
    /// None where trials left it in any way.
    setting: Option<Candidate>,
}

impl<'a> Clusters<'a> {
    pub(super) fn new(prompts: &'a [Vec<u32>], shared: bool) -> Self {
        Self { running: Vec::new(), prompts, shared }
    }

    /// Starts one more and warms it up; its place.
    ///
    /// # Errors
    /// What [`Cluster::start`] refuses.
    pub(super) fn start(
        &mut self,
        options: ClusterOptions,
        progress: &dyn Progress,
    ) -> Result<usize, StudyError> {
        let mut cluster = Cluster::start(options, progress)?;
        warm_up(&mut cluster, self.prompts)?;
        self.running.push(Running { cluster, setting: None });
        Ok(self.running.len() - 1)
    }

    /// The place of the cluster that serves a setting: one of its own, or, where clusters are shared, one that any setting
    /// has which overlaps and lingers alike, as all else can be changed while it runs.
    ///
    /// # Errors
    /// What [`Cluster::start`] refuses.
    pub(super) fn place_for(
        &mut self,
        setting: &Candidate,
        options: &ClusterOptions,
        progress: &dyn Progress,
    ) -> Result<usize, StudyError> {
        let alike = |one: &Running| {
            let options = one.cluster.options();
            (options.overlap, options.linger) == (setting.overlap, setting.linger)
        };
        if let Some(place) = self.running.iter().position(alike).filter(|_| self.shared) {
            return Ok(place);
        }
        let place = self.start(setting.options(options), progress)?;
        self.running[place].setting = Some(setting.clone());
        Ok(place)
    }

    /// A cluster as it is, for figures of it.
    pub(super) fn at(&self, place: usize) -> &Cluster {
        &self.running[place].cluster
    }

    /// A cluster to be tried out; it may be left in any way.
    pub(super) fn trying(&mut self, place: usize) -> &mut Cluster {
        let running = &mut self.running[place];
        running.setting = None;
        &mut running.cluster
    }

    /// A cluster that runs as the setting says, changed and warmed up where it did not.
    ///
    /// # Errors
    /// What the engine refuses.
    pub(super) fn ready(&mut self, place: usize, setting: &Candidate) -> Result<&mut Cluster, EngineError> {
        let running = &mut self.running[place];
        if !running.setting.as_ref().is_some_and(|now| now.runs_as(setting)) {
            running.setting = None;
            setting.apply(&mut running.cluster)?;
            warm_up(&mut running.cluster, self.prompts)?;
            running.setting = Some(setting.clone());
        }
        Ok(&mut running.cluster)
    }
}

fn warm_up(cluster: &mut Cluster, prompts: &[Vec<u32>]) -> Result<(), EngineError> {
    cluster.generate(&requests(prompts, WARM_UP), &mut |_| {}).map(drop)
}
