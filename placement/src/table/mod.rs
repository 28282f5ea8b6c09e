//! The placement table: which rank holds which expert of which layer. Versioned JSON.

mod error;

use std::collections::BTreeMap;
use std::path::Path;

use crate::cost::Weights;
use crate::ids::{ExpertId, LayerId, Rank};
use crate::outlook::Outlook;
pub use error::TableError;
use serde::{Deserialize, Serialize};

/// The version of the JSON form that this crate writes and reads.
pub const TABLE_VERSION: u32 = 1;

/// A further copy of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Replica {
    /// The MoE layer.
    pub layer: LayerId,
    /// The logical expert.
    pub expert: ExpertId,
    /// The rank that holds the copy.
    pub rank: Rank,
}

/// Which rank holds which expert: L MoE layers, E logical experts each, R ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlacementTable {
    /// Version of the format: 1.
    pub version: u32,
    /// L, counted over the MoE layers only.
    pub layers: usize,
    /// E.
    pub experts: usize,
    /// R.
    pub ranks: usize,
    /// `[L][E]`: the primary holder.
    pub assignment: Vec<Vec<Rank>>,
    /// Further copies, ascending.
    #[serde(default)]
    pub replicas: Vec<Replica>,
    /// Where the next experts of tokens with several are expected: decides where they go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlook: Option<Outlook>,
    /// Digest of the model that the counts are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// Where the counts come from: file names, or the strategy's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The weights of the objective.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<Weights>,
    /// Objective of the primary holders, in counts x link cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// No table has a lower cost than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lower_bound: Option<f64>,
    /// `1 - lower_bound / cost`; 0: proven optimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<f64>,
    /// Cost of other placements by name, in the same units.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub baselines: BTreeMap<String, f64>,
    /// Cost with the replicas in use, as a first-order Markov chain predicts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_with_replicas: Option<f64>,
    /// The solver's seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// How cost and bound came about, by rising time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Moment>,
}

/// Cost and bound at a moment of the solve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// Time since the solve began.
    pub seconds: f64,
    /// Cost of the best placement so far, without copies.
    pub cost: f64,
    /// Best proven lower bound so far.
    pub lower_bound: f64,
}

impl PlacementTable {
    /// Expert e on rank e mod R, in every layer.
    pub fn round_robin(layers: usize, experts: usize, ranks: usize) -> Self {
        let row: Vec<Rank> = (0..experts).map(|e| Rank::from(e % ranks.max(1))).collect();
        Self::new(vec![row; layers], experts, ranks, "round_robin")
    }

    /// Contiguous blocks of experts, the first ranks one larger where R does not divide E.
    pub fn linear(layers: usize, experts: usize, ranks: usize) -> Self {
        let row: Vec<Rank> = (0..ranks)
            .flat_map(|g| {
                std::iter::repeat_n(Rank::from(g), experts / ranks + usize::from(g < experts % ranks))
            })
            .collect();
        Self::new(vec![row; layers], experts, ranks, "linear")
    }

    /// A table from `[L][E]` primary holders.
    pub fn from_assignment(assignment: Vec<Vec<Rank>>, ranks: usize) -> Result<Self, TableError> {
        let experts = assignment.first().map_or(0, Vec::len);
        let table = Self::new(assignment, experts, ranks, "given");
        table.check()?;
        Ok(table)
    }

    fn new(assignment: Vec<Vec<Rank>>, experts: usize, ranks: usize, source: &str) -> Self {
        Self {
            version: TABLE_VERSION,
            layers: assignment.len(),
            experts,
            ranks,
            assignment,
            replicas: Vec::new(),
            outlook: None,
            model_digest: None,
            source: Some(source.to_owned()),
            objective: None,
            cost: None,
            lower_bound: None,
            gap: None,
            baselines: BTreeMap::new(),
            cost_with_replicas: None,
            seed: None,
            history: Vec::new(),
        }
    }

    /// Reads and checks the JSON form; unknown keys are ignored.
    pub fn load(path: &Path) -> Result<Self, TableError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| TableError::Io { path: path.into(), source })?;
        let mut table: Self =
            serde_json::from_str(&text).map_err(|source| TableError::Json { path: path.into(), source })?;
        table.replicas.sort_unstable();
        table.check()?;
        Ok(table)
    }

    /// Checks and writes the JSON form.
    pub fn save(&self, path: &Path) -> Result<(), TableError> {
        self.check()?;
        let text =
            serde_json::to_string(self).map_err(|source| TableError::Json { path: path.into(), source })?;
        std::fs::write(path, text + "\n").map_err(|source| TableError::Io { path: path.into(), source })
    }

    /// Replaces the copies: sorted, without those that the rank holds already. What is expected of the next layer depends
    /// on them: it is forgotten until [`PlacementTable::look_ahead`] is called again.
    pub fn set_replicas(&mut self, mut replicas: Vec<Replica>) {
        replicas.sort_unstable();
        replicas.dedup();
        replicas.retain(|r| self.primary(r.layer, r.expert) != Some(r.rank));
        self.replicas = replicas;
        self.outlook = None;
    }

    /// Whether every expert has exactly one primary holder among the ranks and every copy is another's.
    pub fn check(&self) -> Result<(), TableError> {
        if self.version != TABLE_VERSION {
            return Err(TableError::Version(self.version));
        }
        let sizes = [("layers", self.layers), ("experts", self.experts), ("ranks", self.ranks)];
        if let Some(&(what, value)) = sizes.iter().find(|(_, n)| !(1..=1 << 16).contains(n)) {
            return Err(TableError::Dimension { what, value });
        }
        if self.assignment.len() != self.layers {
            return Err(TableError::Layers { layers: self.layers, found: self.assignment.len() });
        }
        self.assignment
            .iter()
            .enumerate()
            .try_for_each(|(layer, row)| self.check_row(LayerId::from(layer), row))?;
        self.replicas.iter().try_for_each(|replica| self.check_replica(replica))?;
        self.replicas.windows(2).try_for_each(|pair| check_order(pair[0], pair[1]))?;
        let (expected, found) = (Outlook::len_of(self), self.outlook.as_ref().map(Outlook::len));
        match found {
            Some(found) if found != expected => Err(TableError::Outlook { expected, found }),
            _ => Ok(()),
        }
    }

    fn check_row(&self, layer: LayerId, row: &[Rank]) -> Result<(), TableError> {
        if row.len() != self.experts {
            return Err(TableError::Experts { layer, experts: self.experts, found: row.len() });
        }
        match row.iter().position(|rank| rank.index() >= self.ranks) {
            None => Ok(()),
            Some(e) => {
                let (expert, rank) = (ExpertId::from(e), row[e]);
                Err(TableError::RankOutside { layer, expert, rank, ranks: self.ranks })
            }
        }
    }

    fn check_replica(&self, replica: &Replica) -> Result<(), TableError> {
        let Replica { layer, expert, rank } = *replica;
        if layer.index() >= self.layers || expert.index() >= self.experts {
            return Err(TableError::ReplicaOutside { layer, expert });
        }
        if rank.index() >= self.ranks {
            return Err(TableError::RankOutside { layer, expert, rank, ranks: self.ranks });
        }
        if self.primary(layer, expert) == Some(rank) {
            return Err(TableError::ReplicaTwice { layer, expert, rank });
        }
        Ok(())
    }

    /// Whether the table is for a model of this shape, this world size and, where both are known, this digest.
    pub fn check_fits(
        &self,
        layers: usize,
        experts: usize,
        ranks: usize,
        model_digest: Option<&str>,
    ) -> Result<(), TableError> {
        self.check()?;
        let sizes = [
            ("MoE layers", self.layers, layers),
            ("experts", self.experts, experts),
            ("ranks", self.ranks, ranks),
        ];
        if let Some(&(what, found, expected)) = sizes.iter().find(|(_, found, expected)| found != expected) {
            return Err(TableError::OtherModel { what, found, expected });
        }
        match (self.model_digest.as_deref(), model_digest) {
            (Some(found), Some(expected)) if found != expected => {
                Err(TableError::OtherDigest { found: found.into(), expected: expected.into() })
            }
            _ => Ok(()),
        }
    }

    fn primary(&self, layer: LayerId, expert: ExpertId) -> Option<Rank> {
        self.assignment.get(layer.index())?.get(expert.index()).copied()
    }

    fn copies(&self, layer: LayerId) -> &[Replica] {
        let start = self.replicas.partition_point(|r| r.layer < layer);
        let end = start + self.replicas[start..].partition_point(|r| r.layer == layer);
        &self.replicas[start..end]
    }

    /// The ranks that hold an expert: the primary, then the copies, ascending. None outside the table.
    pub fn holders(&self, layer: LayerId, expert: ExpertId) -> impl Iterator<Item = Rank> {
        let copies = self.copies(layer);
        let start = copies.partition_point(|r| r.expert < expert);
        let copies = copies[start..].iter().take_while(move |r| r.expert == expert).map(|r| r.rank);
        self.primary(layer, expert).into_iter().chain(copies)
    }

    /// The experts of a layer that a rank holds, copies included, ascending.
    pub fn experts_of(&self, layer: LayerId, rank: Rank) -> Vec<ExpertId> {
        let row = self.assignment.get(layer.index()).map_or(&[][..], Vec::as_slice);
        let primary =
            row.iter().enumerate().filter(|(_, holder)| **holder == rank).map(|(e, _)| ExpertId::from(e));
        let copies = self.copies(layer).iter().filter(|r| r.rank == rank).map(|r| r.expert);
        sorted(primary.chain(copies).collect())
    }

    /// The ranks that hold any expert of a layer, ascending.
    pub fn ranks_of(&self, layer: LayerId) -> Vec<Rank> {
        let row = self.assignment.get(layer.index()).map_or(&[][..], Vec::as_slice);
        sorted(row.iter().copied().chain(self.copies(layer).iter().map(|r| r.rank)).collect())
    }

    /// The domain of a model layer: the ranks where its attention may run, ascending. `previous` is the
    /// nearest MoE layer before it; `None` (up to the first MoE layer): the holders of the last one and `home`.
    pub fn domain(&self, previous: Option<LayerId>, home: Rank) -> Vec<Rank> {
        match previous {
            Some(layer) => self.ranks_of(layer),
            None => {
                let mut ranks = self.ranks_of(LayerId::from(self.layers.saturating_sub(1)));
                ranks.push(home);
                sorted(ranks)
            }
        }
    }

    /// Experts on each rank over all layers, copies included, `[R]`.
    pub fn experts_per_rank(&self) -> Vec<usize> {
        let mut held = vec![0; self.ranks];
        let copies = self.replicas.iter().map(|r| r.rank);
        self.assignment.iter().flatten().copied().chain(copies).for_each(|rank| held[rank.index()] += 1);
        held
    }
}

fn check_order(a: Replica, b: Replica) -> Result<(), TableError> {
    let Replica { layer, expert, rank } = b;
    match a.cmp(&b) {
        std::cmp::Ordering::Less => Ok(()),
        std::cmp::Ordering::Equal => Err(TableError::ReplicaTwice { layer, expert, rank }),
        std::cmp::Ordering::Greater => Err(TableError::ReplicaOrder { layer, expert, rank }),
    }
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort_unstable();
    items.dedup();
    items
}

#[cfg(test)]
mod tests;
