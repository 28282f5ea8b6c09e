//! Runs of several settings side by side, interleaved, that must all say the same.

use super::StudyError;
use exflow_engine::{Cluster, Generation, PlacementTable, Request, RunStats, Strategy, TokenEvent};

/// Tokens of the run that follows each change of the setting; it is not measured.
const WARM_UP: usize = 4;

/// A strategy with a placement.
#[derive(Debug, Clone)]
pub struct Setting {
    /// How tokens travel.
    pub strategy: Strategy,
    /// Name of the placement.
    pub name: String,
    /// Where experts live.
    pub table: PlacementTable,
}

impl Setting {
    /// The baseline, coherence alone, and coherence with the solved table, in this order.
    pub fn three(table: &PlacementTable) -> Vec<Self> {
        let round_robin = |strategy| Self {
            strategy,
            name: "round_robin".into(),
            table: PlacementTable::round_robin(table.layers, table.experts, table.ranks),
        };
        vec![
            round_robin(Strategy::Vanilla),
            round_robin(Strategy::Coherent),
            Self { strategy: Strategy::Coherent, name: "affinity".into(), table: table.clone() },
        ]
    }

    /// `strategy, placement`.
    pub fn label(&self) -> String {
        format!("{}, {}", self.strategy, self.name)
    }
}

/// All runs of one setting.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The setting.
    pub setting: Setting,
    /// One per repeat.
    pub runs: Vec<RunStats>,
}

/// All settings, and what they said.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// In the order given.
    pub measured: Vec<Measured>,
    /// What every run of every setting produced.
    pub said: Generation,
    /// Adapter of each rank.
    pub adapters: Vec<String>,
}

/// Has the cluster, in one process or in several, run every setting in turn, `repeats` times. `sink` sees the tokens of
/// each setting's first run.
///
/// # Errors
/// [`StudyError::Differ`] where any run says something else than the first one; those of [`Cluster::change`].
pub fn compare(
    cluster: &mut Cluster,
    settings: Vec<Setting>,
    requests: &[Request],
    repeats: usize,
    sink: &mut dyn FnMut(&Setting, &TokenEvent),
) -> Result<Comparison, StudyError> {
    let adapters = cluster.adapters();
    let schedule = cluster.options().schedule;
    let warm_up: Vec<Request> =
        requests.iter().map(|r| Request { max_tokens: r.max_tokens.min(WARM_UP), ..r.clone() }).collect();
    let mut measured: Vec<Measured> =
        settings.into_iter().map(|setting| Measured { setting, runs: Vec::new() }).collect();
    let mut said: Option<Generation> = None;
    for repeat in 0..repeats.max(1) {
        for measured in &mut measured {
            let Setting { strategy, table, .. } = &measured.setting;
            cluster.change(*strategy, schedule, Some(table.clone()))?;
            cluster.generate(&warm_up, &mut |_| {})?;
            let mut show = |event: &TokenEvent| {
                if repeat == 0 {
                    sink(&measured.setting, event);
                }
            };
            let run = cluster.generate(requests, &mut show)?;
            measured.runs.push(run.stats.clone());
            match &said {
                None => said = Some(run),
                Some(first) => agree(first, &run, &measured.setting, repeat)?,
            }
        }
    }
    let said = said.ok_or(StudyError::LittleText { passages: 0, least: 1 })?;
    Ok(Comparison { measured, said, adapters })
}

/// Whether two runs produced the same tokens.
fn agree(first: &Generation, run: &Generation, setting: &Setting, repeat: usize) -> Result<(), StudyError> {
    for (sequence, (a, b)) in first.sequences.iter().zip(&run.sequences).enumerate() {
        if let Some(token) = first_difference(&a.output_ids, &b.output_ids) {
            return Err(StudyError::Differ { setting: setting.label(), run: repeat, sequence, token });
        }
    }
    Ok(())
}

fn first_difference(a: &[u32], b: &[u32]) -> Option<usize> {
    let common = a.iter().zip(b).position(|(a, b)| a != b);
    common.or_else(|| (a.len() != b.len()).then(|| a.len().min(b.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_also_past_the_shorter_end() {
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2, 3]), None);
        assert_eq!(first_difference(&[1, 2, 3], &[1, 9, 3]), Some(1));
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2]), Some(2));
        assert_eq!(first_difference(&[], &[5]), Some(0));
    }
}
