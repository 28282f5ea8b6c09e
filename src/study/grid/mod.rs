//! One cell of the grid of `exflow bench strategies`: all settings of one model, world size, link and number of
//! sequences, interleaved, that must all say the same.

mod inputs;
mod row;
mod turns;

pub use inputs::{
    BEGINNINGS, SOLVED_ON, SyntheticModel, chain_table, grid_profile, grid_prompts, grid_table,
};
pub(super) use inputs::{own_routes, trial_prompts};
pub use row::{BesideBest, ClassBytes, GridRow};
pub use turns::{ALONE, decode_rate};
pub(super) use turns::{median, of_mean_time, quantile};

use super::planning::{TURNS, trials_of};
use super::{Candidate, Planner, Ranked, StudyError, ways};
use exflow_engine::plan::Prediction;
use exflow_engine::{Cluster, ClusterOptions, Progress, Request, RoutingTrace, Schedule, Strategy};
use turns::{Entry, Runs, Turns};

/// Tokens of the run that warms each cluster up; it is not measured.
const WARM_UP: usize = 4;

/// What a cell is about.
#[derive(Debug, Clone)]
pub struct Cell {
    /// The model's name in the result.
    pub model: String,
    /// The link's name in the result.
    pub link: String,
    /// Sequences at once; 1: the first [`ALONE`] prompts one after the other.
    pub sequences: usize,
    /// Tokens to make of each prompt.
    pub tokens: usize,
    /// Measured runs of each setting; of one that is long at it, two.
    pub repeats: usize,
}

/// The clusters of a cell's settings, which serve every number of sequences.
pub struct Grid {
    clusters: Vec<(Candidate, Cluster)>,
    planner: Option<Auto>,
}

/// The planner with a cluster of its own, which runs as it picks.
struct Auto {
    planner: Planner,
    cluster: Cluster,
}

impl Grid {
    /// Starts a cluster per setting and warms it up; with `routes` also one that measures the world, from which every
    /// setting is predicted, and that then runs as the best of them. What it tries out, with each of the numbers of
    /// `sequences`, it does while the other clusters start, so that its turns lie apart.
    ///
    /// # Errors
    /// What [`Cluster::start`] refuses.
    pub fn start(
        options: &ClusterOptions,
        settings: Vec<Candidate>,
        mut routes: Option<RoutingTrace>,
        sequences: &[usize],
        prompts: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<Self, StudyError> {
        let warm = |options: ClusterOptions| -> Result<Cluster, StudyError> {
            let mut cluster = Cluster::start(options, progress)?;
            cluster.generate(&requests(prompts, WARM_UP), &mut |_| {})?;
            Ok(cluster)
        };
        let ways = ways(&settings);
        let mut trials: Vec<_> = sequences.iter().map(|&n| trials_of(ways.clone(), n)).collect();
        let (mut clusters, mut planner) = (Vec::new(), None);
        for some in settings.chunks(settings.len().div_ceil(TURNS).max(1)) {
            for setting in some {
                clusters.push((setting.clone(), warm(setting.options(options))?));
            }
            if let Some(routes) = routes.take().filter(|_| options.ranks > 1) {
                let mut options = options.clone();
                (options.strategy, options.schedule) = (Strategy::Coherent, Schedule::Rounds);
                let mut cluster = warm(options)?;
                planner = Some(Auto { planner: Planner::measure(&mut cluster, routes)?, cluster });
            }
            if let Some(auto) = &mut planner {
                trials.iter_mut().try_for_each(|trials| trials.turn(&mut auto.cluster))?;
            }
        }
        if let Some(Auto { planner, cluster }) = &mut planner {
            trials.into_iter().try_for_each(|trials| planner.learn(cluster, trials))?;
        }
        Ok(Self { clusters, planner })
    }

    /// Measures all settings in turn, again and again.
    ///
    /// # Errors
    /// [`StudyError::Differ`] where a run says something else than the first one.
    pub fn measure(&mut self, cell: &Cell, prompts: &[Vec<u32>]) -> Result<Vec<GridRow>, StudyError> {
        let settings: Vec<Candidate> = self.clusters.iter().map(|(setting, _)| setting.clone()).collect();
        let predict = |auto: &Auto, setting: &Candidate| auto.planner.predict(setting, cell.sequences);
        let predicted: Vec<Option<Prediction>> =
            settings.iter().map(|s| self.planner.as_ref().map(|auto| predict(auto, s))).collect();
        let mut entries: Vec<Entry<'_>> = Vec::new();
        for ((setting, cluster), predicted) in self.clusters.iter_mut().zip(predicted) {
            entries.push(Entry { setting: setting.clone(), auto: false, cluster, predicted });
        }
        if let Some(Auto { planner, cluster }) = &mut self.planner {
            let offered: Vec<Candidate> = settings.into_iter().filter(Candidate::may_be_picked).collect();
            let mut ranked = planner.rank(&offered, cell.sequences);
            planner.confirm(cluster, &mut ranked, cell.sequences)?;
            if let Some(Ranked { candidate, prediction, .. }) = ranked.into_iter().next() {
                candidate.apply(cluster)?;
                cluster.generate(&requests(prompts, WARM_UP), &mut |_| {})?;
                entries.push(Entry { setting: candidate, auto: true, cluster, predicted: Some(prediction) });
            }
        }
        let mut turns = Turns::new(cell, prompts);
        let mut runs: Vec<Runs> = entries.iter().map(|_| Runs::default()).collect();
        let repeats = cell.repeats.max(1);
        for repeat in 0..repeats {
            for place in 0..entries.len() {
                let index = turns::turn(place, repeat, repeats, entries.len());
                if !runs[index].suffice() {
                    let rate = turns.take(&mut entries[index], &mut runs[index])?;
                    runs[index].rates.push(rate);
                }
            }
        }
        let mut rows: Vec<GridRow> =
            entries.iter().zip(runs).map(|(entry, runs)| runs.row(cell, entry)).collect();
        if let (Some((auto, fixed)), Some((row, others))) = (entries.split_last_mut(), rows.split_last_mut())
            && auto.auto
            && let Some(best) = row::best_of(others, |row| fixed[row].setting.may_be_picked())
        {
            row.beside_best = Some(turns.beside(auto, &mut fixed[best], repeats)?);
        }
        Ok(rows)
    }
}

/// Requests for so many greedy tokens after each prompt, past any end of text.
pub fn requests(prompts: &[Vec<u32>], max_tokens: usize) -> Vec<Request> {
    let request = |ids: &Vec<u32>| Request {
        prompt_ids: ids.clone(),
        max_tokens,
        ignore_eos: true,
        ..Request::default()
    };
    prompts.iter().map(request).collect()
}
