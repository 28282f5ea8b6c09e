//! One cell of the grid of `exflow bench strategies`: all settings of one model, world size, link and number of
//! sequences, interleaved, that must all say the same.

mod auto;
mod clusters;
mod inputs;
mod row;
mod turns;

pub(super) use clusters::{settle, warm_up};
pub use inputs::{
    BEGINNINGS, SOLVED_ON, SyntheticModel, chain_table, grid_alike, grid_profile, grid_prompts, grid_table,
};
pub(super) use inputs::{TRIAL_PROMPTS, own_routes, trial_prompts};
pub use row::{BesideBest, ClassBytes, GridRow};
pub use turns::{ALONE, decode_rate};
pub(super) use turns::{decode, median, quantile};

use super::planning::TURNS;
use super::{Candidate, StudyError, ways};
use auto::Auto;
use clusters::Clusters;
use exflow_engine::plan::Prediction;
use exflow_engine::{ClusterOptions, Progress, Request, RoutingTrace, Schedule, Strategy};
use std::time::Duration;
use turns::{Entry, Runs, Turns};

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
}

/// How much time goes into a grid's figures.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Measured runs of each setting; where one is long at it, two of each.
    pub repeats: usize,
    /// Turns that each way has in the planner's trials.
    pub turns: usize,
    /// So long the planner's pick and the best fixed setting take turns.
    pub pairs: Duration,
}

impl Effort {
    /// That of figures to be quoted.
    pub fn full(repeats: usize) -> Self {
        Self { repeats: repeats.max(1), turns: TURNS, pairs: Duration::from_secs(15) }
    }

    /// For a glance: of each figure one sample.
    pub fn glance() -> Self {
        Self { repeats: 1, turns: 1, pairs: Duration::from_secs(3) }
    }
}

/// The clusters of a cell's settings, which serve every number of sequences.
pub struct Grid<'a> {
    clusters: Clusters<'a>,
    /// Each setting with the place of its cluster.
    fixed: Vec<(Candidate, usize)>,
    auto: Option<Auto>,
    effort: Effort,
}

impl<'a> Grid<'a> {
    /// Starts the clusters of the settings; with `routes` one of them measures the world, from which every setting is
    /// predicted, and tries ways out with each of the numbers of `sequences`.
    ///
    /// # Errors
    /// What [`exflow_engine::Cluster::start`] refuses.
    pub fn start(
        options: &ClusterOptions,
        settings: Vec<Candidate>,
        routes: Option<RoutingTrace>,
        sequences: &[usize],
        prompts: &'a [Vec<u32>],
        (effort, progress): (Effort, &dyn Progress),
    ) -> Result<Self, StudyError> {
        let mut clusters = Clusters::new(prompts);
        let auto = match routes.filter(|_| options.ranks > 1) {
            Some(routes) => {
                let mut options = options.clone();
                (options.strategy, options.schedule) = (Strategy::Coherent, Schedule::Rounds);
                let place = clusters.start(options, progress)?;
                let of = (&ways(&settings)[..], sequences);
                Some(Auto::new(&mut clusters, place, routes, of, effort.turns)?)
            }
            None => None,
        };
        let place = |setting: Candidate| {
            let place = clusters.place_for(&setting, options, progress)?;
            Ok((setting, place))
        };
        let fixed = settings.into_iter().map(place).collect::<Result<_, StudyError>>()?;
        Ok(Self { clusters, fixed, auto, effort })
    }

    /// Measures all settings in turn, again and again, and predicts them each time before: the planner tries the ways once
    /// more then, as a machine's mood may be another one than a minute ago.
    ///
    /// # Errors
    /// [`StudyError::Differ`] where a run says something else than the first one.
    pub fn measure(&mut self, cell: &Cell) -> Result<Vec<GridRow>, StudyError> {
        let Self { clusters, fixed, auto, effort } = self;
        let mut entries: Vec<Entry> =
            fixed.iter().map(|(setting, cluster)| Entry::new(setting.clone(), false, *cluster)).collect();
        if let Some(auto) = auto {
            let settings = entries.iter().map(|entry| &entry.setting);
            let offered: Vec<Candidate> = settings.filter(|one| one.may_be_picked()).cloned().collect();
            entries.extend(auto.pick(clusters, &offered, cell.sequences)?);
        }
        let mut turns = Turns::new(cell, effort.repeats, clusters);
        let mut runs: Vec<Runs> = entries.iter().map(|_| Runs::default()).collect();
        let mut predicted: Vec<Prediction> = Vec::new();
        for repeat in 0..effort.repeats {
            if runs.iter().any(Runs::suffice) {
                break;
            }
            if let Some(auto) = auto {
                if repeat > 0 {
                    auto.try_again(turns.clusters, cell.sequences)?;
                }
                let settings = entries.iter().map(|entry| &entry.setting);
                predicted = settings.map(|setting| auto.predict(setting, cell.sequences)).collect();
            }
            for place in 0..entries.len() {
                let index = turns::turn(place, repeat, effort.repeats, entries.len());
                entries[index].predicted.extend(predicted.get(index));
                let rate = turns.take(&entries[index], repeat, &mut runs[index])?;
                runs[index].rates.push(rate);
            }
        }
        let rows = entries.iter().zip(runs);
        let mut rows: Vec<GridRow> =
            rows.map(|(entry, runs)| runs.row(cell, entry, turns.clusters.at(entry.cluster))).collect();
        if let (Some((auto, fixed)), Some((row, others))) = (entries.split_last_mut(), rows.split_last_mut())
            && auto.auto
            && let Some(best) = row::best_of(others, |row| fixed[row].setting.may_be_picked())
        {
            row.beside_best = Some(turns.beside(auto, &mut fixed[best], effort.pairs)?);
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
