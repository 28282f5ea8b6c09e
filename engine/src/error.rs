//! What can go wrong, said so that the reader knows what, where and what to do.

use exflow_placement::{Rank, TableError};
use exflow_transport::TransportError;
use std::path::{Path, PathBuf};

/// Why the engine could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A file of the model is missing or malformed.
    #[error("{}: {what}; {remedy}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// A tensor is missing, has another shape than the config says, or holds no numbers.
    #[error("{}: tensor {tensor}: {what}; {remedy}", path.display())]
    Tensor {
        /// The file that holds it or should.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// A key of config.json is missing or has a value that cannot be.
    #[error("{}: key {key}: {what}; {remedy}", path.display())]
    Config {
        /// The config file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with its value.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// What the caller asked for cannot be done with this model or this world.
    #[error("{what}; {remedy}")]
    Usage {
        /// What was asked for.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// The placement table does not fit.
    #[error(transparent)]
    Placement(#[from] TableError),
    /// No adapter, or the device failed.
    #[error("GPU: {what}; {remedy}")]
    Gpu {
        /// What failed.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// Ranks could not exchange what they had to.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A file could not be written.
    #[error("{}: cannot be written: {source}; choose a folder that exists and is writable", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests wait already, {limit} may; try again later, or set --max-waiting")]
    Busy {
        /// Requests without a token yet.
        waiting: usize,
        /// Most that may.
        limit: usize,
    },
    /// The engine takes no more requests.
    #[error("the engine has stopped: {cause}; start it again")]
    Stopped {
        /// Why.
        cause: String,
    },
    /// The ranks that are there cannot hold the model.
    #[error("{what}; {remedy}")]
    Capacity {
        /// What does not fit where, and how much memory is missing.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// Rank 0 is gone, and with it the world.
    #[error(
        "rank 0 is gone and could not be reached again ({source}); see its log, then start the group again"
    )]
    LeaderLost {
        /// What was seen of it last.
        source: Box<EngineError>,
    },
    /// One rank failed.
    #[error("rank {rank}: {source}")]
    Rank {
        /// Which.
        rank: Rank,
        /// Why.
        source: Box<EngineError>,
    },
    /// An invariant does not hold: a defect of this program.
    #[error("internal error: {0}; please report it with the command that led to it")]
    Internal(String),
}

impl EngineError {
    /// Whether the caller's input is to blame (exit code 2) rather than a failure at run time (exit code 1).
    pub fn is_input(&self) -> bool {
        match self {
            Self::File { .. } | Self::Tensor { .. } | Self::Config { .. } | Self::Usage { .. } => true,
            Self::Placement(_) => true,
            Self::Rank { source, .. } => source.is_input(),
            Self::Transport(error) => {
                matches!(error, TransportError::Options { .. } | TransportError::Identity { .. })
            }
            Self::Gpu { .. } | Self::Write { .. } | Self::Internal(_) => false,
            Self::Capacity { .. } | Self::LeaderLost { .. } => false,
            Self::Busy { .. } | Self::Stopped { .. } => false,
        }
    }

    /// Says at which rank it happened, unless it does so already: errors of the transport begin with their rank.
    pub(crate) fn at(self, rank: Rank) -> Self {
        match self {
            named @ (Self::Transport(_) | Self::Rank { .. }) => named,
            source => Self::Rank { rank, source: Box::new(source) },
        }
    }

    /// Whether this only tells that some other rank is lost.
    pub(crate) fn is_loss(&self) -> bool {
        match self {
            Self::Transport(error) => matches!(
                error,
                TransportError::PeerLost { .. }
                    | TransportError::RoundTimeout { .. }
                    | TransportError::Protocol { .. }
                    | TransportError::Backlog { .. }
                    | TransportError::Closed { .. }
            ),
            Self::Rank { source, .. } => source.is_loss(),
            _ => false,
        }
    }

    pub(crate) fn file(path: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), what: what.into(), remedy: remedy.into() }
    }

    pub(crate) fn tensor(
        path: &Path,
        tensor: &str,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Tensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            what: what.into(),
            remedy: remedy.into(),
        }
    }

    pub(crate) fn config(path: &Path, key: &str, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), key: key.to_owned(), what: what.into(), remedy: remedy.into() }
    }

    pub(crate) fn usage(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), remedy: remedy.into() }
    }

    pub(crate) fn gpu(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Gpu { what: what.into(), remedy: remedy.into() }
    }
}
