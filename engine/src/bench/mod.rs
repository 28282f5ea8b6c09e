//! What an adapter can do, and how near a model's kernels come to it: measurements of launches alone, without a cluster.

mod device;
mod kernels;
mod tune;

pub use device::{DeviceRates, bench_device};
pub use kernels::{KernelRate, bench_kernels};
pub use tune::tune;

use crate::EngineError;
use crate::gpu::{Buffer, Gpu, Recording};
use exflow_shaders::{Weights, params};
use std::time::Instant;

/// Runs that are measured; the quickest counts, as others run on shared machines.
const RUNS: usize = 5;
/// A run repeats a launch until it takes about so long.
const RUN_SECONDS: f64 = 0.1;

/// Seconds that one round of `record` takes, among many in one submission. `seen` is a buffer that it writes.
fn seconds(gpu: &Gpu, seen: &Buffer, record: &dyn Fn(&mut Recording<'_>)) -> Result<f64, EngineError> {
    let run = |rounds| run(gpu, seen, record, rounds);
    run(1)?; // makes the pipelines
    let once = run(1)?.max(1e-6);
    let rounds = ((RUN_SECONDS / once) as usize).clamp(1, 100);
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        best = best.min(run(rounds)? / rounds as f64);
    }
    Ok(best)
}

/// Seconds that so many rounds of `record` take in one submission. `seen` is a buffer that it writes.
fn run(
    gpu: &Gpu,
    seen: &Buffer,
    record: &dyn Fn(&mut Recording<'_>),
    rounds: usize,
) -> Result<f64, EngineError> {
    let mut r = Recording::new(gpu);
    (0..rounds).for_each(|_| record(&mut r));
    r.read::<u32>(seen, 0, 1);
    let started = Instant::now();
    r.submit()?.fetch()?;
    Ok(started.elapsed().as_secs_f64())
}

/// The product of `rows` rows with a matrix of `side4` vec4s a side.
fn square_product(form: Weights, side4: usize, rows: usize) -> params::Linear {
    let (w_units, w_stride) = form.units(4 * side4);
    let side4 = side4 as u32;
    params::Linear {
        rows: rows as u32,
        k4: side4,
        n4: side4,
        w_units: w_units as u32,
        w_stride: w_stride as u32,
        x_stride4: side4,
        y_stride4: side4,
        scale: 1.0,
        ..params::Linear::default()
    }
}
