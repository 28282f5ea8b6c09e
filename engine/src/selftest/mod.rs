//! Every kernel against its twin on the CPU, on the devices of this machine.

mod attention;
mod cooperative;
mod dense;
mod moe;

pub(crate) use cooperative::{open_fast, open_tried};

use crate::EngineError;
use crate::gpu::{Buffer, Gpu, Recording, devices};
use crate::weights::pack;
use bytemuck::Pod;
use exflow_shaders::params::Tile;
use exflow_shaders::{Cache, Columns, Cooperative, Kernel, RowTile, Rows, Variant, Weights};
use serde::Serialize;
use std::cell::RefCell;

/// One kernel at one shape on one adapter.
#[derive(Debug, Clone, Serialize)]
pub struct KernelCheck {
    /// The adapter's name.
    pub adapter: String,
    /// The kernel's name.
    pub kernel: String,
    /// Variant and shape.
    pub case: String,
    /// The largest difference from the twin, relative to the largest value (0 or 1 for integers).
    pub max_error: f64,
    /// What may differ.
    pub tolerance: f64,
    /// Whether it does not.
    pub passed: bool,
}

/// Runs every variant of every kernel at several shapes, compares it with its twin and the variants
/// that sum in tiles with the plain one bit by bit, on the adapters that `adapter` names (all: `None`) and
/// tells `sink` of each; returns whether all passed.
pub fn selftest(adapter: Option<&str>, sink: &mut dyn FnMut(&KernelCheck)) -> Result<bool, EngineError> {
    let wanted: Vec<String> = match adapter {
        Some(name) => vec![name.to_owned()],
        None => devices().iter().map(|d| d.index.to_string()).collect(),
    };
    if wanted.is_empty() {
        Gpu::open(None, 0)?; // says what to install
    }
    let mut all = true;
    for name in wanted {
        let bench = Bench::new(Gpu::open_with_matrix_units(Some(&name), 0)?);
        for kernel in Kernel::ALL {
            for rows in [1, 7, 64, 65] {
                let mut bits = None;
                for variant in kernel.variants() {
                    let mut check = bench.check(kernel, variant, rows)?;
                    let got = bench.last.take();
                    let plain = variant.tile == RowTile::One && variant.rows != Rows::BytesAsF32;
                    let first = variant.cooperative.tiles().is_some_and(|[few, _]| variant.tile == few);
                    if (plain || first) && !variant.subgroup && !variant.image && !variant.split {
                        bits = Some(got);
                    } else if kernel.sums_alike() && bits.as_ref() != Some(&got) {
                        (check.max_error, check.passed) = (f64::INFINITY, false);
                        check.case += ": bits differ from the plain variant's";
                    }
                    all &= check.passed;
                    sink(&check);
                }
            }
        }
    }
    Ok(all)
}

/// f32 sums of a few hundred terms, in another order or with another rounding of `exp`.
const TOLERANCE: f64 = 2e-5;

/// Of products on matrix units: factors are rounded to f16, to the nearest or, as some devices do, towards 0.
const HALF_TOLERANCE: f64 = 2e-3;

struct Bench {
    gpu: Gpu,
    /// What the last launch wrote, byte for byte.
    last: RefCell<Vec<u8>>,
}

/// A fixed stream of values in -1..1 (a linear congruential generator; quality is no matter here).
struct Values(u64);

impl Values {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }

    fn below(&mut self, limit: usize, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.next() % limit as u32).collect()
    }
}

/// Odd widths: 9 vec4s of 34 columns, 5 experts.
const H4: usize = 9;
const WIDTH: usize = 34;
const N4: usize = 19;
const EXPERTS: usize = 5;
const D4: usize = 3;
const H: usize = 4 * H4;
const N: usize = 4 * N4;

impl Bench {
    fn new(gpu: Gpu) -> Self {
        Self { gpu, last: RefCell::default() }
    }

    fn check(&self, kernel: Kernel, variant: Variant, rows: usize) -> Result<KernelCheck, EngineError> {
        let mut values = Values(kernel as u64 * 1000 + rows as u64);
        let offered = variant.matrix_side(kernel).is_none_or(|side| self.gpu.matrix_side() == Some(side));
        let tolerance = if variant.cooperative == Cooperative::No { TOLERANCE } else { HALF_TOLERANCE };
        let max_error = match kernel {
            _ if !offered => {
                self.last.take();
                0.0
            }
            Kernel::Embed => self.embed(variant, rows, &mut values)?,
            Kernel::Norm => self.norm(variant, rows, &mut values)?,
            Kernel::PartNorm => self.part_norm(rows, &mut values)?,
            Kernel::Clip => self.clip(rows, &mut values)?,
            Kernel::SharedGate => self.shared_gate(rows, &mut values)?,
            Kernel::Linear => self.linear(variant, rows, &mut values)?,
            Kernel::Place => self.place(variant, rows, &mut values)?,
            Kernel::Attention => self.attention(variant, rows, &mut values)?,
            Kernel::AttentionMerge => self.attention_merge(rows, &mut values)?,
            Kernel::Router => self.router(variant, rows, &mut values)?,
            Kernel::ExpertPermute => self.expert_permute(variant, rows, &mut values)?,
            Kernel::ExpertUp => self.expert_up(variant, rows, &mut values)?,
            Kernel::ExpertDown => self.expert_down(variant, rows, &mut values)?,
            Kernel::Argmax => self.argmax(variant, rows, &mut values)?,
            Kernel::Sample => self.sample(rows, &mut values)?,
            Kernel::Probe => self.probe(variant, rows)?,
            Kernel::MatrixProbe => self.matrix_probe(variant, rows, &mut values)?,
        };
        let mut variant_text = String::new();
        if kernel == Kernel::ExpertUp {
            variant_text += &format!(", {:?}", variant.activation);
        }
        if variant.weights != Weights::F32 {
            variant_text += &format!(", {:?} weights", variant.weights);
        }
        if variant.rows != Rows::F32 {
            variant_text += &format!(", rows in {:?}", variant.rows);
        }
        if variant.split {
            variant_text += ", split";
        }
        if variant.keeps {
            variant_text += ", keeps";
        }
        if kernel == Kernel::Attention {
            variant_text += &format!(", {:?} values", variant.values);
        }
        if variant.tile != RowTile::One {
            variant_text += &format!(", tile of {}", variant.tile_rows());
        }
        if variant.columns != Columns::Two {
            variant_text += &format!(", columns by {}", variant.columns.count());
        }
        if variant.cache != Cache::F32 {
            variant_text += &format!(", {:?} cache", variant.cache);
        }
        if variant.subgroup {
            variant_text += ", subgroup";
        }
        if variant.image {
            variant_text += ", texture";
        }
        if let Some(side) = variant.cooperative.side() {
            variant_text += &format!(", matrix units of {side}");
        }
        if !offered {
            variant_text += ": not offered";
        }
        Ok(KernelCheck {
            adapter: self.gpu.name().to_owned(),
            kernel: kernel.name().to_owned(),
            case: format!("{rows} rows{variant_text}"),
            max_error,
            tolerance,
            passed: max_error <= tolerance,
        })
    }

    fn up<T: Pod>(&self, data: &[T]) -> Result<Buffer, EngineError> {
        self.gpu.buffer_of("selftest", data)
    }

    /// A matrix as the variant reads it, and the numbers that it stands for.
    fn matrix(
        &self,
        variant: Variant,
        values: &[f32],
        (height, columns): (usize, usize),
    ) -> Result<(Buffer, Vec<f32>), EngineError> {
        let (form, shape) = (variant.weights, pack::Shape { height, columns });
        let beyond = |value| EngineError::Internal(format!("{value} is beyond what f16 holds"));
        let units = pack::pack(form, values, shape).map_err(beyond)?;
        let values = pack::unpack(form, &units, shape);
        let buffer = if variant.image { self.gpu.image_of("selftest", units) } else { self.up(&units)? };
        Ok((buffer, values))
    }

    /// Rows of `width` values as the variant's cache holds them, in parts of `part4` elements, and the numbers that they stand for.
    fn cache(
        &self,
        variant: Variant,
        rows: &[f32],
        (width, part4): (usize, usize),
    ) -> Result<(Buffer, Vec<f32>), EngineError> {
        let form = variant.cache;
        let packed: Vec<Vec<u32>> = rows.chunks_exact(width).map(|row| form.pack(row)).collect();
        let values = packed.iter().flat_map(|row| form.unpack(row, width)).collect();
        // What lies between rows counts nothing.
        let mut words = vec![f32::NAN.to_bits(); packed.len() * form.stride(width)];
        let part = part4 * form.texel_words() as usize;
        for (slot, row) in packed.iter().enumerate() {
            for (i, word) in row.iter().enumerate() {
                words[form.place(width, part, (slot, i))] = *word;
            }
        }
        let buffer = match (variant.image, form) {
            (false, _) => self.up(&words)?,
            (true, Cache::F32) => self.gpu.image_of::<4>("selftest", bytemuck::pod_collect_to_vec(&words)),
            (true, Cache::F16) => self.gpu.image_of::<2>("selftest", bytemuck::pod_collect_to_vec(&words)),
            (true, Cache::Q8) => self.gpu.image_of::<1>("selftest", bytemuck::pod_collect_to_vec(&words)),
        };
        Ok((buffer, values))
    }

    /// Runs one launch and returns `count` elements of its last buffer.
    fn run<P: Pod, T: Pod>(
        &self,
        kernel: Kernel,
        variant: Variant,
        params: &P,
        buffers: &[&Buffer],
        groups: [u32; 3],
        count: usize,
    ) -> Result<Vec<T>, EngineError> {
        let mut r = Recording::new(&self.gpu);
        r.launch(kernel, variant, params, buffers, groups);
        if let Some(last) = buffers.last() {
            r.read::<T>(last, 0, count);
        }
        self.last.replace(r.submit()?.fetch()?.pop().unwrap_or_default());
        Ok(bytemuck::pod_collect_to_vec(&self.last.borrow()))
    }

    fn columns(&self, width4: usize) -> u32 {
        (width4 as u32).div_ceil(self.gpu.workgroup())
    }

    fn matrix_groups(&self, kernel: Kernel, variant: Variant, n4: usize) -> u32 {
        self.gpu.matrix_groups(kernel, variant, n4)
    }
}

fn tiles_zero(rows: usize) -> Vec<Tile> {
    vec![Tile::default(); rows * 2]
}

/// The largest difference relative to the largest expected value; infinite where a value is no number.
fn error(expected: &[f32], got: &[f32]) -> f64 {
    let largest = expected.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let worst = expected.iter().zip(got).map(|(e, g)| f64::from((e - g).abs() / largest));
    let worst = worst.fold(0.0, |m: f64, d| if d.is_nan() { f64::INFINITY } else { m.max(d) });
    if expected.len() == got.len() { worst } else { f64::INFINITY }
}
