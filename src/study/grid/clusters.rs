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
}

struct Running {
    cluster: Cluster,
    /// The setting that it runs as, and the number of sequences that it is warm for; none where trials left it in any way.
    now: Option<(Candidate, usize)>,
    /// All those with which it has settled.
    settled: Vec<(Candidate, usize)>,
}

impl<'a> Clusters<'a> {
    pub(super) fn new(prompts: &'a [Vec<u32>]) -> Self {
        Self { running: Vec::new(), prompts }
    }

    /// Starts one more; its place.
    ///
    /// # Errors
    /// What [`Cluster::start`] refuses.
    pub(super) fn start(
        &mut self,
        options: ClusterOptions,
        progress: &dyn Progress,
    ) -> Result<usize, StudyError> {
        let cluster = Cluster::start(options, progress)?;
        self.running.push(Running { cluster, now: None, settled: Vec::new() });
        Ok(self.running.len() - 1)
    }

    /// The place of the cluster that serves a setting. All that overlap and linger alike share one, as all else can be
    /// changed while it runs: clusters of one and the same setting differ by several percent as their memory happens to
    /// lie, and a cell of thirteen of them would spend a quarter of its time on starting them.
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
        match self.running.iter().position(alike) {
            Some(place) => Ok(place),
            None => self.start(setting.options(options), progress),
        }
    }

    /// A cluster as it is, for figures of it.
    pub(super) fn at(&self, place: usize) -> &Cluster {
        &self.running[place].cluster
    }

    /// A cluster to be tried out; it may be left in any way.
    pub(super) fn trying(&mut self, place: usize) -> &mut Cluster {
        let running = &mut self.running[place];
        running.now = None;
        &mut running.cluster
    }

    /// A cluster that runs as the setting says, changed where it did not, warm and settled with so many sequences.
    ///
    /// # Errors
    /// What the engine refuses.
    pub(super) fn ready(
        &mut self,
        place: usize,
        setting: &Candidate,
        sequences: usize,
    ) -> Result<&mut Cluster, EngineError> {
        let Running { cluster, now, settled } = &mut self.running[place];
        let before = now.take();
        let as_before = before.as_ref().is_some_and(|(one, _)| one.runs_as(setting));
        if !as_before {
            setting.apply(cluster)?;
        }
        let prompts = &self.prompts[..sequences.min(self.prompts.len())];
        let same = |(one, with): &(Candidate, usize)| one.runs_as(setting) && *with == sequences;
        if !settled.iter().any(same) {
            settle(cluster, prompts)?;
            settled.push((setting.clone(), sequences));
        } else if !before.as_ref().is_some_and(same) {
            warm_up(cluster, prompts)?;
        }
        *now = Some((setting.clone(), sequences));
        Ok(cluster)
    }
}

/// Decodes these prompts at once until nothing is made or tried out for the first time any more; what a step takes at most.
///
/// Ranks in rounds find out whether halves pay, and know it again when their strategy and table come back. Not where links
/// take most of a step: they hide what trying costs, and it takes long.
///
/// # Errors
/// What [`Cluster::generate`] refuses.
pub(in crate::study) fn settle(cluster: &mut Cluster, prompts: &[Vec<u32>]) -> Result<Duration, EngineError> {
    let step = warm_up(cluster, prompts)?;
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

/// Decodes a few tokens of these prompts at once; what a step takes at most.
///
/// # Errors
/// What [`Cluster::generate`] refuses.
pub(in crate::study) fn warm_up(
    cluster: &mut Cluster,
    prompts: &[Vec<u32>],
) -> Result<Duration, EngineError> {
    let began = Instant::now();
    cluster.generate(&requests(prompts, WARM_UP), &mut |_| {})?;
    Ok(began.elapsed().div_f64(WARM_UP as f64))
}
