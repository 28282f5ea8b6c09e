//! An adapter's own limits: copies, arithmetic, launches.

use super::seconds;
use crate::EngineError;
use crate::gpu::{Gpu, Recording, Usage};
use exflow_shaders::{Cooperative, Kernel, RowTile, Variant, Weights, params};
use serde::Serialize;

/// What an adapter was measured to do, by kernels.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceRates {
    /// The adapter's name.
    pub adapter: String,
    /// `LP_NUM_THREADS` as lavapipe saw it, where it is set.
    pub lp_num_threads: Option<String>,
    /// Bytes read and written per second by a kernel that passes over rows of 16-byte values.
    pub copy_bytes_per_s: f64,
    /// f32 operations per second, two for a fused multiply-add, on registers.
    pub f32_flops: f64,
    /// Operations per second of `dot4I8Packed`, eight for each, on registers.
    pub dot4_ops: f64,
    /// Operations per second of the adapter's matrix units, on matrices of f16 with sums in f32 as kernels may ask for them;
    /// `None`: it offers none.
    pub matrix_flops: Option<f64>,
    /// Bytes of an f32 matrix that its product with one row reads per second.
    pub matvec_bytes_per_s: f64,
    /// What one of many small dependent launches takes.
    pub launch_us: f64,
}

/// Measures the adapter that `adapter` names (the best one: `None`).
///
/// # Errors
/// No such adapter, or one that fails.
pub fn bench_device(adapter: Option<&str>) -> Result<DeviceRates, EngineError> {
    rates(&Gpu::open_with_matrix_units(adapter, 0)?)
}

/// Vec4s that are read and written: 32 MiB, beyond most caches.
const COPY4: usize = 2 << 20;
const COPY_ROWS: usize = 1 << 11;
/// Lanes of the arithmetic, and what each of them does: 16 chains of vec4s, so many rounds.
const LANES: usize = 4096;
const ROUNDS: u32 = 256;
const PER_ROUND: f64 = 16.0 * 4.0;

pub(super) fn rates(gpu: &Gpu) -> Result<DeviceRates, EngineError> {
    let columns = |width4: usize| (width4 as u32).div_ceil(gpu.workgroup());
    let h4 = COPY4 / COPY_ROWS;
    let passed = gpu.buffer("passed over", 16 * COPY4 as u64, Usage::Storage)?;
    let p = params::Clip { width4: h4 as u32, limit: 1.0 };
    let copy = seconds(gpu, &passed, &|r| {
        r.launch(Kernel::Clip, Variant::default(), &p, &[&passed], [columns(h4), COPY_ROWS as u32, 1]);
    })?;

    let out = gpu.buffer("lanes", 16 * LANES as u64, Usage::Storage)?;
    let p = params::Probe { rounds: ROUNDS, factor: 0.5, bytes: 0x01fe_037f };
    let arithmetic = |weights: Weights| {
        let variant = Variant { weights, ..Variant::default() };
        seconds(gpu, &out, &|r| r.launch(Kernel::Probe, variant, &p, &[&out], [columns(LANES), 1, 1]))
    };
    let work = LANES as f64 * f64::from(ROUNDS) * PER_ROUND;
    let (f32_seconds, dot4_seconds) = (arithmetic(Weights::F32)?, arithmetic(Weights::Q8)?);

    let matrix_flops = gpu.matrix_side().map(|side| matrix_units(gpu, side)).transpose()?;
    let matvec = read_rate(gpu, Weights::F32, SIDE4)?;
    let small = params::Probe { rounds: 1, ..p };
    let launches = 64;
    let many = seconds(gpu, &out, &|r| {
        for _ in 0..launches {
            r.launch(Kernel::Probe, Variant::default(), &small, &[&out], [1, 1, 1]);
        }
    })?;
    Ok(DeviceRates {
        adapter: gpu.name().to_owned(),
        lp_num_threads: std::env::var("LP_NUM_THREADS").ok(),
        copy_bytes_per_s: 32.0 * COPY4 as f64 / copy,
        f32_flops: 2.0 * work / f32_seconds,
        dot4_ops: 8.0 * work / dot4_seconds,
        matrix_flops,
        matvec_bytes_per_s: matvec,
        launch_us: 1e6 * many / f64::from(launches),
    })
}

/// Workgroups that probe matrix units.
const MATRIX_GROUPS: usize = 1024;

/// Operations per second of the matrix units, two for a multiply-add.
fn matrix_units(gpu: &Gpu, side: usize) -> Result<f64, EngineError> {
    let tile = if side == 16 { RowTile::Sixteen } else { RowTile::Eight };
    let variant = Variant { tile, ..Variant::default() };
    let factors = gpu.buffer("matrices", (4 * side * side) as u64, Usage::Storage)?;
    let sums = MATRIX_GROUPS * 4 * side * side;
    let out = gpu.buffer("sums of matrices", 4 * (sums as u64 + 1), Usage::Storage)?;
    let p = params::MatrixProbe { rounds: ROUNDS, subgroups_at: sums as u32 };
    let record = |r: &mut Recording<'_>| {
        r.launch(Kernel::MatrixProbe, variant, &p, &[&factors, &out], [MATRIX_GROUPS as u32, 1, 1]);
    };
    let time = seconds(gpu, &out, &record)?;
    let mut r = Recording::new(gpu);
    r.read::<f32>(&out, 4 * sums as u64, 1);
    let read = r.submit()?.fetch()?;
    let subgroups: Vec<f32> = read.first().map(|b| bytemuck::pod_collect_to_vec(b)).unwrap_or_default();
    let each = 2.0 * (side * side * side) as f64 * 4.0 * f64::from(ROUNDS);
    Ok(each * MATRIX_GROUPS as f64 * f64::from(subgroups.first().copied().unwrap_or(0.0)) / time)
}

/// vec4s of a side of the matrix: 16 MiB.
const SIDE4: usize = 512;

/// Bytes per second that a product of one row with a square matrix reads at best, of `side4` vec4s a side, bound as this adapter
/// binds matrices in that form: whether lanes make it or matrix units, as what others could read bounds either.
fn read_rate(gpu: &Gpu, form: Weights, side4: usize) -> Result<f64, EngineError> {
    let units = 4 * side4 * form.units(4 * side4).1;
    let matrix = gpu.matrix("a matrix", form, vec![[0; 4]; units])?;
    let row = gpu.buffer("a row", 16 * side4 as u64, Usage::Storage)?;
    let out = gpu.buffer("its product", 16 * side4 as u64, Usage::Storage)?;
    let p = super::square_product(form, side4, 1);
    let buffers = [&row, &matrix, &row, &row, &out];
    let cut = gpu.cut(form);
    let mut ways = vec![cut.linear(1)];
    if cut.cooperative != Cooperative::No {
        ways.push(cut.on(Cooperative::No).linear(1));
    }
    let mut least = f64::INFINITY;
    for variant in ways {
        let (variant, across) = gpu.along(Kernel::Linear, variant, side4);
        let groups = [1, across, 1];
        let record = |r: &mut Recording<'_>| r.launch(Kernel::Linear, variant, &p, &buffers, groups);
        least = least.min(seconds(gpu, &out, &record)?);
    }
    Ok(16.0 * units as f64 / least)
}

/// How fast an adapter reads matrices in one form, by their size: caches hold small ones, and launches are the less of large
/// ones' time.
pub(super) struct Reads {
    pub(super) form: Weights,
    /// (bytes, bytes per second), ascending.
    rates: Vec<(f64, f64)>,
}

/// vec4s of a side: 64 KiB to 64 MiB in f32.
const SIDES4: [usize; 6] = [32, 64, 128, 256, 512, 1024];

impl Reads {
    pub(super) fn measure(gpu: &Gpu, form: Weights) -> Result<Self, EngineError> {
        let of = |side4: usize| {
            let bytes = (16 * 4 * side4 * form.units(4 * side4).1) as f64;
            Ok((bytes, read_rate(gpu, form, side4)?))
        };
        Ok(Self { form, rates: SIDES4.into_iter().map(of).collect::<Result<_, EngineError>>()? })
    }

    /// The best rate for so many bytes: what more of them were read at, fewer can be.
    pub(super) fn best(&self, bytes: f64) -> f64 {
        let last = self.rates.last().map_or(f64::INFINITY, |of| of.1);
        let as_large = self.rates.iter().filter(|of| of.0 >= bytes).map(|of| of.1);
        as_large.fold(last, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_more_bytes_were_read_at_bounds_fewer() {
        let reads = Reads { form: Weights::F32, rates: vec![(1e5, 9.0), (1e6, 20.0), (1e7, 12.0)] };
        assert_eq!([1e4, 1e5, 5e5, 2e6, 1e9].map(|bytes| reads.best(bytes)), [20.0, 20.0, 20.0, 12.0, 12.0]);
    }
}
