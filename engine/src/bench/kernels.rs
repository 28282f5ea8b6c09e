//! A model's heaviest launches at its own shapes, each beside the limit that binds it.

use super::device::{DeviceRates, Reads, rates};
use super::seconds;
use crate::cluster::numerics;
use crate::gpu::{Gpu, Recording};
use crate::model::ModelSpec;
use crate::model::decoder::{Decoder, Piece};
use crate::selftest::open_fast;
use crate::weights::{ModelWeights, Store};
use crate::{ClusterOptions, EngineError, Numerics};
use exflow_placement::ExpertId;
use serde::Serialize;

/// One launch, or a few that belong together, at one number of rows.
#[derive(Debug, Clone, Serialize)]
pub struct KernelRate {
    /// What it does.
    pub piece: &'static str,
    /// T.
    pub rows: usize,
    /// What multiplies: `lanes` or `matrix units`.
    pub on: &'static str,
    /// Microseconds.
    pub us: f64,
    /// Operations per second, two for a multiply-add.
    pub flops: f64,
    /// Bytes of weights and cache that it has to read, per second.
    pub bytes_per_s: f64,
    /// `bytes`, `operations` or `launches`: which of the adapter's limits would take longest.
    pub bound: &'static str,
    /// That limit's time over the measured one.
    pub share: f64,
}

/// Loads the first MoE layer's kind of work of a model onto one rank and measures its pieces at each of `rows`.
///
/// # Errors
/// Those of loading a model.
pub fn bench_kernels(
    options: &ClusterOptions,
    rows: &[usize],
) -> Result<(DeviceRates, Vec<KernelRate>), EngineError> {
    let mut spec = ModelSpec::read(&options.model)?;
    let store = Store::open(&options.model)?;
    spec.packed_experts |= store.packs_experts();
    let wanted = options.adapter.as_deref();
    let mut gpu = match options.numerics {
        Numerics::Exact => Gpu::open(wanted, 0)?,
        Numerics::Fast => {
            let one = ClusterOptions { ranks: 1, ..options.clone() };
            open_fast(wanted, 0, (numerics::of_this_process(&one, &spec)?, spec.expert.activation))?
        }
    };
    gpu.limit_chunks(options.chunk_bytes);
    let limits = rates(&gpu)?;
    let all: Vec<Vec<ExpertId>> =
        (0..spec.moe_layers()).map(|_| (0..spec.experts).map(ExpertId::from).collect()).collect();
    let weights = ModelWeights::load(&spec, &store, &gpu, &all, (options.dtype, options.quant), &mut |_| {})?;
    let largest = rows.iter().copied().max().unwrap_or(1);
    let slots = largest.max(CONTEXT).next_multiple_of(exflow_shaders::KV_BLOCK);
    let mut decoder = Decoder::new(gpu, spec, weights, (slots, options.kv_dtype.into()))?;
    decoder.reserve(largest, largest)?;
    let mut reads: Vec<Reads> = Vec::new();
    for form in Piece::ALL.map(|piece| decoder.piece_form(piece)) {
        if reads.iter().all(|of| of.form != form) {
            reads.push(Reads::measure(&decoder.gpu, form)?);
        }
    }
    let mut measured = Vec::new();
    for &rows in rows {
        let blocks = decoder.prepare_bench(rows, CONTEXT);
        for piece in Piece::ALL {
            let seen = decoder.scratch.x();
            let record = |r: &mut Recording<'_>| decoder.piece(r, piece, rows, blocks);
            let time = seconds(&decoder.gpu, seen, &record)?;
            let (flops, bytes) = decoder.piece_work(piece, rows, CONTEXT);
            let form = decoder.piece_form(piece);
            let rate = reads.iter().find(|of| of.form == form).map_or(f64::INFINITY, |of| of.best(bytes));
            let mut once = decoder.record();
            record(&mut once);
            let on_units = decoder.piece_cooperates(piece);
            let rate_of = if on_units { limits.matrix_flops } else { None };
            let limits = [
                ("bytes", bytes / rate),
                ("operations", flops / rate_of.unwrap_or(limits.f32_flops)),
                ("launches", once.launches() as f64 * limits.launch_us / 1e6),
            ];
            let (bound, least) = limits.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default();
            measured.push(KernelRate {
                piece: piece.name(),
                rows,
                on: if on_units { "matrix units" } else { "lanes" },
                us: 1e6 * time,
                flops: flops / time,
                bytes_per_s: bytes / time,
                bound,
                share: least / time,
            });
        }
    }
    Ok((limits, measured))
}

/// Positions before the first row.
const CONTEXT: usize = 128;
