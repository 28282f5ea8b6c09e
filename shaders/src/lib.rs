//! Every WGSL kernel of exflow, composed by WESL, validated and reflected by naga, each with its parameter
//! block ([`params`]) and its twin on the CPU ([`reference`](mod@reference)). No device: whoever runs a kernel brings one.
//!
//! Sums have one stated order (written in each kernel), so that a row has the same bits in a batch of any
//! size, on any rank. Rows are padded to whole `vec4`s; the padding of weights is zero.

mod cached;
mod compose;
mod kernel;
pub mod params;
pub mod reference;
mod reflect;
mod variant;

pub use cached::Cache;
pub use compose::{ComposeError, Module, module};
pub use kernel::{Kernel, texts};
pub use reflect::{Access, Binding};
pub use variant::{
    Activation, COOPERATIVE_BYTES, COOPERATIVE_SUBGROUPS, Columns, Cooperative, IMAGE_WIDTH, RowTile, Rows,
    Values, Variant, WEIGHT_BLOCK, Weights,
};

/// Positions per block of the paged KV cache, as `attention.wgsl` has it.
pub const KV_BLOCK: usize = 16;

/// Positions of a context that are attended to by themselves, as `shared/split.wgsl` has it.
pub const ATTENTION_SPLIT: usize = 256;

/// The largest values per head that `attention.wgsl` holds in registers.
pub const MAX_HEAD_SIZE: usize = 512;

/// The most groups of experts that a router may choose among (`router.wgsl`).
pub const MAX_GROUPS: usize = 64;

/// The most experts a layer may have (`router.wgsl`, `expert_permute.wgsl`).
pub const MAX_EXPERTS: usize = 1024;

/// Marks an absent partial in `norm.wgsl`.
pub const NO_SLOT: u32 = u32::MAX;
