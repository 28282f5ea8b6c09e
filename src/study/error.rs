//! What can go wrong in a study.

use exflow_engine::EngineError;
use exflow_placement::{AffinityError, SolveError, TableError, TraceError};
use std::path::PathBuf;

/// Why a study ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StudyError {
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The counts could not be made, read or written.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The placement could not be solved.
    #[error(transparent)]
    Solve(#[from] SolveError),
    /// The trace could not be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The table could not be written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A file or folder could not be read or written.
    #[error("{}: {source}; check the path and its permissions", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is too little text to learn from.
    #[error("{passages} passages of text to profile; give more text, at least {least} passages")]
    LittleText {
        /// What there is.
        passages: usize,
        /// What is needed.
        least: usize,
    },
    /// Settings that must agree do not: a defect of this program or of a driver.
    #[error(
        "{setting}, run {run}: sequence {sequence} differs from the first setting's at output token {token}; run `exflow selftest`"
    )]
    Differ {
        /// The setting that differs.
        setting: String,
        /// Its repeat, from 0.
        run: usize,
        /// The sequence, from 0.
        sequence: usize,
        /// The first output token that differs, from 0.
        token: usize,
    },
    /// Experts stayed where they are.
    #[error("experts did not move: {why}")]
    Refused {
        /// Why.
        why: String,
    },
}

impl StudyError {
    /// Whether the caller's input is to blame (exit code 2) rather than a failure at run time (exit code 1).
    pub fn is_input(&self) -> bool {
        match self {
            Self::Engine(error) => error.is_input(),
            Self::Differ { .. } | Self::Refused { .. } => false,
            _ => true,
        }
    }
}
