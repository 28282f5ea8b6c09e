//! Parameter blocks, one per kernel, field by field as the kernel's `struct Params` has them.

use crate::Kernel;
use bytemuck::{Pod, Zeroable};

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[allow(missing_docs, reason = "each field is explained beside its twin in the kernel")]
            #[repr(C)]
            #[derive(Debug, Clone, Copy, PartialEq, Default, Pod, Zeroable)]
            pub struct $name { $(pub $field: $ty),* }
        )*

        /// Size in bytes of a kernel's parameter block.
        pub fn size_of(kernel: Kernel) -> usize {
            match kernel { $(Kernel::$name => std::mem::size_of::<$name>()),* }
        }
    };
}

params! {
    /// Parameters of `embed.wgsl`.
    Embed { rows: u32, width4: u32 }
    /// Parameters of `layer_norm.wgsl`.
    LayerNorm { rows: u32, width: u32, width4: u32, first_row: u32, eps: f32 }
    /// Parameters of `linear.wgsl`.
    Linear { rows: u32, k4: u32, n4: u32, has_bias: u32, has_residual: u32 }
    /// Parameters of `kv_append.wgsl`.
    KvAppend { rows: u32, width4: u32, stride4: u32, offset4: u32 }
    /// Parameters of `attention.wgsl`.
    Attention { heads: u32, d4: u32, q_stride4: u32, table_stride: u32, scale: f32 }
    /// Parameters of `router.wgsl`.
    Router { rows: u32, h4: u32, experts: u32, top_k: u32, renormalise: u32 }
    /// Parameters of `expert_permute.wgsl`.
    ExpertPermute { pairs: u32, top_k: u32, experts: u32, up_groups: u32, down_groups: u32 }
    /// Parameters of `expert_up.wgsl`.
    ExpertUp { h4: u32, i4: u32, first_tile: u32 }
    /// Parameters of `expert_down.wgsl`.
    ExpertDown { i4: u32, h4: u32, first_tile: u32 }
    /// Parameters of `combine.wgsl`.
    Combine { rows: u32, h4: u32, top_k: u32 }
    /// Parameters of `argmax.wgsl`.
    Argmax { vocab: u32, stride: u32 }
}

/// One (token, expert) pair, as `shared/pair.wgsl` has it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default, Pod, Zeroable)]
pub struct Pair {
    /// Row of the normed input.
    pub row: u32,
    /// Row of the partial that it becomes.
    pub slot: u32,
    /// Router weight.
    pub weight: f32,
    /// Local expert, counted over the experts on this device.
    pub expert: u32,
}

/// Up to a tile's rows of pairs of one expert, as `shared/pair.wgsl` has it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct Tile {
    /// Local expert.
    pub expert: u32,
    /// Its first pair in the sorted list.
    pub first: u32,
    /// How many pairs.
    pub count: u32,
    /// Unused.
    pub pad: u32,
}

/// What `attention.wgsl` needs to know of a token.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct Query {
    /// The token sees positions `0..=position`.
    pub position: u32,
    /// Row of the block table that holds its context.
    pub table_row: u32,
}
