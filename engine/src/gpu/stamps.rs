//! What each launch of a submission took, by the device's own clock: told as events where somebody traces.

use super::Gpu;
use crate::EngineError;
use exflow_shaders::{Kernel, Variant};

/// More than wgpu puts into a set.
const MOST: usize = 4096;

/// A timestamp before the first launch of a submission and one behind each.
pub(super) struct Stamps {
    set: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    read_back: wgpu::Buffer,
    launches: Vec<(Kernel, Variant)>,
}

impl Gpu {
    /// Timestamps for these launches, where the device has a clock and spans at level `trace` are asked for.
    pub(super) fn stamps(&self, launches: impl FnOnce() -> Vec<(Kernel, Variant)>) -> Option<Stamps> {
        let has_clock = self.device.features().contains(wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES);
        if !has_clock || !tracing::enabled!(tracing::Level::TRACE) {
            return None;
        }
        let launches = launches();
        let count = launches.len() + 1;
        if count > MOST {
            return None;
        }
        let buffer = |usage| {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps"),
                size: 8 * count as u64,
                usage,
                mapped_at_creation: false,
            })
        };
        let set = self.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("launches"),
            ty: wgpu::QueryType::Timestamp,
            count: count as u32,
        });
        Some(Stamps {
            set,
            resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
            read_back: buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST),
            launches,
        })
    }
}

impl Stamps {
    /// The timestamp behind launch `index - 1`.
    pub(super) fn write(&self, pass: &mut wgpu::ComputePass<'_>, index: usize) {
        pass.write_timestamp(&self.set, index as u32);
    }

    /// Records what brings the timestamps back.
    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.resolve_query_set(&self.set, 0..self.launches.len() as u32 + 1, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.read_back, 0, self.resolved.size());
    }

    /// Tells of each launch. The submission has ended.
    pub(super) fn tell(&self, gpu: &Gpu) -> Result<(), EngineError> {
        let lost = |what: String| EngineError::gpu(what, "try again without --trace-out");
        let (sender, receiver) = std::sync::mpsc::channel();
        self.read_back.slice(..).map_async(wgpu::MapMode::Read, move |result| {
            let _ = sender.send(result);
        });
        gpu.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| lost(format!("timestamps: {e}")))?;
        receiver
            .recv()
            .map_err(|_| lost("timestamps were dropped".into()))?
            .map_err(|e| lost(format!("timestamps: {e}")))?;
        let view =
            self.read_back.slice(..).get_mapped_range().map_err(|e| lost(format!("timestamps: {e}")))?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&view);
        let period_ns = f64::from(gpu.queue.get_timestamp_period());
        for ((kernel, variant), ends) in self.launches.iter().zip(ticks.windows(2)) {
            let us = ends[1].saturating_sub(ends[0]) as f64 * period_ns / 1e3;
            let (tile, subgroup, texture) = (variant.tile_rows(), variant.subgroup, variant.image);
            tracing::trace!(kernel = kernel.name(), us, tile, subgroup, texture, rows = ?variant.rows, "launch");
        }
        Ok(())
    }
}
