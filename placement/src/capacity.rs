//! How many experts a rank may hold: of each layer, or over all layers.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::ids::Rank;
use crate::topology::Topology;

/// What is spread evenly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Balance {
    /// A rank holds of each layer at most its `slots`; without slots, each layer is spread evenly.
    #[default]
    Slots,
    /// Each layer is spread as evenly as slots allow.
    Layer,
    /// Only a rank's experts over all layers (its memory) and its load are bounded: layers may be left
    /// off ranks altogether, down to one rank per layer.
    Total,
}

impl std::str::FromStr for Balance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "slots" => Ok(Self::Slots),
            "layer" => Ok(Self::Layer),
            "total" => Ok(Self::Total),
            _ => Err(format!("unknown balance {text:?}: say slots, layer or total")),
        }
    }
}

/// Bytes that decide what a rank's memory holds. Zero where unknown.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Memory {
    /// Weights of one expert, in bytes.
    pub expert_bytes: f64,
    /// Attention weights (and what else every member of a layer's domain loads) per layer, in bytes.
    pub attention_bytes: f64,
    /// K/V cache per layer in full, in bytes.
    pub kv_bytes: f64,
}

impl Memory {
    /// Bytes per layer that a member of the layer's domain holds beside its experts.
    pub fn domain_bytes(&self) -> f64 {
        self.attention_bytes + self.kv_bytes
    }
}

/// A topology that cannot hold the experts.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum CapacityError {
    /// The slots of all ranks together are too few.
    #[error("{slots} slots per layer cannot hold {experts} experts: add ranks or slots")]
    TooFewSlots {
        /// Slots of all ranks.
        slots: usize,
        /// E.
        experts: usize,
    },
    /// The memory of all ranks together is too small.
    #[error("the ranks' memory holds {slots} experts of the {experts} over all layers: add ranks or memory")]
    TooLittleMemory {
        /// Experts that fit.
        slots: usize,
        /// L x E.
        experts: usize,
    },
    /// A rank has slots, another neither slots nor memory.
    #[error(
        "rank {rank} has neither slots nor memory_gb, though others have: write one for every rank or for none"
    )]
    Unsized {
        /// The rank.
        rank: Rank,
    },
}

/// Bounds on the experts of each rank, `[R]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct Capacity {
    /// Least experts of each layer.
    pub least: Vec<usize>,
    /// Most experts of each layer.
    pub most: Vec<usize>,
    /// What a rank's memory holds over all layers, in experts; `None` where `most` says it all.
    pub total: Option<Vec<usize>>,
    /// What a layer takes of `total` besides its experts on every rank that holds any of them (attention weights and
    /// K/V), in experts.
    pub domain: f64,
    /// Slots of each layer that the rank has in all, spare ones for copies included.
    pub slots: Vec<usize>,
}

impl Capacity {
    /// Bounds for L x E experts on a topology.
    pub fn new(
        layers: usize,
        experts: usize,
        topology: &Topology,
        balance: Balance,
        memory: &Memory,
    ) -> Result<Self, CapacityError> {
        let written = slots_of(layers, experts, topology, memory)?;
        if balance == Balance::Total {
            return Self::over_all(layers, experts, topology, memory, written);
        }
        let slots = written.clone().unwrap_or_else(|| vec![experts; topology.len()]);
        let (least, most) = match (balance, written) {
            (Balance::Slots, Some(slots)) => (vec![0; slots.len()], slots),
            _ => even(experts, &slots)?,
        };
        let room: usize = most.iter().map(|&n| n.min(experts)).sum();
        if room < experts {
            return Err(CapacityError::TooFewSlots { slots: room, experts });
        }
        let slots = if topology.ranks.iter().all(|rank| rank.slots.is_none()) { most.clone() } else { slots };
        Ok(Self { least: tightened(least, &most, experts), most, total: None, domain: 0.0, slots })
    }

    fn over_all(
        layers: usize,
        experts: usize,
        topology: &Topology,
        memory: &Memory,
        written: Option<Vec<usize>>,
    ) -> Result<Self, CapacityError> {
        let ranks = topology.len();
        let by_memory =
            topology.ranks.iter().map(|rank| Some((rank.memory_gb? * 1e9 / memory.expert_bytes) as usize));
        let total: Vec<usize> = match by_memory.collect::<Option<Vec<_>>>() {
            Some(total) if memory.expert_bytes > 0.0 => total,
            _ => match written {
                Some(slots) => slots.iter().map(|&n| n.saturating_mul(layers)).collect(),
                None => vec![(layers * experts).div_ceil(ranks); ranks],
            },
        };
        let room = total.iter().fold(0usize, |sum, &n| sum.saturating_add(n));
        if room < layers * experts {
            return Err(CapacityError::TooLittleMemory { slots: room, experts: layers * experts });
        }
        let most = total.iter().map(|&n| n.min(experts)).collect::<Vec<_>>();
        let domain =
            if memory.expert_bytes > 0.0 { memory.domain_bytes() / memory.expert_bytes } else { 0.0 };
        Ok(Self { least: vec![0; ranks], slots: most.clone(), most, total: Some(total), domain })
    }

    /// Whether every layer has room for exactly the experts that it holds.
    pub fn is_exact(&self) -> bool {
        self.least == self.most
    }

    /// `[R]` what the layers' `counts` (`[R]` each) take of every rank's `total`, in experts.
    pub(crate) fn used<'c>(&self, ranks: usize, counts: impl Iterator<Item = &'c [usize]>) -> Vec<f64> {
        let mut used = vec![0.0; ranks];
        for layer in counts {
            used.iter_mut().zip(layer).for_each(|(used, &n)| *used += self.taken(n));
        }
        used
    }

    /// What `experts` of one layer take, the layer's own bytes included.
    pub(crate) fn taken(&self, experts: usize) -> f64 {
        if experts == 0 { 0.0 } else { experts as f64 + self.domain }
    }
}

/// What a rank must hold because all others together cannot.
fn tightened(least: Vec<usize>, most: &[usize], experts: usize) -> Vec<usize> {
    let all: usize = most.iter().map(|&n| n.min(experts)).sum();
    let must = |rank: usize| experts.saturating_sub(all - most[rank].min(experts));
    least.into_iter().enumerate().map(|(rank, least)| least.max(must(rank))).collect()
}

/// Slots per layer as written, or from memory; `None` where the topology says nothing.
fn slots_of(
    layers: usize,
    experts: usize,
    topology: &Topology,
    memory: &Memory,
) -> Result<Option<Vec<usize>>, CapacityError> {
    if topology.ranks.iter().all(|rank| rank.slots.is_none() && rank.memory_gb.is_none()) {
        return Ok(None);
    }
    let unsized_rank = topology.ranks.iter().position(|r| r.slots.is_none() && r.memory_gb.is_none());
    if let Some(rank) = unsized_rank {
        return Err(CapacityError::Unsized { rank: Rank::from(rank) });
    }
    let shares = shares_of_memory(experts, topology);
    let per_layer = |bytes: f64| {
        let left = bytes / layers.max(1) as f64 - memory.domain_bytes();
        (left / memory.expert_bytes).max(0.0) as usize
    };
    let slots = topology.ranks.iter().zip(shares).map(|(rank, share)| match (rank.slots, rank.memory_gb) {
        (Some(slots), _) => slots.min(experts),
        (None, Some(gb)) if memory.expert_bytes > 0.0 => per_layer(gb * 1e9).min(experts),
        _ => share,
    });
    Ok(Some(slots.collect()))
}

/// E slots dealt in proportion to memory, by largest remainder: for memory without a known expert size.
fn shares_of_memory(experts: usize, topology: &Topology) -> Vec<usize> {
    let memory: Vec<f64> = topology.ranks.iter().map(|rank| rank.memory_gb.unwrap_or(0.0)).collect();
    let whole: f64 = memory.iter().sum();
    if whole <= 0.0 {
        return vec![0; memory.len()];
    }
    let exact: Vec<f64> = memory.iter().map(|gb| gb / whole * experts as f64).collect();
    let mut shares: Vec<usize> = exact.iter().map(|&share| share as usize).collect();
    let mut order: Vec<usize> = (0..memory.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let missing = experts.saturating_sub(shares.iter().sum());
    order.iter().cycle().take(missing).for_each(|&rank| shares[rank] += 1);
    shares
}

/// The flattest spread within the slots: ranks are filled to one level, the last level may be missing.
fn even(experts: usize, slots: &[usize]) -> Result<(Vec<usize>, Vec<usize>), CapacityError> {
    let filled = |level: usize| slots.iter().map(|&n| n.min(level)).sum::<usize>();
    let level = (0..=experts).find(|&level| filled(level) >= experts);
    let level = level.ok_or_else(|| CapacityError::TooFewSlots { slots: slots.iter().sum(), experts })?;
    let most: Vec<usize> = slots.iter().map(|&n| n.min(level)).collect();
    let least = if filled(level) == experts {
        most.clone()
    } else {
        slots.iter().map(|&n| n.min(level.saturating_sub(1))).collect()
    };
    Ok((least, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(slots: &[usize], experts: usize, balance: Balance) -> Result<Capacity, CapacityError> {
        let mut topology = Topology::uniform(slots.len());
        topology.ranks.iter_mut().zip(slots).for_each(|(rank, &n)| rank.slots = Some(n));
        Capacity::new(3, experts, &topology, balance, &Memory::default())
    }

    #[test]
    fn even_without_slots() {
        let capacity =
            Capacity::new(2, 10, &Topology::uniform(4), Balance::Slots, &Memory::default()).unwrap();
        assert_eq!((capacity.least, capacity.most), (vec![2; 4], vec![3; 4]));
        let few = Capacity::new(2, 2, &Topology::uniform(4), Balance::Slots, &Memory::default()).unwrap();
        assert_eq!((few.least, few.most), (vec![0; 4], vec![1; 4]));
    }

    #[test]
    fn slots_bound_and_layers_level() {
        assert_eq!(bounds(&[8, 2, 8], 10, Balance::Slots).unwrap().most, [8, 2, 8]);
        let level = bounds(&[8, 2, 8], 10, Balance::Layer).unwrap();
        assert_eq!((level.least, level.most), (vec![4, 2, 4], vec![4, 2, 4]));
        assert_eq!(bounds(&[2, 2], 4, Balance::Total).unwrap().total, Some(vec![6, 6]));
        assert!(matches!(
            bounds(&[2, 1], 4, Balance::Slots),
            Err(CapacityError::TooFewSlots { slots: 3, .. })
        ));
        assert!(matches!(bounds(&[2, 1], 4, Balance::Layer), Err(CapacityError::TooFewSlots { .. })));
        assert!(matches!(bounds(&[2, 1], 4, Balance::Total), Err(CapacityError::TooLittleMemory { .. })));
    }

    #[test]
    fn memory_gives_slots() {
        let mut topology = Topology::uniform(2);
        topology.ranks[0].memory_gb = Some(6.0);
        let unsized_rank = Capacity::new(1, 4, &topology, Balance::Slots, &Memory::default());
        assert!(matches!(unsized_rank, Err(CapacityError::Unsized { rank: Rank(1) })));
        topology.ranks[1].memory_gb = Some(2.0);
        let shares = Capacity::new(1, 4, &topology, Balance::Slots, &Memory::default()).unwrap();
        assert_eq!(shares.most, [3, 1]);
        let memory = Memory { expert_bytes: 1e9, attention_bytes: 0.5e9, kv_bytes: 0.5e9 };
        assert_eq!(Capacity::new(2, 2, &topology, Balance::Slots, &memory).unwrap().most, [2, 0]);
    }
}
