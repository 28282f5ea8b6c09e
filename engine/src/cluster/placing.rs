//! Which table a world starts with: as asked for, checked against memory, and without the ranks that are absent.

use super::plan::Plan;
use crate::EngineError;
use crate::model::ModelSpec;
use crate::options::{ClusterOptions, Dtype, PlacementSource, Quant};
use crate::runtime::BLOCK;
use exflow_placement::{PlacementTable, Rank};
use exflow_shaders::Cache;
use exflow_transport::proto::membership::Roster;
use serde::{Deserialize, Serialize};

/// What a process tells rank 0 of itself in its hello.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// Bytes that each of its ranks may take; `None`: not known.
    pub(crate) memory: Option<u64>,
    /// Name of each rank's adapter, cut short.
    pub(crate) adapters: Vec<String>,
}

impl Offer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        postcard::from_bytes(bytes).unwrap_or_default()
    }
}

/// Why a world does not start.
pub(crate) enum Decline {
    /// With more ranks it could.
    TooFew(EngineError),
    /// It cannot.
    Never(EngineError),
}

impl Decline {
    pub(crate) fn into_error(self) -> EngineError {
        match self {
            Self::TooFew(error) | Self::Never(error) => error,
        }
    }
}

/// Contexts of this many full lengths fit into the cache, unless that would take more than
/// [`CACHE_POSITIONS`] positions.
const CACHE_CONTEXTS: usize = 16;
const CACHE_POSITIONS: usize = 16_384;

pub(crate) fn cache_blocks(options: &ClusterOptions, spec: &ModelSpec) -> usize {
    let positions = (CACHE_CONTEXTS * spec.max_positions).min(CACHE_POSITIONS);
    options.cache_positions.unwrap_or(positions).div_ceil(BLOCK).max(1)
}

/// The plan of an epoch for those who are there. `base`: the table of the complete world, kept over epochs.
pub(crate) fn decide(
    options: &ClusterOptions,
    spec: &ModelSpec,
    roster: &Roster,
    offers: &[Offer],
    base: &mut Option<PlacementTable>,
) -> Result<Plan, Decline> {
    let ranks = roster.world_size();
    let whole = match base {
        Some(table) => table.clone(),
        None => {
            check_ranks(ranks, spec).map_err(Decline::Never)?;
            let table = resolve(options, spec, ranks).map_err(Decline::Never)?;
            base.insert(table).clone()
        }
    };
    let sizes = Sizes::of(options, spec);
    let room = sizes.room(roster, offers);
    let absent = roster.absent();
    let table = match absent.is_empty() {
        true => whole,
        false => whole.without(&absent, &room).map_err(|shortage| {
            let bytes = shortage.experts.len() as u64 * sizes.expert;
            let gone: Vec<_> = absent.iter().map(Rank::to_string).collect();
            Decline::TooFew(EngineError::Capacity {
                what: format!(
                    "without rank {} there is {shortage}; {} are missing",
                    gone.join(", "),
                    gib(bytes)
                ),
                remedy: "start the rank again, or give the others more --memory".into(),
            })
        })?,
    };
    for (rank, held) in table.experts_per_rank().into_iter().enumerate() {
        if held > room[rank] {
            return Err(Decline::Never(sizes.overfull(rank, held, room[rank])));
        }
    }
    let ClusterOptions { strategy, combine, dtype, quant, kv_dtype, schedule, .. } = *options;
    let cache_blocks = cache_blocks(options, spec);
    Ok(Plan { strategy, combine, dtype, quant, kv_dtype, schedule, cache_blocks, table })
}

/// Bytes on a device, scratch buffers apart.
struct Sizes {
    /// Everything but experts: embeddings, attention, norms, shared experts, KV cache.
    fixed: u64,
    /// One expert.
    expert: u64,
}

impl Sizes {
    fn of(options: &ClusterOptions, spec: &ModelSpec) -> Self {
        // Half bits of a weight; a block of 32 quantised ones has a scale of 16 bits.
        let half_bits = match (options.quant, options.dtype) {
            (Some(Quant::Q8_0), _) => 17,
            (Some(Quant::Q4_0), _) => 9,
            (None, Dtype::F16) => 32,
            (None, Dtype::F32) => 64,
        };
        let bytes = |elements: u64| elements * half_bits / 16;
        // Embeddings are held in f32.
        let embedding = (spec.vocab_size * spec.hidden) as u64;
        let slots = spec.layers * cache_blocks(options, spec) * BLOCK;
        let cache = 4 * slots * Cache::from(options.kv_dtype).words(4 * spec.attention.cache4());
        Self {
            fixed: bytes(spec.elements(0) - embedding) + 4 * embedding + cache as u64,
            expert: bytes(spec.elements(1) - spec.elements(0)),
        }
    }

    /// Experts that each rank can hold over all layers: none where it is absent, any number where its memory is not
    /// known.
    fn room(&self, roster: &Roster, offers: &[Offer]) -> Vec<usize> {
        let of = |process: usize| match offers.get(process).and_then(|offer| offer.memory) {
            _ if !roster.is_present(process) => 0,
            Some(bytes) => (bytes.saturating_sub(self.fixed) / self.expert.max(1)) as usize,
            None => usize::MAX,
        };
        let members = roster.members().iter().enumerate();
        members.flat_map(|(process, member)| std::iter::repeat_n(of(process), member.ranks.into())).collect()
    }

    fn overfull(&self, rank: usize, held: usize, room: usize) -> EngineError {
        let missing = (held - room) as u64 * self.expert;
        EngineError::Capacity {
            what: format!(
                "rank {rank} is to hold {held} experts of {} each beside {} of other weights and cache, and has room \
                 for {room}: {} are missing",
                gib(self.expert),
                gib(self.fixed),
                gib(missing)
            ),
            remedy: "add ranks, give it more --memory, or make a table for this memory with `exflow place`"
                .into(),
        }
    }
}

/// Bytes as people read them.
fn gib(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

pub(crate) fn check_ranks(ranks: usize, spec: &ModelSpec) -> Result<(), EngineError> {
    let experts = spec.experts;
    if ranks == 0 {
        return Err(EngineError::usage("0 ranks", "use at least 1"));
    }
    if ranks > experts {
        let what = format!("{ranks} ranks for {experts} experts a layer");
        return Err(EngineError::usage(what, format!("use at most {experts} ranks")));
    }
    Ok(())
}

/// The table that was asked for, of `ranks` ranks.
fn resolve(options: &ClusterOptions, spec: &ModelSpec, ranks: usize) -> Result<PlacementTable, EngineError> {
    let (layers, experts) = (spec.moe_layers(), spec.experts);
    let fits = |table: &PlacementTable| table.check_fits(layers, experts, ranks, Some(&spec.digest));
    match &options.placement {
        PlacementSource::RoundRobin => Ok(PlacementTable::round_robin(layers, experts, ranks)),
        PlacementSource::Linear => Ok(PlacementTable::linear(layers, experts, ranks)),
        PlacementSource::Table(table) => {
            fits(table)?;
            Ok(table.clone())
        }
        PlacementSource::File(path) => {
            let table = read_table(path, experts, Some(ranks))?;
            fits(&table).map_err(|e| EngineError::file(path, e.to_string(), MAKE_ONE))?;
            Ok(table)
        }
    }
}

const MAKE_ONE: &str = "make one for this model and world size with `exflow place`";

pub(crate) fn read_table(
    path: &std::path::Path,
    experts: usize,
    ranks: Option<usize>,
) -> Result<PlacementTable, EngineError> {
    PlacementTable::read(path, Some(exflow_placement::TableShape { experts, ranks }))
        .map_err(|e| EngineError::file(path, format!("no placement table: {e}"), MAKE_ONE))
}
