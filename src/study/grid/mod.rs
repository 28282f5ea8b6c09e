//! One cell of the grid of `exflow bench strategies`: all settings of one model, world size, link and number of
//! sequences, interleaved, that must all say the same.

mod auto;
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

use super::planning::TURNS;
use super::{Candidate, StudyError, ways};
use auto::Auto;
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
    auto: Option<Auto>,
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
        let (mut clusters, mut auto) = (Vec::new(), None);
        for some in settings.chunks(settings.len().div_ceil(TURNS).max(1)) {
            for setting in some {
                clusters.push((setting.clone(), warm(setting.options(options))?));
            }
            if let Some(routes) = routes.take().filter(|_| options.ranks > 1) {
                let mut options = options.clone();
                (options.strategy, options.schedule) = (Strategy::Coherent, Schedule::Rounds);
                auto = Some(Auto::new(warm(options)?, routes, &ways, sequences)?);
            }
            auto.as_mut().map_or(Ok(()), Auto::turn)?;
        }
        auto.as_mut().map_or(Ok(()), Auto::learn)?;
        Ok(Self { clusters, auto })
    }

    /// Measures all settings in turn, again and again, and predicts them each time before: the planner tries the ways once
    /// more then, as a machine's mood may be another one than a minute ago.
    ///
    /// # Errors
    /// [`StudyError::Differ`] where a run says something else than the first one.
    pub fn measure(&mut self, cell: &Cell, prompts: &[Vec<u32>]) -> Result<Vec<GridRow>, StudyError> {
        let fixed = self.clusters.iter_mut();
        let mut entries: Vec<Entry<'_>> =
            fixed.map(|(setting, cluster)| Entry::new(setting.clone(), false, cluster)).collect();
        let mut outlook = None;
        if let Some(auto) = &mut self.auto {
            let settings = entries.iter().map(|entry| &entry.setting);
            let offered: Vec<Candidate> = settings.filter(|one| one.may_be_picked()).cloned().collect();
            let (of_all, picked) = auto.pick(&offered, cell.sequences, prompts)?;
            outlook = Some(of_all);
            entries.extend(picked);
        }
        let mut turns = Turns::new(cell, prompts);
        let mut runs: Vec<Runs> = entries.iter().map(|_| Runs::default()).collect();
        let mut predicted: Vec<Prediction> = Vec::new();
        let repeats = cell.repeats.max(1);
        for repeat in 0..repeats {
            if let Some(outlook) = &mut outlook {
                if repeat > 0
                    && let Some(picked) = entries.last_mut().filter(|entry| entry.auto)
                {
                    outlook.try_again(picked, prompts)?;
                }
                predicted = entries.iter().map(|entry| outlook.predict(&entry.setting)).collect();
            }
            for place in 0..entries.len() {
                let index = turns::turn(place, repeat, repeats, entries.len());
                if !runs[index].suffice() {
                    entries[index].predicted.extend(predicted.get(index));
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
