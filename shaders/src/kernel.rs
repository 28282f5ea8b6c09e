//! The list of kernels and their variants.

/// A kernel; its text is `wgsl/{name}.wgsl`, its twin `src/reference/{name}.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// Token and position embeddings.
    Embed,
    /// LayerNorm or RMSNorm of whole rows.
    Norm,
    /// Matrix product with optional bias, scale and residual.
    Linear,
    /// RMSNorm of parts of rows, in place.
    PartNorm,
    /// Rotary positions, in place.
    Rope,
    /// Keys and values into the paged cache.
    KvAppend,
    /// Causal attention over the paged cache.
    Attention,
    /// Scores of the experts, top-k and weights.
    Router,
    /// Count, scan and permute of (token, expert) pairs.
    ExpertPermute,
    /// First matrix of the chosen experts, with activation.
    ExpertUp,
    /// How much of its shared expert a token takes.
    SharedGate,
    /// Second matrix of the chosen experts, weighted by the router.
    ExpertDown,
    /// Residual plus the partials of a token.
    Combine,
    /// Greedy choice of the next token.
    Argmax,
}

/// What a kernel is specialised by besides `override` numbers. Variants that differ in
/// `tile8` or `wide` alone give equal bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Variant {
    /// A lane works on eight rows at once instead of one (matrix kernels only; others ignore it).
    pub tile8: bool,
    /// What stands between an expert's matrices (`expert_up` only; others ignore it).
    pub activation: Activation,
    /// Weights lie in f16 (kernels of matrices only; others ignore it).
    pub half: bool,
    /// Values of up to 512 columns a head instead of 256 (`attention` only; others ignore it).
    pub wide: bool,
}

/// What stands between the matrices of an expert or of a dense FFN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Activation {
    /// GELU in its tanh form: one matrix before it.
    #[default]
    Gelu,
    /// `silu(gate) * up`: two matrices.
    SwiGlu,
    /// gpt_oss's GLU with clamped inputs: two matrices.
    ClampedGlu,
}

impl Activation {
    /// Matrices before it.
    pub fn matrices(self) -> usize {
        if self == Activation::Gelu { 1 } else { 2 }
    }
}

impl Variant {
    /// Rows that a lane of a matrix kernel works on at once.
    pub fn tile_rows(self) -> usize {
        if self.tile8 { 8 } else { 1 }
    }

    /// What is left of it where `kernel` differs.
    pub fn of(self, kernel: Kernel) -> Self {
        Self {
            tile8: self.tile8 && kernel.is_tiled(),
            activation: if kernel == Kernel::ExpertUp { self.activation } else { Activation::default() },
            half: self.half && kernel.has_weights(),
            wide: self.wide && kernel == Kernel::Attention,
        }
    }
}

impl Kernel {
    /// Every kernel, in the order in which a decode step runs them.
    pub const ALL: [Kernel; 14] = [
        Kernel::Embed,
        Kernel::Norm,
        Kernel::Linear,
        Kernel::PartNorm,
        Kernel::Rope,
        Kernel::KvAppend,
        Kernel::Attention,
        Kernel::Router,
        Kernel::ExpertPermute,
        Kernel::ExpertUp,
        Kernel::SharedGate,
        Kernel::ExpertDown,
        Kernel::Combine,
        Kernel::Argmax,
    ];

    /// The kernel's name, which is also its file's.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Embed => "embed",
            Kernel::Norm => "norm",
            Kernel::Linear => "linear",
            Kernel::PartNorm => "part_norm",
            Kernel::Rope => "rope",
            Kernel::KvAppend => "kv_append",
            Kernel::Attention => "attention",
            Kernel::Router => "router",
            Kernel::ExpertPermute => "expert_permute",
            Kernel::ExpertUp => "expert_up",
            Kernel::SharedGate => "shared_gate",
            Kernel::ExpertDown => "expert_down",
            Kernel::Combine => "combine",
            Kernel::Argmax => "argmax",
        }
    }

    /// Whether the kernel has a variant for eight rows a lane.
    pub fn is_tiled(self) -> bool {
        matches!(self, Kernel::Linear | Kernel::ExpertPermute | Kernel::ExpertUp | Kernel::ExpertDown)
    }

    /// Whether the kernel reads a matrix that may lie in f16.
    pub fn has_weights(self) -> bool {
        self.is_tiled() && self != Kernel::ExpertPermute
    }

    /// Whether the tiled variant forms the same sums as the plain one, bit for bit.
    pub fn sums_in_tiles(self) -> bool {
        self.has_weights()
    }

    /// The variants that differ for this kernel; those that differ in `tile8` alone follow each other.
    pub fn variants(self) -> Vec<Variant> {
        let mut variants = vec![Variant::default()];
        if self == Kernel::ExpertUp {
            let of = |activation| Variant { activation, ..Variant::default() };
            variants.extend([Activation::SwiGlu, Activation::ClampedGlu].map(of));
        }
        if self == Kernel::Attention {
            variants.push(Variant { wide: true, ..Variant::default() });
        }
        if self.has_weights() {
            variants = variants.into_iter().flat_map(|v| [v, Variant { half: true, ..v }]).collect();
        }
        if self.is_tiled() {
            variants = variants.into_iter().flat_map(|v| [v, Variant { tile8: true, ..v }]).collect();
        }
        variants
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
                | Kernel::Rope
                | Kernel::SharedGate
                | Kernel::Combine
        )
    }

    pub(crate) fn source(self) -> &'static str {
        match self {
            Kernel::Embed => include_str!("../wgsl/embed.wgsl"),
            Kernel::Norm => include_str!("../wgsl/norm.wgsl"),
            Kernel::Linear => include_str!("../wgsl/linear.wgsl"),
            Kernel::PartNorm => include_str!("../wgsl/part_norm.wgsl"),
            Kernel::Rope => include_str!("../wgsl/rope.wgsl"),
            Kernel::KvAppend => include_str!("../wgsl/kv_append.wgsl"),
            Kernel::Attention => include_str!("../wgsl/attention.wgsl"),
            Kernel::Router => include_str!("../wgsl/router.wgsl"),
            Kernel::ExpertPermute => include_str!("../wgsl/expert_permute.wgsl"),
            Kernel::ExpertUp => include_str!("../wgsl/expert_up.wgsl"),
            Kernel::SharedGate => include_str!("../wgsl/shared_gate.wgsl"),
            Kernel::ExpertDown => include_str!("../wgsl/expert_down.wgsl"),
            Kernel::Combine => include_str!("../wgsl/combine.wgsl"),
            Kernel::Argmax => include_str!("../wgsl/argmax.wgsl"),
        }
    }
}

/// Texts that kernels import, by name under `shared/`.
pub(crate) const SHARED: [(&str, &str); 4] = [
    ("weight", include_str!("../wgsl/shared/weight.wgsl")),
    ("tile", include_str!("../wgsl/shared/tile.wgsl")),
    ("activation", include_str!("../wgsl/shared/activation.wgsl")),
    ("pair", include_str!("../wgsl/shared/pair.wgsl")),
];
