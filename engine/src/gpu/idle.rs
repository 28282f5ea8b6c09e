//! Devices whose rank has ended, kept with their pipelines for the next rank of this process: compiling those is most of
//! what a small model's start takes, and drivers (lavapipe of Mesa 22.3) keep memory of each device that ever was.

use super::kept::Kept;
use super::pipelines::PipelineCache;
use std::sync::{Arc, Mutex, PoisonError};

/// What a device's next rank takes over. Buffers and bind groups went with its last one.
pub(super) struct Idle {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    /// Whether kernels may use the adapter's matrix units.
    pub(super) matrix_units: bool,
    pub(super) pipelines: PipelineCache,
    pub(super) kept: Option<Kept>,
    /// Where the device's error callback leaves the first error.
    pub(super) failure: Arc<Mutex<Option<String>>>,
}

/// Devices that wait with the place and name of their adapter, last come first taken. Leaves process exit to the driver.
static IDLE: Mutex<Vec<((usize, String), Idle)>> = Mutex::new(Vec::new());

/// As many as one process's ranks usually are: more would only hold memory.
const MOST: usize = 8;

/// A device of that adapter, with its matrix units or without, if one waits.
pub(super) fn take(adapter: usize, name: &str, matrix_units: bool) -> Option<Idle> {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let found = idle.iter().rposition(|((index, known), device)| {
        (*index, known.as_str(), device.matrix_units) == (adapter, name, matrix_units)
    })?;
    Some(idle.swap_remove(found).1)
}

/// Keeps a sound device, unless enough wait.
pub(super) fn put(adapter: usize, name: &str, device: Idle) {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    if idle.len() < MOST {
        idle.push(((adapter, name.to_owned()), device));
    }
}
