//! Whether an adapter's matrix units do what their kernels take for granted, tried before a model's products are made on them.

use super::{Bench, H4, Values};
use crate::EngineError;
use crate::gpu::{Gpu, OnUnits};
use exflow_shaders::{Activation, Cooperative, Kernel, Variant, Weights, params};

/// Opens an adapter for fast numerics, with experts of this activation: products of matrices in the forms `on_units` are made on
/// its matrix units, where it offers them and they pass what they are tried by; else a warning tells why they are not used, and
/// so does [`Gpu::units_fault`].
pub(crate) fn open_fast(
    wanted: Option<&str>,
    rank: usize,
    (on_units, activation): (OnUnits, Activation),
) -> Result<Gpu, EngineError> {
    let gpu = open_tried(wanted, rank, (on_units, activation))?;
    let name = gpu.name();
    match (gpu.on_units().is_empty(), gpu.is_cpu()) {
        (true, _) => {}
        (false, false) => tracing::info!("{name}: products in f16 on its matrix units"),
        (false, true) => tracing::warn!(
            "{name}: products in f16 on matrix units that its driver emulates: --numerics exact is quicker"
        ),
    }
    Ok(gpu)
}

/// The same without a word about what is used.
pub(crate) fn open_tried(
    wanted: Option<&str>,
    rank: usize,
    (on_units, activation): (OnUnits, Activation),
) -> Result<Gpu, EngineError> {
    let mut gpu = match on_units.is_empty() {
        true => Gpu::open(wanted, rank)?,
        false => Gpu::open_with_matrix_units(wanted, rank)?,
    };
    // Matrices of the trial are bound as the model's will be.
    gpu.set_fast(true);
    if let Some(side) = gpu.matrix_side() {
        let bench = Bench::new(gpu);
        let tried = bench.try_units(Cooperative::of_side(side), on_units, activation);
        let fault = tried.unwrap_or_else(|e| Some(e.to_string()));
        gpu = settle(bench.gpu, (on_units, fault), (wanted, rank))?;
        gpu.set_fast(true);
    }
    Ok(gpu)
}

/// Has a device's matrix units used where nothing was found wrong with them, else the adapter opened anew without them: what
/// went wrong may have been more than a result.
fn settle(
    mut gpu: Gpu,
    (on_units, fault): (OnUnits, Option<String>),
    (wanted, rank): (Option<&str>, usize),
) -> Result<Gpu, EngineError> {
    let name = gpu.name().to_owned();
    match fault {
        None => {
            gpu.use_matrix_units(on_units);
            Ok(gpu)
        }
        Some(fault) => {
            tracing::warn!("{name}: its matrix units are not used: {fault}; lanes make products");
            drop(gpu);
            let mut gpu = Gpu::open(wanted, rank)?;
            gpu.note_units_fault(fault);
            Ok(gpu)
        }
    }
}

/// Rows that are tried: more than one tile of any size.
const ROWS: usize = 67;

impl Bench {
    /// What is wrong with products of matrices in these forms on matrix units, if anything is: they have to be their twins' within
    /// what rounding makes of them, and a row's bits the same wherever in a launch it is.
    fn try_units(
        &self,
        cooperative: Cooperative,
        on_units: OnUnits,
        activation: Activation,
    ) -> Result<Option<String>, EngineError> {
        for form in Weights::ALL.into_iter().filter(|form| on_units.has(*form)) {
            let fault = self.try_form(cooperative, form, activation)?;
            if fault.is_some() {
                return Ok(fault);
            }
        }
        Ok(None)
    }

    fn try_form(
        &self,
        cooperative: Cooperative,
        form: Weights,
        activation: Activation,
    ) -> Result<Option<String>, EngineError> {
        let image = self.gpu.wants_textures(form);
        let mut tiles = Vec::new();
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_cooperative()) {
            for variant in kernel.variants() {
                let other = kernel == Kernel::ExpertUp && variant.activation != activation;
                if (variant.cooperative, variant.weights, variant.image) != (cooperative, form, image)
                    || other
                {
                    continue;
                }
                let check = self.check(kernel, variant, ROWS)?;
                if !check.passed {
                    let (error, tolerance) = (check.max_error, check.tolerance);
                    let what = format!("{}, {}: off by {error:.1e}", kernel.name(), check.case);
                    return Ok(Some(format!("{what}, of {tolerance:.1e}")));
                }
                if kernel == Kernel::Linear {
                    tiles.push(variant);
                }
            }
        }
        Ok((!self.rows_alike(&tiles)?).then(|| "a row has other bits elsewhere in a launch".into()))
    }

    /// Whether a row's product has the same bits in any of these variants, behind any other rows, and in launches of fewer.
    fn rows_alike(&self, variants: &[Variant]) -> Result<bool, EngineError> {
        let mut values = Values(1);
        let (k, n4) = (4 * H4, 2 * H4);
        let x = values.floats(ROWS * k);
        let matrix = values.floats(4 * n4 * k);
        let mut expected: Option<Vec<u32>> = None;
        for &variant in variants {
            let (weights, _) = self.matrix(variant, &matrix, (4 * n4, k))?;
            for (first, rows) in [(0, ROWS), (1, ROWS), (11, ROWS), (40, ROWS), (5, 3), (66, 1)] {
                let moved: Vec<f32> =
                    (0..rows).flat_map(|row| &x[(first + row) % ROWS * k..][..k]).copied().collect();
                let (w_units, w_stride) = form_units(variant, k);
                let p = params::Linear {
                    rows: rows as u32,
                    k4: H4 as u32,
                    n4: n4 as u32,
                    w_units,
                    w_stride,
                    x_stride4: H4 as u32,
                    y_stride4: n4 as u32,
                    scale: 1.0,
                    ..Default::default()
                };
                let out = self.up(&vec![0f32; rows * 4 * n4])?;
                let absent = self.up(&[0f32; 4])?;
                let buffers = [&self.up(&moved)?, &weights, &absent, &absent, &out];
                let across = self.matrix_groups(Kernel::Linear, variant, n4);
                let groups = [rows.div_ceil(variant.tile_rows()) as u32, across, 1];
                let got: Vec<u32> = self.run(Kernel::Linear, variant, &p, &buffers, groups, rows * 4 * n4)?;
                let all = expected.get_or_insert_with(|| got.clone());
                let alike = |row: usize| {
                    got[row * 4 * n4..][..4 * n4] == all[(first + row) % ROWS * 4 * n4..][..4 * n4]
                };
                if !(0..rows).all(alike) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// Units of weights in a row of `columns` columns, and units to the next row.
fn form_units(variant: Variant, columns: usize) -> (u32, u32) {
    let (units, stride) = variant.weights.units(columns);
    (units as u32, stride as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use exflow_shaders::RowTile;

    #[test]
    fn rows_with_other_bits_are_found() {
        let bench = Bench::new(Gpu::open(None, 0).expect("an adapter"));
        let of = |tile, weights| Variant { tile, weights, ..Variant::default() };
        let alike = [RowTile::One, RowTile::Eight].map(|tile| of(tile, Weights::F16));
        assert!(bench.rows_alike(&alike).expect("runs"));
        let others = [Weights::F16, Weights::Q8].map(|weights| of(RowTile::One, weights));
        assert!(!bench.rows_alike(&others).expect("runs"));
    }

    #[test]
    fn matrix_units_are_used_where_they_are_offered_and_pass() {
        let activation = Activation::SwiGlu;
        let on_units = OnUnits::of([Weights::F16]);
        let units = |gpu: &Gpu| gpu.cut(Weights::F16).cooperative;
        let gpu = open_fast(None, 0, (on_units, activation)).expect("an adapter");
        let Some(side) = gpu.matrix_side() else {
            eprintln!("skipped: adapter offers no cooperative matrices");
            return assert_eq!(units(&gpu), Cooperative::No);
        };
        assert_eq!((units(&gpu).side(), gpu.side_in_use(), gpu.units_fault()), (Some(side), side, None));
        assert_eq!(gpu.cut(Weights::Q8).cooperative, Cooperative::No, "what has scales is bytes");
        let mut faulty =
            settle(gpu, (on_units, Some("a test says so".into())), (None, 0)).expect("opens again");
        faulty.set_fast(true);
        assert_eq!(units(&faulty), Cooperative::No);
        assert_eq!((faulty.side_in_use(), faulty.units_fault()), (0, Some("a test says so")));
        let scaled = open_fast(None, 0, (OnUnits::default(), activation)).expect("an adapter");
        assert_eq!(scaled.matrix_side(), None);
    }
}
