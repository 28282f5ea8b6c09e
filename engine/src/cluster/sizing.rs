//! What fits where: bytes of weights, experts and cache against what each rank may take.

use super::numerics;
use crate::EngineError;
use crate::gpu::OnUnits;
use crate::model::ModelSpec;
use crate::model::scratch::attention_splits;
use crate::options::{ClusterOptions, Dtype, KvWire, Numerics, Overlap, Quant};
use crate::runtime::{BLOCK, CHUNK, MAX_RUNNING};
use crate::stats::gib;
use exflow_shaders::Cache;
use exflow_transport::proto::membership::Roster;
use serde::{Deserialize, Serialize};

/// Where the cache's memory is the host's own: contexts of so many full lengths, unless that would take more than
/// [`HOST_POSITIONS`] positions. What is allocated there is taken from everybody at once.
const HOST_CONTEXTS: usize = 16;
const HOST_POSITIONS: usize = 16_384;
/// The share of the host's free memory that caches may take, of all ranks of a process together: 1 / this.
const HOST_SHARE: u64 = 4;
/// Percent of a device's free memory that a rank counts on; the rest is the driver's and others'.
const DEVICE_PERCENT: u64 = 90;
/// Positions that a cache has at least, or a context where that is shorter: with less a model is of no use.
const LEAST_POSITIONS: usize = 4096;

/// What a process tells rank 0 of itself in its hello.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// Bytes that each of its ranks may take, as it was told; `None`: not told.
    pub(crate) memory: Option<u64>,
    /// Bytes that each of its ranks finds free; `None`: not known, or not needed.
    pub(crate) free: Option<u64>,
    /// The largest buffer of its adapters, where that was looked up.
    pub(crate) largest_buffer: Option<u64>,
    /// Whether adapters are CPUs, so that their memory is the host's.
    pub(crate) on_host: bool,
    /// Name of each rank's adapter, cut short; empty where nobody asks.
    pub(crate) adapters: Vec<String>,
    /// And its driver.
    pub(crate) drivers: Vec<String>,
    /// And the matrices whose products it makes on its matrix units where numerics are fast.
    pub(crate) on_units: Vec<OnUnits>,
}

impl Offer {
    /// Of a process whose ranks need no names; adapters are looked at where the cache is sized by them.
    pub(crate) fn of(options: &ClusterOptions) -> Result<Self, EngineError> {
        match options.cache_positions {
            Some(_) if options.kv_wire == KvWire::Cache && options.numerics == Numerics::Exact => {
                Ok(Self { memory: options.memory, ..Self::default() })
            }
            _ => Self::with_names(options),
        }
    }

    /// Of a process of a group.
    pub(crate) fn with_names(options: &ClusterOptions) -> Result<Self, EngineError> {
        let adapters = crate::gpu::chosen((0..options.ranks).map(|local| options.adapter_of(local)))?;
        let on_host = adapters.iter().any(|adapter| adapter.kind == "cpu");
        // Ranks on the same adapter share what is free there.
        let shares = |index| adapters.iter().filter(|adapter| adapter.index == index).count() as u64;
        let free = adapters.iter().filter_map(|adapter| {
            let free = adapter.memory?.free_bytes?;
            let all = if on_host { free / HOST_SHARE } else { free / 100 * DEVICE_PERCENT };
            Some(all / shares(adapter.index))
        });
        let short = |text: &str| text.chars().take(40).collect();
        Ok(Self {
            memory: options.memory,
            free: free.min(),
            largest_buffer: adapters.iter().map(|a| a.max_binding_bytes.min(a.max_buffer_bytes)).min(),
            on_host,
            adapters: adapters.iter().map(|adapter| short(&adapter.name)).collect(),
            drivers: adapters.iter().map(|adapter| short(&adapter.driver)).collect(),
            on_units: adapters.iter().map(|adapter| numerics::offered(options, adapter)).collect(),
        })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        postcard::from_bytes(bytes).unwrap_or_default()
    }
}

/// Bytes on a device.
pub(crate) struct Sizes {
    /// Everything but experts and cache: embeddings, attention, norms, shared experts.
    weights: u64,
    /// What a step of a whole chunk works in, roughly.
    scratch: u64,
    /// One expert.
    pub(crate) expert: u64,
    /// One block of cache, at one layer and over all.
    layer_block: u64,
    block: u64,
    /// Blocks that there are to be at least and at most: equal where it was said.
    least: usize,
    most: usize,
    most_on_host: usize,
}

impl Sizes {
    /// `first`: blocks of the first epoch's cache, in a later one.
    pub(crate) fn of(options: &ClusterOptions, spec: &ModelSpec, first: Option<usize>) -> Self {
        // Half bits of a weight; a block of 32 quantised ones has a scale of 16 bits.
        let half_bits = match (options.quant, options.dtype) {
            (Some(Quant::Q8_0), _) => 17,
            (Some(Quant::Q4_0), _) => 9,
            (None, Dtype::F16) => 32,
            (None, Dtype::F32) => 64,
        };
        let bytes = |elements: u64| elements * half_bits / 16;
        let expert = spec.elements(1) - spec.elements(0);
        // Embeddings are held in f32.
        let embedding = (spec.vocab_size * spec.hidden) as u64;
        let values = Cache::from(options.kv_dtype).stride(4 * spec.attention.cache4());
        let layer_block = 4 * (BLOCK * values) as u64;
        let context = spec.max_positions;
        let blocks = |positions: usize| positions.div_ceil(BLOCK).max(1);
        let on_host = (HOST_CONTEXTS * context).min(HOST_POSITIONS.max(context));
        let (least, most, most_on_host) = match (options.cache_positions, first) {
            (Some(said), _) => (blocks(said), blocks(said), blocks(said)),
            (None, None) => {
                (blocks(context.min(LEAST_POSITIONS)), blocks(MAX_RUNNING * context), blocks(on_host))
            }
            // What was accepted must fit for as long as it runs.
            (None, Some(first)) => (first.min(blocks(context)), first, first),
        };
        // The second half of a decode step has buffers of its own.
        let halves = match options.overlap {
            Overlap::Halves | Overlap::Auto => scratch(spec, (MAX_RUNNING / 2, MAX_RUNNING / 2)),
            Overlap::Off | Overlap::Own | Overlap::Peers => 0,
        };
        Self {
            weights: bytes(spec.elements(0) - embedding) + 4 * embedding,
            scratch: scratch(spec, (CHUNK.min(MAX_RUNNING.max(context)), MAX_RUNNING)) + halves,
            expert: if spec.packed_experts && options.quant.is_none() {
                expert * 9 / 16
            } else {
                bytes(expert)
            },
            layer_block,
            block: spec.layers as u64 * layer_block,
            least,
            most,
            most_on_host,
        }
    }

    /// Experts that each rank can hold over all layers beside the least cache, scratch buffers apart: none where it is
    /// absent, any number where nobody said what it may take.
    pub(crate) fn room(&self, roster: &Roster, offers: &[Offer]) -> Vec<usize> {
        let fixed = self.fixed();
        let of = |offer: Option<&Offer>| match offer.map(|offer| offer.memory) {
            None => 0,
            Some(Some(bytes)) => (bytes.saturating_sub(fixed) / self.expert.max(1)) as usize,
            Some(None) => usize::MAX,
        };
        present(roster, offers).map(of).collect()
    }

    /// Bytes that a rank which may take `memory` has for experts beside a cache of so many blocks.
    pub(crate) fn for_experts(&self, memory: u64, cache_blocks: usize) -> u64 {
        memory.saturating_sub(self.weights + cache_blocks as u64 * self.block)
    }

    /// Blocks of every rank's cache, alike everywhere as rank 0 counts them for all: what is left beside `held`
    /// experts where there is the least.
    pub(crate) fn cache_blocks(&self, roster: &Roster, offers: &[Offer], held: &[usize]) -> usize {
        let ranks = present(roster, offers).zip(held);
        let left = ranks.filter_map(|(offer, &held)| {
            let offer = offer?;
            let most = if offer.on_host { self.most_on_host } else { self.most };
            let others = self.weights + self.scratch + held as u64 * self.expert;
            let fitting = |bytes: u64| (bytes.saturating_sub(others) / self.block) as usize;
            // The share of the host's memory is one for caches alone: weights are mapped files and have been counted.
            let free =
                |bytes: u64| if offer.on_host { (bytes / self.block) as usize } else { fitting(bytes) };
            let memory = offer.memory.map(fitting).or(offer.free.map(free)).unwrap_or(self.most_on_host);
            let buffer = offer.largest_buffer.map_or(usize::MAX, |bytes| (bytes / self.layer_block) as usize);
            Some(most.min(memory).max(self.least).min(buffer.max(1)))
        });
        left.min().unwrap_or(self.most_on_host)
    }

    /// Bytes of a block of cache, over all layers.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.block
    }

    /// What a rank holds beside its experts.
    fn fixed(&self) -> u64 {
        self.weights + self.least as u64 * self.block
    }

    pub(crate) fn overfull(&self, rank: usize, held: usize, room: usize) -> EngineError {
        let missing = (held - room) as u64 * self.expert;
        EngineError::Capacity {
            what: format!(
                "rank {rank} is to hold {held} experts of {} each beside {} of other weights and cache, and has room \
                 for {room}: {} are missing",
                gib(self.expert),
                gib(self.fixed()),
                gib(missing)
            ),
            remedy: "add ranks, give it more --memory, or make a table for this memory with `exflow place`"
                .into(),
        }
    }
}

/// By rank, what its process offers; `None` where it is absent.
pub(super) fn present<'a>(
    roster: &'a Roster,
    offers: &'a [Offer],
) -> impl Iterator<Item = Option<&'a Offer>> {
    roster.members().iter().enumerate().flat_map(move |(process, member)| {
        let offer = offers.get(process).filter(|_| roster.is_present(process));
        std::iter::repeat_n(offer, member.ranks.into())
    })
}

/// Bytes of the buffers that `rows` tokens pass, by the widest of them, `heads` of them up to the logits.
fn scratch(spec: &ModelSpec, (rows, heads): (usize, usize)) -> u64 {
    let attention = &spec.attention;
    let pairs = spec.top_k + 2;
    let row4 = (2 * pairs + 2) * spec.h4()
        + attention.qkv4()
        + attention.heads * attention.v4()
        + pairs * spec.largest_i4();
    let splits = attention_splits(spec) * (1 + attention.v4());
    16 * (rows * row4 + heads * spec.v4() + splits) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 layers, H 8, 4 experts, 64 positions of 2 * 8 values a layer.
    const CONFIG: &str = r#"{"model_type":"gpt_moe","vocab_size":32,"n_positions":64,"n_embd":8,"n_layer":2,
        "n_head":2,"n_inner":16,"num_experts":4,"top_k":2,"layer_norm_epsilon":1e-5}"#;
    const BLOCK_BYTES: u64 = 2 * 16 * 16 * 4;

    fn blocks(change: impl FnOnce(&mut ClusterOptions), first: Option<usize>, offers: &[Offer]) -> usize {
        let spec =
            ModelSpec::parse(std::path::Path::new("config.json"), CONFIG.as_bytes()).expect("a config");
        let mut options = ClusterOptions::new("unused");
        change(&mut options);
        let roster = Roster::new(offers.iter().map(|_| (1, Some(([127, 0, 0, 1], 7).into()))));
        let sizes = Sizes::of(&options, &spec, first);
        assert_eq!(sizes.block, BLOCK_BYTES);
        sizes.cache_blocks(&roster, offers, &vec![4; offers.len()])
    }

    fn device(free: u64) -> Offer {
        Offer { free: Some(free), largest_buffer: Some(1 << 30), ..Offer::default() }
    }

    #[test]
    fn the_cache_takes_what_is_left_and_no_more_than_can_be_used() {
        let (context, all) = (64 / BLOCK, MAX_RUNNING * 64 / BLOCK);
        assert_eq!(blocks(|_| (), None, &[device(1 << 40)]), all, "every sequence's whole context");
        let host = Offer { on_host: true, ..device(1 << 40) };
        assert_eq!(
            blocks(|_| (), None, std::slice::from_ref(&host)),
            16 * context,
            "memory that is everybody's"
        );
        assert_eq!(blocks(|_| (), None, &[Offer { free: Some(9 * BLOCK_BYTES), ..host.clone() }]), 9);
        assert_eq!(blocks(|_| (), None, &[device(0)]), context, "one context, or the model is of no use");
        // Another quarter of a MiB holds so many blocks more, until a buffer is as large as it can be.
        let quarters = |n: u64| blocks(|_| (), None, &[device(n << 18)]);
        let (some, more) = (quarters(4), quarters(5));
        assert!(some > context && more < all, "{some}, {more}");
        assert_eq!((more - some) as u64, (1 << 18) / BLOCK_BYTES);
        let small = Offer { largest_buffer: Some(5 * BLOCK_BYTES / 2), ..device(1 << 40) };
        assert_eq!(blocks(|_| (), None, &[small]), 5);
        // The rank with the least decides; what was told counts before what was found; --ctx-size before all.
        let told = |memory| Offer { memory: Some(memory), ..host.clone() };
        assert_eq!(blocks(|_| (), None, &[device(1 << 40), device(1 << 20)]), some);
        assert_eq!(blocks(|_| (), None, &[told(0)]), context);
        assert_eq!(blocks(|_| (), None, &[told(1 << 40)]), 16 * context);
        assert_eq!(blocks(|o| o.cache_positions = Some(100), None, &[told(0)]), 7);
    }

    #[test]
    fn in_later_epochs_what_was_accepted_still_fits() {
        let context = 64 / BLOCK;
        assert_eq!(blocks(|_| (), Some(40), &[device(1 << 40)]), 40);
        assert_eq!(blocks(|_| (), Some(40), &[device(0)]), context);
        assert_eq!(blocks(|_| (), Some(3), &[device(0)]), 3);
    }

    #[test]
    fn offers_survive_the_wire() {
        let offer = Offer { memory: Some(1), on_host: true, adapters: vec!["a".into()], ..device(7) };
        assert_eq!(Offer::decode(&offer.encode()), offer);
        assert_eq!(Offer::decode(b"\xff"), Offer::default());
    }
}
