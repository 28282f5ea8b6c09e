//! The list of kernels and their variants.

use crate::Cache;

/// A kernel; its text is `wgsl/{name}.wgsl`, its twin `src/reference/{name}.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// Token and position embeddings.
    Embed,
    /// LayerNorm or RMSNorm of whole rows, after residual and partials of a token were added where they are to be.
    Norm,
    /// Matrix product with optional bias, scale and residual.
    Linear,
    /// RMSNorm of parts of rows, in place.
    PartNorm,
    /// Clamps rows, in place; no part of a step: how fast an adapter passes over a buffer.
    Clip,
    /// Norm, clamp and rotary positions of queries and keys in place, keys and values into the paged cache.
    Place,
    /// Causal attention over the paged cache.
    Attention,
    /// Splits of a context, attended to one by one, merged.
    AttentionMerge,
    /// Norm, scores of the experts, top-k and weights; of a single token also its pairs.
    Router,
    /// Count, scan and permute of (token, expert) pairs.
    ExpertPermute,
    /// First matrix of the chosen experts, with activation.
    ExpertUp,
    /// How much of its shared expert a token takes.
    SharedGate,
    /// Second matrix of the chosen experts, weighted by the router.
    ExpertDown,
    /// Greedy choice of the next token.
    Argmax,
    /// A drawn next token.
    Sample,
    /// What the adapter's arithmetic allows; no part of a step.
    Probe,
    /// What its matrix units allow, with [`RowTile::Eight`] or [`RowTile::Sixteen`] rows and columns; no part of a step.
    MatrixProbe,
}

/// What a kernel is specialised by besides `override` numbers. Variants that differ in
/// `tile`, `subgroup`, `image` or `values` alone give equal bits, and so do both kinds of rows in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Variant {
    /// Rows that a lane works on at once (matrix kernels only; others ignore it).
    pub tile: RowTile,
    /// What stands between an expert's matrices (`expert_up` only; others ignore it).
    pub activation: Activation,
    /// How weights lie (kernels of matrices only; others ignore it).
    pub weights: Weights,
    /// How many columns the values of a head have at most (`attention` only; others ignore it).
    pub values: Values,
    /// The rows are queries, keys and values, of which the last two go into the cache besides (`linear` only; others
    /// ignore it).
    pub keeps: bool,
    /// A workgroup for each split of a context, for [`Kernel::AttentionMerge`] to merge (`attention` only; others ignore it).
    pub split: bool,
    /// How the cache holds keys and values (`place`, `attention` and a `linear` that keeps only; others ignore it).
    pub cache: Cache,
    /// Lanes hand each other what they loaded or summed, in subgroups of eight or more (`norm`, `router`, `place`, `attention`
    /// and matrix kernels; others ignore it).
    pub subgroup: bool,
    /// What products are of (matrix kernels whose weights share scales; others ignore it).
    pub rows: Rows,
    /// The matrix, or the cache, is a texture (matrix kernels, `embed`, `place`, `attention`; others ignore it).
    pub image: bool,
}

/// How many rows a lane of a matrix kernel works on at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum RowTile {
    /// 1.
    #[default]
    One,
    /// 2.
    Two,
    /// 4.
    Four,
    /// 8.
    Eight,
    /// 16.
    Sixteen,
}

impl RowTile {
    /// Every size.
    pub const ALL: [RowTile; 5] = [Self::One, Self::Two, Self::Four, Self::Eight, Self::Sixteen];

    /// How many.
    pub fn rows(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Four => 4,
            Self::Eight => 8,
            Self::Sixteen => 16,
        }
    }
}

/// How many columns the values of a head have at most: so many fit into the registers of `attention.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Values {
    /// 32 with subgroups, as [`Values::Usual`] without.
    Slim,
    /// 64 with subgroups, as [`Values::Usual`] without.
    Narrow,
    /// 128, as most models have it.
    Usual,
    /// 256.
    #[default]
    Medium,
    /// 512.
    Wide,
}

impl Values {
    /// The least that holds `columns`.
    pub fn of(columns: usize) -> Self {
        match columns {
            0..=32 => Self::Slim,
            33..=64 => Self::Narrow,
            65..=128 => Self::Usual,
            129..=256 => Self::Medium,
            _ => Self::Wide,
        }
    }
}

/// How a matrix lies in its buffer (`shared/weight.wgsl`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Weights {
    /// 4 bytes a weight.
    #[default]
    F32,
    /// 2 bytes a weight.
    F16,
    /// A byte a weight, and an f16 scale for 32 of them.
    Q8,
    /// Half a byte a weight, and an f16 scale for 32 of them.
    Q4,
    /// MXFP4: a number of four bits (E2M1) a weight, and a power of two for 32 of them, here a bf16.
    Mx4,
}

impl Weights {
    /// Every way.
    pub const ALL: [Weights; 5] = [Self::F32, Self::F16, Self::Q8, Self::Q4, Self::Mx4];

    /// Weights in a unit of 16 bytes.
    pub fn per_unit(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 8,
            Self::Q8 => 16,
            Self::Q4 | Self::Mx4 => 32,
        }
    }

    /// Whether 32 weights share a scale.
    pub fn has_scales(self) -> bool {
        matches!(self, Self::Q8 | Self::Q4 | Self::Mx4)
    }

    /// Units that hold the weights of a row of `columns` columns, and units from a row to the next: behind the
    /// weights stand eight scales a unit.
    pub fn units(self, columns: usize) -> (usize, usize) {
        let blocks = columns.div_ceil(WEIGHT_BLOCK);
        let units = blocks * WEIGHT_BLOCK / self.per_unit();
        (units, units + if self.has_scales() { blocks.div_ceil(8) } else { 0 })
    }
}

/// What the rows of a product are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Rows {
    /// As they come.
    #[default]
    F32,
    /// Rounded to bytes, 32 columns to a scale, which are multiplied four at a time.
    Bytes,
    /// Rounded in the same way and multiplied as f32: the same bits.
    BytesAsF32,
}

/// Weights that share a scale, and up to which rows are padded.
pub const WEIGHT_BLOCK: usize = 32;

/// Units in a row of a texture that holds a matrix.
pub const IMAGE_WIDTH: usize = 1 << 14;

/// vec4s of columns that a lane of a matrix kernel makes.
pub const LANE_COLUMNS4: usize = 2;

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
        self.tile.rows()
    }

    /// What is left of it where `kernel` differs.
    pub fn of(self, kernel: Kernel) -> Self {
        let tile = if kernel.is_tiled() || kernel.needs_matrix_units() { self.tile } else { RowTile::One };
        let rounds = kernel.has_weights() && self.weights.has_scales();
        Self {
            tile,
            rows: if rounds { self.rows } else { Rows::F32 },
            activation: if kernel == Kernel::ExpertUp { self.activation } else { Activation::default() },
            weights: match kernel {
                Kernel::Probe if self.weights == Weights::Q8 => Weights::Q8,
                _ if kernel.has_weights() => self.weights,
                _ => Weights::F32,
            },
            values: if kernel == Kernel::Attention { self.values } else { Values::default() },
            cache: match kernel {
                Kernel::Place | Kernel::Attention => self.cache,
                Kernel::Linear if self.keeps => self.cache,
                _ => Cache::F32,
            },
            keeps: self.keeps && kernel == Kernel::Linear,
            split: self.split && kernel == Kernel::Attention,
            subgroup: self.subgroup && kernel.hands_over(),
            image: self.image && kernel.takes_textures(),
        }
    }

    /// vec4s of k that a turn of a matrix kernel's loop takes: what lanes load at once, whole units, and a whole block
    /// where it shares a scale.
    pub(crate) fn turn4(&self) -> usize {
        let parts = if self.subgroup { 8usize.div_ceil(self.tile_rows()) } else { 1 };
        if self.weights.has_scales() { WEIGHT_BLOCK / 4 } else { parts.max(self.weights.per_unit() / 4) }
    }
}

impl Kernel {
    /// Every kernel, in the order in which a decode step runs them; those of no step last.
    pub const ALL: [Kernel; 17] = [
        Kernel::Embed,
        Kernel::Norm,
        Kernel::Linear,
        Kernel::PartNorm,
        Kernel::Place,
        Kernel::Attention,
        Kernel::AttentionMerge,
        Kernel::Router,
        Kernel::ExpertPermute,
        Kernel::ExpertUp,
        Kernel::SharedGate,
        Kernel::ExpertDown,
        Kernel::Argmax,
        Kernel::Sample,
        Kernel::Clip,
        Kernel::Probe,
        Kernel::MatrixProbe,
    ];

    /// The kernel's name, which is also its file's.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Embed => "embed",
            Kernel::Norm => "norm",
            Kernel::Linear => "linear",
            Kernel::PartNorm => "part_norm",
            Kernel::Clip => "clip",
            Kernel::Place => "place",
            Kernel::Attention => "attention",
            Kernel::AttentionMerge => "attention_merge",
            Kernel::Router => "router",
            Kernel::ExpertPermute => "expert_permute",
            Kernel::ExpertUp => "expert_up",
            Kernel::SharedGate => "shared_gate",
            Kernel::ExpertDown => "expert_down",
            Kernel::Argmax => "argmax",
            Kernel::Sample => "sample",
            Kernel::Probe => "probe",
            Kernel::MatrixProbe => "matrix_probe",
        }
    }

    /// Whether the kernel has variants for several rows a lane.
    pub fn is_tiled(self) -> bool {
        matches!(self, Kernel::Linear | Kernel::ExpertPermute | Kernel::ExpertUp | Kernel::ExpertDown)
    }

    /// Whether the kernel multiplies whole matrices: few adapters, and back ends for Vulkan and Metal alone, can.
    pub fn needs_matrix_units(self) -> bool {
        self == Kernel::MatrixProbe
    }

    /// Whether a binding may be a texture instead of a buffer.
    pub fn takes_textures(self) -> bool {
        self.has_weights() || matches!(self, Kernel::Embed | Kernel::Place | Kernel::Attention)
    }

    /// Whether lanes may hand each other what they have.
    pub fn hands_over(self) -> bool {
        self.has_weights()
            || matches!(self, Kernel::Norm | Kernel::Router | Kernel::Place | Kernel::Attention)
    }

    /// Whether the kernel reads a matrix that may lie in another type than f32.
    pub fn has_weights(self) -> bool {
        self.is_tiled() && self != Kernel::ExpertPermute
    }

    /// Whether variants with tiles, subgroups or textures form the same sums as the plain one, bit for bit.
    pub fn sums_alike(self) -> bool {
        self.takes_textures() || self.hands_over()
    }

    /// The variants of this kernel that are worth telling apart; those that differ in `tile`, `subgroup` and `image`
    /// alone follow each other, the plain one first.
    pub fn variants(self) -> Vec<Variant> {
        let plain = Variant::default();
        let mut bases = vec![plain];
        if self == Kernel::ExpertUp {
            let of = |activation| Variant { activation, ..plain };
            bases.extend([Activation::SwiGlu, Activation::ClampedGlu].map(of));
        }
        if self == Kernel::Attention {
            let wide = Variant { values: Values::Wide, ..plain };
            let with = |v: Variant| Variant { subgroup: true, ..v };
            let cpu = |v: Variant| Variant { image: true, ..with(v) };
            let usual = Variant { values: Values::Usual, ..plain };
            let [slim, narrow] =
                [Values::Slim, Values::Narrow].map(|values| cpu(Variant { values, ..plain }));
            bases.extend([with(plain), cpu(plain), slim, narrow]);
            bases.extend([usual, with(usual), cpu(usual), wide, with(wide), cpu(wide)]);
            for cache in [Cache::F16, Cache::Q8] {
                let of = [plain, cpu(plain), slim, narrow, usual, cpu(usual), wide, cpu(wide)];
                bases.extend(of.map(|v| Variant { cache, ..v }));
            }
            // Each behind the one that does the same in one launch.
            bases = bases.into_iter().flat_map(|v| [v, Variant { split: true, ..v }]).collect();
        }
        if self == Kernel::Place {
            let subgroup = Variant { subgroup: true, ..plain };
            let of = |cache| {
                [plain, subgroup, Variant { image: true, ..subgroup }].map(|v| Variant { cache, ..v })
            };
            bases = Cache::ALL.into_iter().flat_map(of).collect();
        }
        if self == Kernel::Probe {
            bases.push(Variant { weights: Weights::Q8, ..plain });
        }
        if self.has_weights() {
            bases.extend(Weights::ALL[1..].iter().map(|&weights| Variant { weights, ..plain }));
            let scaled = Weights::ALL.into_iter().filter(|weights| weights.has_scales());
            bases.extend(scaled.map(|weights| Variant { weights, rows: Rows::Bytes, ..plain }));
        }
        if self == Kernel::Linear {
            let keeps = Variant { keeps: true, ..plain };
            bases.extend([
                keeps,
                Variant { cache: Cache::F16, weights: Weights::F16, ..keeps },
                Variant { weights: Weights::Q8, rows: Rows::Bytes, ..keeps },
            ]);
        }
        // What CPUs run comes whole; of what others run, one type of weights stands for the rest where tiles are
        // concerned, and one tile where types are.
        let alike = |base: Variant| {
            let with = move |tile, subgroup, image| Variant { tile, subgroup, image, ..base };
            let all = RowTile::ALL.iter().map(move |&tile| with(tile, true, true));
            let buffers = RowTile::ALL
                .iter()
                .filter(move |&&tile| base == plain || tile == RowTile::Eight)
                .map(move |&tile| with(tile, true, false));
            let without = (base == plain).then_some(with(RowTile::Eight, false, false));
            // What bytes make as f32 besides.
            let floats = RowTile::ALL.iter().map(move |&tile| with(tile, true, true));
            let floats =
                floats.chain([with(RowTile::Eight, false, false)]).filter(move |_| base.rows == Rows::Bytes);
            let floats = floats.map(|v| Variant { rows: Rows::BytesAsF32, ..v });
            std::iter::once(base).chain(all).chain(buffers).chain(without).chain(floats)
        };
        let tiles = |base: Variant| RowTile::ALL.iter().map(move |&tile| Variant { tile, ..base });
        match self {
            _ if self.has_weights() => bases.into_iter().flat_map(alike).collect(),
            _ if self.is_tiled() => bases.into_iter().flat_map(tiles).collect(),
            Kernel::Embed => vec![plain, Variant { image: true, ..plain }],
            Kernel::MatrixProbe => {
                [RowTile::Eight, RowTile::Sixteen].map(|tile| Variant { tile, ..plain }).into()
            }
            Kernel::Norm | Kernel::Router => vec![plain, Variant { subgroup: true, ..plain }],
            _ => bases,
        }
    }

    /// Whether `override WORKGROUP` sets the kernel's workgroup size; the others fix it, as their order of
    /// summation depends on it.
    pub fn has_workgroup_override(self) -> bool {
        matches!(
            self,
            Kernel::Embed
                | Kernel::Linear
                | Kernel::ExpertUp
                | Kernel::ExpertDown
                | Kernel::Clip
                | Kernel::SharedGate
                | Kernel::Probe
                | Kernel::MatrixProbe
        )
    }

    pub(crate) fn source(self) -> &'static str {
        match self {
            Kernel::Embed => include_str!("../wgsl/embed.wgsl"),
            Kernel::Norm => include_str!("../wgsl/norm.wgsl"),
            Kernel::Linear => include_str!("../wgsl/linear.wgsl"),
            Kernel::PartNorm => include_str!("../wgsl/part_norm.wgsl"),
            Kernel::Clip => include_str!("../wgsl/clip.wgsl"),
            Kernel::Place => include_str!("../wgsl/place.wgsl"),
            Kernel::Attention => include_str!("../wgsl/attention.wgsl"),
            Kernel::AttentionMerge => include_str!("../wgsl/attention_merge.wgsl"),
            Kernel::Router => include_str!("../wgsl/router.wgsl"),
            Kernel::ExpertPermute => include_str!("../wgsl/expert_permute.wgsl"),
            Kernel::ExpertUp => include_str!("../wgsl/expert_up.wgsl"),
            Kernel::SharedGate => include_str!("../wgsl/shared_gate.wgsl"),
            Kernel::ExpertDown => include_str!("../wgsl/expert_down.wgsl"),
            Kernel::Argmax => include_str!("../wgsl/argmax.wgsl"),
            Kernel::Sample => include_str!("../wgsl/sample.wgsl"),
            Kernel::Probe => include_str!("../wgsl/probe.wgsl"),
            Kernel::MatrixProbe => include_str!("../wgsl/matrix_probe.wgsl"),
        }
    }
}

/// Every text that kernels are made of, always in the same order: what is known of them holds as long as these are the same.
pub fn texts() -> impl Iterator<Item = &'static str> {
    Kernel::ALL.into_iter().map(Kernel::source).chain(SHARED.map(|(_, text)| text))
}

/// Texts that kernels import, by name under `shared/`.
pub(crate) const SHARED: [(&str, &str); 10] = [
    ("weight", include_str!("../wgsl/shared/weight.wgsl")),
    ("matrix", include_str!("../wgsl/shared/matrix.wgsl")),
    ("cached", include_str!("../wgsl/shared/cached.wgsl")),
    ("product", include_str!("../wgsl/shared/product.wgsl")),
    ("dot", include_str!("../wgsl/shared/dot.wgsl")),
    ("tile", include_str!("../wgsl/shared/tile.wgsl")),
    ("activation", include_str!("../wgsl/shared/activation.wgsl")),
    ("split", include_str!("../wgsl/shared/split.wgsl")),
    ("row", include_str!("../wgsl/shared/row.wgsl")),
    ("pair", include_str!("../wgsl/shared/pair.wgsl")),
];
