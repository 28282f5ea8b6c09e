//! The list of kernels, and which of their variants there are.

use crate::Cache;
use crate::variant::{Activation, Columns, Cooperative, RowTile, Rows, Values, Variant, Weights};

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

    /// Whether the kernel has variants for matrix units.
    pub fn is_cooperative(self) -> bool {
        self.has_weights()
    }

    /// Whether a binding may be a texture instead of a buffer.
    pub fn takes_textures(self) -> bool {
        self.has_weights()
            || matches!(self, Kernel::Embed | Kernel::Place | Kernel::Attention | Kernel::Router)
    }

    /// Whether lanes may hand each other what they have.
    pub fn hands_over(self) -> bool {
        self.has_weights()
            || matches!(
                self,
                Kernel::Norm | Kernel::Router | Kernel::Place | Kernel::Attention | Kernel::Argmax
            )
    }

    /// Whether the kernel reads a matrix that may lie in another type than f32.
    pub fn has_weights(self) -> bool {
        self.is_tiled() && self != Kernel::ExpertPermute
    }

    /// Whether variants with tiles, subgroups or textures form the same sums as the plain one, bit for bit.
    pub fn sums_alike(self) -> bool {
        self.takes_textures() || self.hands_over()
    }

    /// The variants of this kernel that are worth telling apart; those that differ in `tile`, `columns`, `subgroup` and
    /// `image` alone follow each other, the plain one first.
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
            // One row on a CPU.
            let three = Variant { columns: Columns::Three, ..with(RowTile::One, true, true) };
            let three = (base.rows == Rows::F32).then_some(three);
            let without = (base == plain).then_some(with(RowTile::Eight, false, false));
            // What bytes make as f32 besides.
            let floats = RowTile::ALL.iter().map(move |&tile| with(tile, true, true));
            let floats =
                floats.chain([with(RowTile::Eight, false, false)]).filter(move |_| base.rows == Rows::Bytes);
            let floats = floats.map(|v| Variant { rows: Rows::BytesAsF32, ..v });
            std::iter::once(base).chain(all).chain(three).chain(buffers).chain(without).chain(floats)
        };
        let tiles = |base: Variant| {
            let of_groups = [RowTile::ThirtyTwo, RowTile::SixtyFour];
            RowTile::ALL.into_iter().chain(of_groups).map(move |tile| Variant { tile, ..base })
        };
        match self {
            _ if self.has_weights() => {
                bases.into_iter().flat_map(alike).chain(self.cooperative_variants()).collect()
            }
            _ if self.is_tiled() => bases.into_iter().flat_map(tiles).collect(),
            Kernel::Embed => vec![plain, Variant { image: true, ..plain }],
            Kernel::MatrixProbe => {
                [RowTile::Eight, RowTile::Sixteen].map(|tile| Variant { tile, ..plain }).into()
            }
            Kernel::Norm | Kernel::Argmax => vec![plain, Variant { subgroup: true, ..plain }],
            Kernel::Router => {
                let of = |subgroup, image| Variant { subgroup, image, ..plain };
                vec![plain, of(true, false), of(false, true), of(true, true)]
            }
            _ => bases,
        }
    }

    /// Those on matrix units, of which those that differ in tile and texture alone follow each other.
    fn cooperative_variants(self) -> Vec<Variant> {
        let activations: &[Activation] = match self {
            Kernel::ExpertUp => &[Activation::Gelu, Activation::SwiGlu, Activation::ClampedGlu],
            _ => &[Activation::Gelu],
        };
        let mut all = Vec::new();
        for cooperative in [Cooperative::Eight, Cooperative::Sixteen] {
            for (weights, &activation) in Weights::ALL
                .into_iter()
                .flat_map(|weights| activations.iter().map(move |activation| (weights, activation)))
            {
                for tile in cooperative.tiles().into_iter().flatten() {
                    let with = |image| Variant {
                        cooperative,
                        weights,
                        activation,
                        tile,
                        image,
                        ..Variant::default()
                    };
                    all.extend([with(false), with(true)]);
                }
            }
        }
        all
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
pub(crate) const SHARED: [(&str, &str); 12] = [
    ("weight", include_str!("../wgsl/shared/weight.wgsl")),
    ("texel", include_str!("../wgsl/shared/texel.wgsl")),
    ("matrix", include_str!("../wgsl/shared/matrix.wgsl")),
    ("cached", include_str!("../wgsl/shared/cached.wgsl")),
    ("product", include_str!("../wgsl/shared/product.wgsl")),
    ("dot", include_str!("../wgsl/shared/dot.wgsl")),
    ("cooperative", include_str!("../wgsl/shared/cooperative.wgsl")),
    ("tile", include_str!("../wgsl/shared/tile.wgsl")),
    ("activation", include_str!("../wgsl/shared/activation.wgsl")),
    ("split", include_str!("../wgsl/shared/split.wgsl")),
    ("row", include_str!("../wgsl/shared/row.wgsl")),
    ("pair", include_str!("../wgsl/shared/pair.wgsl")),
];
