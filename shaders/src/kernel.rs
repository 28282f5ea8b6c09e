//! The list of kernels and their variants.

/// A kernel; its text is `wgsl/{name}.wgsl`, its twin `src/reference/{name}.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// Token and position embeddings.
    Embed,
    /// LayerNorm with weight and bias.
    LayerNorm,
    /// Matrix product with optional bias and residual.
    Linear,
    /// Keys and values into the paged cache.
    KvAppend,
    /// Causal attention over the paged cache.
    Attention,
    /// Softmax router with top-k.
    Router,
    /// Count, scan and permute of (token, expert) pairs.
    ExpertPermute,
    /// First matrix of the chosen experts, with activation.
    ExpertUp,
    /// Second matrix of the chosen experts, weighted by the router.
    ExpertDown,
    /// Residual plus the partials of a token.
    Combine,
    /// Greedy choice of the next token.
    Argmax,
}

/// What a kernel is specialised by besides `override` numbers. All variants of a kernel give equal bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Variant {
    /// A lane works on eight rows at once instead of one (matrix kernels only; others ignore it).
    pub tile8: bool,
}

impl Variant {
    /// Rows that a lane of a matrix kernel works on at once.
    pub fn tile_rows(self) -> usize {
        if self.tile8 { 8 } else { 1 }
    }
}

impl Kernel {
    /// Every kernel, in the order in which a decode step runs them.
    pub const ALL: [Kernel; 11] = [
        Kernel::Embed,
        Kernel::LayerNorm,
        Kernel::Linear,
        Kernel::KvAppend,
        Kernel::Attention,
        Kernel::Router,
        Kernel::ExpertPermute,
        Kernel::ExpertUp,
        Kernel::ExpertDown,
        Kernel::Combine,
        Kernel::Argmax,
    ];

    /// The kernel's name, which is also its file's.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Embed => "embed",
            Kernel::LayerNorm => "layer_norm",
            Kernel::Linear => "linear",
            Kernel::KvAppend => "kv_append",
            Kernel::Attention => "attention",
            Kernel::Router => "router",
            Kernel::ExpertPermute => "expert_permute",
            Kernel::ExpertUp => "expert_up",
            Kernel::ExpertDown => "expert_down",
            Kernel::Combine => "combine",
            Kernel::Argmax => "argmax",
        }
    }

    /// Whether the kernel has a variant for eight rows a lane.
    pub fn is_tiled(self) -> bool {
        matches!(self, Kernel::Linear | Kernel::ExpertPermute | Kernel::ExpertUp | Kernel::ExpertDown)
    }

    /// Whether the tiled variant forms the same sums as the plain one, bit for bit.
    pub fn sums_in_tiles(self) -> bool {
        self.is_tiled() && self != Kernel::ExpertPermute
    }

    /// The variants that differ for this kernel.
    pub fn variants(self) -> &'static [Variant] {
        const PLAIN: Variant = Variant { tile8: false };
        const TILED: Variant = Variant { tile8: true };
        if self.is_tiled() { &[PLAIN, TILED] } else { &[PLAIN] }
    }

    /// Whether `override WORKGROUP` sets the kernel's workgroup size; the others fix it, as their order of
    /// summation depends on it.
    pub fn has_workgroup_override(self) -> bool {
        matches!(
            self,
            Kernel::Embed
                | Kernel::Linear
                | Kernel::KvAppend
                | Kernel::ExpertUp
                | Kernel::ExpertDown
                | Kernel::Combine
        )
    }

    pub(crate) fn source(self) -> &'static str {
        match self {
            Kernel::Embed => include_str!("../wgsl/embed.wgsl"),
            Kernel::LayerNorm => include_str!("../wgsl/layer_norm.wgsl"),
            Kernel::Linear => include_str!("../wgsl/linear.wgsl"),
            Kernel::KvAppend => include_str!("../wgsl/kv_append.wgsl"),
            Kernel::Attention => include_str!("../wgsl/attention.wgsl"),
            Kernel::Router => include_str!("../wgsl/router.wgsl"),
            Kernel::ExpertPermute => include_str!("../wgsl/expert_permute.wgsl"),
            Kernel::ExpertUp => include_str!("../wgsl/expert_up.wgsl"),
            Kernel::ExpertDown => include_str!("../wgsl/expert_down.wgsl"),
            Kernel::Combine => include_str!("../wgsl/combine.wgsl"),
            Kernel::Argmax => include_str!("../wgsl/argmax.wgsl"),
        }
    }
}

/// Texts that kernels import, by name under `shared/`.
pub(crate) const SHARED: [(&str, &str); 3] = [
    ("tile", include_str!("../wgsl/shared/tile.wgsl")),
    ("activation", include_str!("../wgsl/shared/activation.wgsl")),
    ("pair", include_str!("../wgsl/shared/pair.wgsl")),
];
