//! What an adapter can do, and how near a model's kernels come to it: measurements of launches alone, without a cluster.

mod device;
mod kernels;
mod tune;

pub use device::{DeviceRates, bench_device};
pub use kernels::{KernelRate, bench_kernels};
pub use tune::tune;

use crate::EngineError;
use crate::gpu::{Buffer, Gpu, Recording};
use std::time::Instant;

/// Runs that are measured; the quickest counts, as others run on shared machines.
const RUNS: usize = 5;
/// A run repeats a launch until it takes about so long.
const RUN_SECONDS: f64 = 0.1;

/// Seconds that one round of `record` takes, among many in one submission. `seen` is a buffer that it writes.
fn seconds(gpu: &Gpu, seen: &Buffer, record: &dyn Fn(&mut Recording<'_>)) -> Result<f64, EngineError> {
    let run = |rounds: usize| -> Result<f64, EngineError> {
        let mut r = Recording::new(gpu);
        (0..rounds).for_each(|_| record(&mut r));
        r.read::<u32>(seen, 0, 1);
        let started = Instant::now();
        r.submit()?.fetch()?;
        Ok(started.elapsed().as_secs_f64())
    };
    run(1)?; // makes the pipelines
    let once = run(1)?.max(1e-6);
    let rounds = ((RUN_SECONDS / once) as usize).clamp(1, 100);
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        best = best.min(run(rounds)? / rounds as f64);
    }
    Ok(best)
}
