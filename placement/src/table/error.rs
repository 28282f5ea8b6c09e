//! What can be wrong with a placement table.

use std::path::PathBuf;

use thiserror::Error;

use crate::ids::{ExpertId, LayerId, Rank};

/// What is wrong with a placement table.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TableError {
    /// The file could not be read or written.
    #[error("placement table {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not the JSON of a table.
    #[error("placement table {path}: {source}; make it with `exflow place`")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A file in another program's format makes no table, or a table does not go into that format.
    #[error("placement table {path}: {what}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Where, why and what to do.
        what: String,
    },
    /// A table of another version of the format.
    #[error(
        "placement table of format version {0}; this program reads version 1: make it again with `exflow place`"
    )]
    Version(u32),
    /// A dimension is 0 or beyond 65536.
    #[error("a placement table has 1 to 65536 layers, experts and ranks; {what} is {value}")]
    Dimension {
        /// `layers`, `experts` or `ranks`.
        what: &'static str,
        /// What it is.
        value: usize,
    },
    /// The assignment has another number of layers than the table says.
    #[error("placement table says {layers} layers but assigns {found}")]
    Layers {
        /// The table's number.
        layers: usize,
        /// Rows of the assignment.
        found: usize,
    },
    /// What a table expects of the next layers has another shape.
    #[error(
        "placement table: \"outlook\" has {found} numbers for {expected}: make the table again with `exflow place`"
    )]
    Outlook {
        /// L * E * R.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// A layer assigns another number of experts than the table says.
    #[error("placement table, layer {layer}: {experts} experts expected, {found} are assigned")]
    Experts {
        /// The layer.
        layer: LayerId,
        /// The table's number.
        experts: usize,
        /// Entries of the row.
        found: usize,
    },
    /// An expert is on a rank that does not exist.
    #[error("placement table, layer {layer}, expert {expert}: rank {rank} of a table for {ranks} ranks")]
    RankOutside {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The rank.
        rank: Rank,
        /// The table's number of ranks.
        ranks: usize,
    },
    /// A replica of a layer or expert that does not exist.
    #[error("placement table: replica of layer {layer}, expert {expert}, which the table does not have")]
    ReplicaOutside {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
    },
    /// A rank holds an expert twice.
    #[error("placement table, layer {layer}, expert {expert}: rank {rank} holds it twice; drop the replica")]
    ReplicaTwice {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The rank.
        rank: Rank,
    },
    /// Replicas are not in ascending order.
    #[error(
        "placement table: replicas must ascend by layer, expert, rank; {layer}, {expert}, {rank} does not"
    )]
    ReplicaOrder {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The rank.
        rank: Rank,
    },
    /// The table is of another model or world.
    #[error(
        "placement table of another model: it is for {found} {what}, {expected} are here; make one with `exflow place`"
    )]
    OtherModel {
        /// `MoE layers`, `experts` or `ranks`.
        what: &'static str,
        /// The table's number.
        found: usize,
        /// The number here.
        expected: usize,
    },
    /// The table was made from another model's counts.
    #[error(
        "placement table of another model: made for digest {found}, this model is {expected}; make one with `exflow place`"
    )]
    OtherDigest {
        /// The table's digest.
        found: String,
        /// The model's digest.
        expected: String,
    },
}
