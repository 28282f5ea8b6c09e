//! Whether an adapter really works, and how long it takes to answer.

use super::{Gpu, Recording, Usage};
use crate::EngineError;
use serde::Serialize;
use std::time::Instant;

/// What came of trying an adapter.
#[derive(Debug, Clone, Serialize)]
pub struct Probe {
    /// Its name.
    pub adapter: String,
    /// Milliseconds that it took to make a device.
    pub open_ms: f64,
    /// Microseconds from a submission to what it read back, the median of several.
    pub round_trip_us: f64,
}

const TRIES: usize = 15;

/// Opens an adapter (a part of its name, its number, or the best one), uploads a few bytes and reads them back.
///
/// # Errors
/// No such adapter, no device, or bytes that come back as others.
pub fn probe(wanted: Option<&str>) -> Result<Probe, EngineError> {
    let started = Instant::now();
    let gpu = Gpu::open(wanted, 0)?;
    let open_ms = 1e3 * started.elapsed().as_secs_f64();
    let sent = [0x5eed_u32, 1, 2, 3];
    let buffer = gpu.buffer("probe", 16, Usage::Storage)?;
    let mut times = Vec::new();
    for _ in 0..TRIES {
        gpu.write(&buffer, 0, &sent);
        let started = Instant::now();
        let mut recording = Recording::new(&gpu);
        recording.read::<u32>(&buffer, 0, sent.len());
        let parts = recording.submit()?.fetch()?;
        times.push(1e6 * started.elapsed().as_secs_f64());
        let back: Vec<u32> = parts.first().map(|b| bytemuck::pod_collect_to_vec(b)).unwrap_or_default();
        if back != sent {
            let what = format!("{}: bytes came back as others", gpu.name());
            return Err(EngineError::gpu(what, "update its driver, or choose another adapter"));
        }
    }
    gpu.check()?;
    times.sort_by(f64::total_cmp);
    Ok(Probe { adapter: gpu.name().to_owned(), open_ms, round_trip_us: times[TRIES / 2] })
}
