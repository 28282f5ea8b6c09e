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
    Embed { rows: u32, width4: u32, first: u32, height4: u32, has_positions: u32, follows: u32, scale: f32 }
    /// Parameters of `norm.wgsl`.
    Norm { width: u32, width4: u32, first_row: u32, combines: u32, top_k: u32, centred: u32, eps: f32 }
    /// Parameters of `linear.wgsl`.
    Linear {
        rows: u32, k4: u32, n4: u32, w_units: u32, w_stride: u32, x_stride4: u32, x_head4: u32, y_stride4: u32, y_offset4: u32, y_head4: u32,
        has_bias: u32, has_residual: u32, scale: f32, kept_from4: u32, turned4: u32, half4: u32, part4: u32,
    }
    /// Parameters of `part_norm.wgsl`.
    PartNorm { stride4: u32, offset4: u32, part4: u32, width: u32, eps: f32 }
    /// Parameters of `clip.wgsl`.
    Clip { width4: u32, limit: f32 }
    /// Parameters of `place.wgsl`.
    Place {
        stride4: u32, offset4: u32, d4: u32, q_heads: u32, k_heads: u32, q_span: u32, k_span: u32, cache4: u32, appends: u32,
        normed4: u32, normed: u32, norms_queries: u32, clips: u32, limit: f32, first: u32, half: u32, part4: u32, eps: f32,
    }
    /// Parameters of `attention.wgsl`.
    Attention {
        group: u32, d4: u32, v4: u32, q_stride4: u32, cache_stride4: u32, v_offset4: u32, v_head4: u32,
        table_stride: u32, window: u32, has_sinks: u32, part4: u32, scale: f32,
    }
    /// Parameters of `attention_merge.wgsl`.
    AttentionMerge { v4: u32, splits: u32, window: u32, has_sinks: u32 }
    /// Parameters of `router.wgsl`.
    Router {
        width: u32, h4: u32, centred: u32, eps: f32, experts: u32, top_k: u32, score: u32, renormalise: u32,
        has_bias: u32, has_correction: u32, groups: u32, groups_kept: u32, group_best: u32, scale: f32,
        threshold: f32, lists: u32, up_groups: u32, down_groups: u32,
    }
    /// Parameters of `expert_permute.wgsl`.
    ExpertPermute { pairs: u32, top_k: u32, experts: u32, up_groups: u32, down_groups: u32 }
    /// Parameters of `expert_up.wgsl`.
    ExpertUp {
        h4: u32, i4: u32, w_units: u32, w_stride: u32, first_tile: u32, has_bias: u32,
        first_expert: u32, experts: u32, limit: f32,
    }
    /// Parameters of `shared_gate.wgsl`.
    SharedGate { h4: u32, first: u32, count: u32 }
    /// Parameters of `expert_down.wgsl`.
    ExpertDown {
        i4: u32, h4: u32, w_units: u32, w_stride: u32, first_tile: u32, has_bias: u32,
        first_expert: u32, experts: u32, scale: f32,
    }
    /// Parameters of `argmax.wgsl`.
    Argmax { vocab: u32, stride: u32 }
    /// Parameters of `sample.wgsl`.
    Sample { vocab: u32, stride: u32 }
    /// Parameters of `probe.wgsl`.
    Probe { rounds: u32, factor: f32, bytes: u32 }
    /// Parameters of `matrix_probe.wgsl`.
    MatrixProbe { rounds: u32, subgroups_at: u32 }
}

/// What `router.wgsl` makes of the products (its `score`).
pub mod score {
    /// Softmax over all experts, then top-k.
    pub const SOFTMAX: u32 = 0;
    /// Top-k, then softmax over the chosen.
    pub const SOFTMAX_OF_CHOSEN: u32 = 1;
    /// A sigmoid each.
    pub const SIGMOID: u32 = 2;
    /// phimoe's sparsemixer.
    pub const SPARSEMIXER: u32 = 3;
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

/// How a row's token is drawn, as `sample.wgsl` has it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default, Pod, Zeroable)]
pub struct Draw {
    /// `log2(e) / temperature`, finite; 0: nothing is drawn.
    pub scale: f32,
    /// So many of the likeliest tokens; 0: all.
    pub top_k: u32,
    /// 2^24ths of the likelihood that the likeliest tokens have together, 1 at least; 2^24: all.
    pub top_p: u32,
    /// 2^30ths of the likeliest token's likelihood, 2^30 at most.
    pub min_p: u32,
    /// The random number in 2^32nds of 1.
    pub unit: u32,
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
