//! Files of any kind, told apart by what they hold, put together for one report: traces, affinity, tables, results of
//! `exflow bench`, `exflow bench strategies` and `exflow simulate`, and earlier studies.

use super::{Replayed, load_affinity};
use crate::report::{CheckFacts, PlacementFacts, ReportData, StayFacts, StrategyFacts};
use exflow_placement::{
    Affinity, AffinityError, PlacementTable, RoutingTrace, TableError, TableShape, TraceError, score_trace,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a file cannot be part of a report.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GatherError {
    /// A trace cannot be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Counts cannot be read.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// A table cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A file cannot be read at all.
    #[error("{}: {source}; check the path and its permissions", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is of no kind that is known here.
    #[error(
        "{}: {what}; give a trace (.npy), affinity (.npz), a table, or JSON of exflow bench, bench strategies, simulate or report",
        path.display()
    )]
    Unknown {
        /// Which.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// Two files are of different models.
    #[error("{}: {found} MoE layers × experts, {expected} elsewhere: give files of one model", path.display())]
    Shape {
        /// Which.
        path: PathBuf,
        /// Its shape.
        found: String,
        /// The shape of the others.
        expected: String,
    },
}

/// What was found in the files.
#[derive(Debug, Clone, Default)]
pub struct Gathered {
    /// Counts, of all affinity files together.
    pub affinity: Option<Affinity>,
    /// Digest of the model that the counts are of, where it is known.
    pub digest: Option<String>,
    /// Traces by file name.
    pub traces: Vec<(String, RoutingTrace)>,
    /// Tables by file name.
    pub tables: Vec<(String, PlacementTable)>,
    /// Results of `exflow bench`; the first is the page's frame.
    pub benches: Vec<ReportData>,
    /// Rows of `exflow simulate`.
    pub replays: Vec<Replayed>,
    /// Rows of `exflow bench strategies`.
    pub strategies: Vec<StrategyFacts>,
    /// Checks of an earlier study.
    pub checks: Vec<CheckFacts>,
    /// Every file that was read.
    pub sources: Vec<String>,
}

impl Gathered {
    /// Reads files and folders (of a folder, the files that `exflow bench --report` writes); `experts` where traces do
    /// not show them all.
    pub fn read(paths: &[PathBuf], experts: Option<usize>) -> Result<Self, GatherError> {
        let mut found = Self::default();
        let mut later = Vec::new();
        for path in paths {
            if path.is_dir() {
                for name in ["affinity.npz", "trace.npy", "placement.json"] {
                    let file = path.join(name);
                    if file.is_file() {
                        found.read_one(&file, &mut later)?;
                    }
                }
            } else {
                found.read_one(path, &mut later)?;
            }
        }
        if found.affinity.is_none()
            && let Some((_, trace)) = found.traces.first()
        {
            let experts = experts.unwrap_or_else(|| trace.experts());
            found.affinity = Some(Affinity::from_trace(trace, experts)?);
        }
        // Tables of other programs do not say how many experts a layer has: counts or a flag do.
        for path in later {
            let shape = found.affinity.as_ref().map(|a| a.experts).or(experts);
            let table =
                PlacementTable::read(&path, shape.map(|experts| TableShape { experts, ranks: None }))?;
            found.tables.push((name_of(&path), table));
        }
        found.check_shapes(paths)?;
        Ok(found)
    }

    fn read_one(&mut self, path: &Path, later: &mut Vec<PathBuf>) -> Result<(), GatherError> {
        self.sources.push(path.display().to_string());
        match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("npy") => self.traces.push((name_of(path), RoutingTrace::load_npy(path)?)),
            Some("npz") => self.add_affinity(path)?,
            Some("csv") => later.push(path.into()),
            _ => self.read_json(path, later)?,
        }
        Ok(())
    }

    fn add_affinity(&mut self, path: &Path) -> Result<(), GatherError> {
        let (affinity, digest) = load_affinity(path)?;
        match &mut self.affinity {
            Some(sum) => sum.merge(&affinity, 1.0)?,
            None => self.affinity = Some(affinity),
        }
        self.digest = self.digest.take().or(digest);
        Ok(())
    }

    fn read_json(&mut self, path: &Path, later: &mut Vec<PathBuf>) -> Result<(), GatherError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| GatherError::Io { path: path.into(), source })?;
        let unknown = |what: String| GatherError::Unknown { path: path.into(), what };
        let value: Value =
            serde_json::from_str(&text).map_err(|error| unknown(format!("not JSON ({error})")))?;
        let wrong = |error: serde_json::Error| unknown(format!("of a known kind, but {error}"));
        let first = value.as_array().and_then(|list| list.first());
        let row_has = |key: &str| first.is_some_and(|row| row.get(key).is_some());
        if value.get("assignment").is_some() || value.get("physical_to_logical_map").is_some() {
            later.push(path.into());
        } else if value.get("settings").is_some() || value.get("checks").is_some() {
            let data: ReportData = serde_json::from_value(value).map_err(wrong)?;
            self.checks.extend(data.checks.iter().cloned());
            if !data.settings.is_empty() {
                self.benches.push(data);
            }
        } else if row_has("traffic") {
            self.replays.extend(serde_json::from_value::<Vec<Replayed>>(value).map_err(wrong)?);
        } else if row_has("tokens_per_s") {
            self.strategies.extend(serde_json::from_value::<Vec<StrategyFacts>>(value).map_err(wrong)?);
        } else {
            return Err(unknown("JSON of no kind that is known here".into()));
        }
        Ok(())
    }

    /// All counts, traces and tables are of one model.
    fn check_shapes(&self, paths: &[PathBuf]) -> Result<(), GatherError> {
        let Some(affinity) = &self.affinity else { return Ok(()) };
        let at = |name: &str| {
            let known = paths.iter().find(|path| name_of(path) == name);
            known.cloned().unwrap_or_else(|| name.into())
        };
        let wrong = |name: &str, layers: usize, experts: usize| GatherError::Shape {
            path: at(name),
            found: format!("{layers} × {experts}"),
            expected: format!("{} × {}", affinity.layers, affinity.experts),
        };
        for (name, trace) in &self.traces {
            if trace.layers() != affinity.layers || trace.experts() > affinity.experts {
                return Err(wrong(name, trace.layers(), trace.experts()));
            }
        }
        for (name, table) in &self.tables {
            if (table.layers, table.experts) != (affinity.layers, affinity.experts) {
                return Err(wrong(name, table.layers, table.experts));
            }
        }
        Ok(())
    }

    /// One page of all that was found.
    pub fn into_report(self, title: &str) -> ReportData {
        let mut data = self.benches.first().cloned().unwrap_or_else(ReportData::new);
        data.title = title.into();
        if let Some(affinity) = &self.affinity {
            data.show_affinity(affinity);
            data.profile.tokens = affinity.tokens() as usize;
        }
        data.profile.sources = self.sources;
        let facts = |(name, table): &(String, PlacementTable)| PlacementFacts {
            name: name.clone(),
            ..PlacementFacts::of(table, self.affinity.as_ref())
        };
        let mut tables = self.tables.iter().map(facts);
        if let Some(first) = tables.next() {
            data.placement = first;
        }
        data.others = tables.collect();
        if let (Some((_, trace)), Some(affinity), true) =
            (self.traces.last(), &self.affinity, data.stay.is_empty() && data.placement.ranks > 1)
        {
            data.stay = stay_of(&self.tables, trace, affinity, data.placement.ranks);
        }
        data.replays = self.replays;
        data.strategies = self.strategies;
        data.checks = self.checks;
        data
    }
}

/// Stay rates of the rules and of every table for this number of ranks, on a trace.
fn stay_of(
    tables: &[(String, PlacementTable)],
    trace: &RoutingTrace,
    affinity: &Affinity,
    ranks: usize,
) -> Vec<StayFacts> {
    let (l, e) = (affinity.layers, affinity.experts);
    let rules = [
        ("round_robin".to_owned(), PlacementTable::round_robin(l, e, ranks)),
        ("linear".to_owned(), PlacementTable::linear(l, e, ranks)),
    ];
    let of = |(label, table): &(String, PlacementTable)| {
        let score = score_trace(table, trace);
        StayFacts {
            label: label.clone(),
            stay_rate: score.stay_rate,
            crossings_per_token: score.crossings_per_token,
            imbalance: score.worst_load,
        }
    };
    rules.iter().chain(tables.iter().filter(|(_, table)| table.ranks == ranks)).map(of).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
