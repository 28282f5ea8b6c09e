//! The clusters of a cell, and what each of them runs as.

use super::requests;
use crate::study::{Candidate, StudyError};
use exflow_engine::{Cluster, ClusterOptions, EngineError, Progress, SETTLING_STEPS, Schedule};
use std::time::{Duration, Instant};

/// Tokens that a cluster makes after it was started or changed, before what it does is measured.
const WARM_UP: usize = 4;
/// Ranks in rounds are given no longer than this to find out whether halves pay.
const SETTLING: Duration = Duration::from_secs(3);

/// Running clusters, each by its place.
pub(super) struct Clusters<'a> {
    running: Vec<Running>,
    /// What they are measured on.
    pub(super) prompts: &'a [Vec<u32>],
    /// So many of them they warm up with.
    at_once: usize,
    /// Settings share a cluster where they can.
    shared: bool,
}

struct Running {
    cluster: Cluster,
    /// None where trials left it in any way.
    setting: Option<Candidate>,
}

impl<'a> Clusters<'a> {
    pub(super) fn new(prompts: &'a [Vec<u32>], at_once: usize, shared: bool) -> Self {
        Self { running: Vec::new(), prompts, at_once: at_once.min(prompts.len()), shared }
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
        warm_up(&mut cluster, &self.prompts[..self.at_once])?;
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
            warm_up(&mut running.cluster, &self.prompts[..self.at_once])?;
            running.setting = Some(setting.clone());
        }
        Ok(&mut running.cluster)
    }
}

/// Decodes these prompts at once until nothing is made or tried out for the first time any more; what a step takes at most.
///
/// Ranks in rounds find out whether halves pay. Not where links take most of a step: they hide what trying costs, and it
/// takes long.
///
/// # Errors
/// What [`Cluster::generate`] refuses.
pub(in crate::study) fn settle(cluster: &mut Cluster, prompts: &[Vec<u32>]) -> Result<Duration, EngineError> {
    let began = Instant::now();
    warm_up(cluster, prompts)?;
    let step = began.elapsed().div_f64(WARM_UP as f64);
    if !may_pay(cluster, step) || prompts.len() < 2 || SETTLING_STEPS as u32 * step > SETTLING {
        return Ok(step);
    }
    let began = Instant::now();
    cluster.generate(&requests(prompts, SETTLING_STEPS), &mut |_| {})?;
    Ok(began.elapsed().div_f64(SETTLING_STEPS as f64))
}

/// Whether ranks find out if halves pay, and links do not take most of a step.
fn may_pay(cluster: &Cluster, step: Duration) -> bool {
    let (options, exchanges) = (cluster.options(), 2 * cluster.spec().moe_layers() as u32);
    let latency = options.link.map_or(Duration::ZERO, |link| link.latency);
    options.schedule == Schedule::Rounds && options.ranks > 1 && exchanges * latency < step / 2
}

fn warm_up(cluster: &mut Cluster, prompts: &[Vec<u32>]) -> Result<(), EngineError> {
    cluster.generate(&requests(prompts, WARM_UP), &mut |_| {}).map(drop)
}
