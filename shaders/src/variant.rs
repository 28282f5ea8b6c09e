//! What a kernel is specialised by.

use crate::{Cache, Kernel};

/// What a kernel is specialised by besides `override` numbers. Variants that differ in
/// `tile`, `columns`, `subgroup`, `image` or `values` alone give equal bits, and so do both kinds of rows in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Variant {
    /// Rows that a lane works on at once (matrix kernels only; others ignore it).
    pub tile: RowTile,
    /// How many vec4s of columns a lane makes (matrix kernels with a tile of one row of f32 only; others ignore it). A `linear` that
    /// keeps and turns has to have two: both halves of a pair.
    pub columns: Columns,
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
    /// What products are of (matrix kernels whose weights share scales, where lanes multiply; others ignore it).
    pub rows: Rows,
    /// The matrix, or the cache, is a texture (matrix kernels, `embed`, `place`, `attention`; others ignore it).
    pub image: bool,
    /// Whether products are made on matrix units, and by which (matrix kernels; others ignore it).
    pub cooperative: Cooperative,
}

/// What multiplies in a matrix kernel. On matrix units sums have an order of their own: the same bits in any batch, but others
/// than a lane's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Cooperative {
    /// Each lane for itself.
    #[default]
    No,
    /// Matrix units, 8 rows and columns at a time.
    Eight,
    /// Matrix units, 16 rows and columns at a time.
    Sixteen,
}

impl Cooperative {
    /// Those that multiply so many rows and columns of f16 at a time and add in f32.
    pub fn of_side(side: usize) -> Self {
        match side {
            8 => Self::Eight,
            16 => Self::Sixteen,
            _ => Self::No,
        }
    }

    /// Rows and columns of the matrices that they multiply.
    pub fn side(self) -> Option<usize> {
        match self {
            Self::No => None,
            Self::Eight => Some(8),
            Self::Sixteen => Some(16),
        }
    }

    /// The tiles that a workgroup makes: of few rows, and of many.
    pub fn tiles(self) -> Option<[RowTile; 2]> {
        match self {
            Self::No => None,
            Self::Eight => Some([RowTile::Eight, RowTile::ThirtyTwo]),
            Self::Sixteen => Some([RowTile::Sixteen, RowTile::SixtyFour]),
        }
    }
}

/// How many rows a lane of a matrix kernel works on at once; on matrix units, a workgroup.
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
    /// 32, of a workgroup alone.
    ThirtyTwo,
    /// 64, of a workgroup alone.
    SixtyFour,
}

impl RowTile {
    /// Every size of a lane's.
    pub const ALL: [RowTile; 5] = [Self::One, Self::Two, Self::Four, Self::Eight, Self::Sixteen];

    /// How many.
    pub fn rows(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Four => 4,
            Self::Eight => 8,
            Self::Sixteen => 16,
            Self::ThirtyTwo => 32,
            Self::SixtyFour => 64,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Columns {
    /// 2.
    #[default]
    Two,
    /// 3, of one row: where a matrix's columns fill such workgroups better, or fewer of them.
    Three,
}

impl Columns {
    /// How many.
    pub fn count(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Three => 3,
        }
    }
}

/// vec4s of columns that a workgroup makes on matrix units (`shared/cooperative.wgsl`).
const COOPERATIVE_COLUMNS4: usize = 16;

/// Subgroups of a workgroup that multiplies on matrix units (`shared/cooperative.wgsl`).
pub const COOPERATIVE_SUBGROUPS: u32 = 4;

/// Bytes of workgroup memory that kernels on matrix units take at most.
pub const COOPERATIVE_BYTES: u32 = 64 * 8 + 2 * 2 * 64 * 40 + 4 * 64 * 64;

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

    /// Rows and columns of the matrices that `kernel` has matrix units multiply: few adapters, and back ends for Vulkan and
    /// Metal alone, can.
    pub fn matrix_side(self, kernel: Kernel) -> Option<usize> {
        if kernel == Kernel::MatrixProbe { Some(self.tile_rows()) } else { self.cooperative.side() }
    }

    /// vec4s of columns that a workgroup of a matrix kernel makes, which has `lanes` lanes where those multiply.
    pub fn group_columns4(self, kernel: Kernel, lanes: usize) -> usize {
        let matrices = if kernel == Kernel::ExpertUp { self.activation.matrices() } else { 1 };
        if self.cooperative == Cooperative::No {
            lanes * self.columns.count()
        } else {
            COOPERATIVE_COLUMNS4 / matrices
        }
    }

    /// What is left of it where `kernel` differs.
    pub fn of(self, kernel: Kernel) -> Self {
        let tile = if kernel.is_tiled() || kernel == Kernel::MatrixProbe { self.tile } else { RowTile::One };
        let rounds = kernel.has_weights() && self.weights.has_scales();
        let cooperative = if kernel.is_cooperative() { self.cooperative } else { Cooperative::No };
        let alone = cooperative == Cooperative::No;
        let single = kernel.has_weights() && alone && tile == RowTile::One;
        Self {
            cooperative,
            tile,
            columns: match self.columns {
                Columns::Three if single && !(rounds && self.rows != Rows::F32) => Columns::Three,
                _ => Columns::Two,
            },
            rows: if rounds && alone { self.rows } else { Rows::F32 },
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
            subgroup: self.subgroup && kernel.hands_over() && alone,
            image: self.image && kernel.takes_textures(),
        }
    }

    /// vec4s of k that a turn of a matrix kernel's loop takes: what lanes load at once, whole units, and a whole block
    /// where it shares a scale; of four rows and more half a block, as the loop's code, 36 KB of four rows, is else more than a CPU's
    /// cache of instructions holds.
    pub(crate) fn turn4(&self) -> usize {
        let parts = if self.subgroup { 8usize.div_ceil(self.tile_rows()) } else { 1 };
        match self.weights.has_scales() {
            true if self.tile_rows() >= 4 => WEIGHT_BLOCK / 8,
            true => WEIGHT_BLOCK / 4,
            false => parts.max(self.weights.per_unit() / 4),
        }
    }
}
