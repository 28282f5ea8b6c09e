//! A recording of launches and read-backs. A long one goes to the device in parts, so that it begins while the rest is encoded.

use super::pipelines::Pipeline;
use super::stamps::Stamps;
use super::{Buffer, Gpu, Usage};
use crate::EngineError;
use bytemuck::Pod;
use exflow_shaders::{Kernel, Variant};
use std::ops::Range;

enum Size {
    Groups([u32; 3]),
    Indirect(Buffer, u64),
}

struct Launch {
    pipeline: Pipeline,
    bind_group: BindGroupOf,
    params_offset: u64,
    size: Size,
}

struct BindGroupOf {
    kernel: Kernel,
    variant: Variant,
    buffers: Vec<Buffer>,
}

/// Launches of a part that goes to the device by itself: of the first one, each further one has twice as many.
const FIRST_PART: usize = 8;
/// A recording of so many launches is not cut: a submission is not free either, and ranks that share a machine have
/// better use for its cores.
const WHOLE: usize = 32;

/// Launches in order; each sees what the ones before it wrote.
pub(crate) struct Recording<'g> {
    gpu: &'g Gpu,
    launches: Vec<Launch>,
    params: Vec<u8>,
    reads: Vec<(Buffer, u64, u64)>,
    failure: Option<EngineError>,
}

/// What was submitted, with the read-backs still to be fetched.
pub(crate) struct Submission<'g> {
    gpu: &'g Gpu,
    staging: Option<wgpu::Buffer>,
    stamps: Option<Stamps>,
    /// Bytes of each read-back, and those that it takes in the staging buffer.
    sizes: Vec<(u64, u64)>,
    index: wgpu::SubmissionIndex,
}

impl<'g> Recording<'g> {
    pub(crate) fn new(gpu: &'g Gpu) -> Self {
        Self { gpu, launches: Vec::new(), params: Vec::new(), reads: Vec::new(), failure: None }
    }

    /// Records a launch of `groups` workgroups; one with an empty dimension is left out.
    pub(crate) fn launch<P: Pod>(
        &mut self,
        kernel: Kernel,
        variant: Variant,
        params: &P,
        buffers: &[&Buffer],
        groups: [u32; 3],
    ) {
        if groups.contains(&0) {
            return;
        }
        self.push(kernel, variant, params, buffers, Size::Groups(groups));
    }

    /// Records a launch whose size a kernel before it wrote at byte `offset` of `size`.
    pub(crate) fn launch_indirect<P: Pod>(
        &mut self,
        kernel: Kernel,
        variant: Variant,
        params: &P,
        buffers: &[&Buffer],
        size: (&Buffer, u64),
    ) {
        self.push(kernel, variant, params, buffers, Size::Indirect(size.0.clone(), size.1));
    }

    fn push<P: Pod>(
        &mut self,
        kernel: Kernel,
        variant: Variant,
        params: &P,
        buffers: &[&Buffer],
        size: Size,
    ) {
        let variant = self.gpu.runs(kernel, variant, buffers);
        let pipeline = match self.gpu.pipeline(kernel, variant) {
            Ok(pipeline) => pipeline,
            Err(e) => {
                self.failure.get_or_insert(e);
                return;
            }
        };
        let offset = (self.params.len() as u64).next_multiple_of(self.gpu.uniform_alignment());
        self.params.resize(offset as usize, 0);
        self.params.extend_from_slice(bytemuck::bytes_of(params));
        let buffers = buffers.iter().map(|&b| b.clone()).collect();
        let bind_group = BindGroupOf { kernel, variant, buffers };
        self.launches.push(Launch { pipeline, bind_group, params_offset: offset, size });
    }

    /// Asks for `count` elements of `T` from byte `offset` of `buffer`, as they are after the last launch.
    pub(crate) fn read<T: Pod>(&mut self, buffer: &Buffer, offset: u64, count: usize) {
        self.reads.push((buffer.clone(), offset, (count * std::mem::size_of::<T>()) as u64));
    }

    /// Executes the recording.
    pub(crate) fn submit(self) -> Result<Submission<'g>, EngineError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let gpu = self.gpu;
        let params = gpu.params_buffer(self.params.len() as u64)?;
        gpu.write(&params, 0, &self.params);
        let encoder = || gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let stamps = gpu.stamps(self.launches.iter().map(|launch| launch.bind_group.kernel));
        let mut first = 0;
        for part in parts(self.launches.len()) {
            let mut encoder = encoder();
            self.encode(&mut encoder, first..first + part, &params, stamps.as_ref())?;
            gpu.queue.submit([encoder.finish()]);
            first += part;
        }
        let mut encoder = encoder();
        self.encode(&mut encoder, first..self.launches.len(), &params, stamps.as_ref())?;
        if !self.launches.is_empty() {
            stamps.iter().for_each(|stamps| stamps.resolve(&mut encoder));
        }
        let sizes: Vec<(u64, u64)> = self
            .reads
            .iter()
            .map(|(buffer, _, size)| (*size, buffer.copied(*size).next_multiple_of(8)))
            .collect();
        let total: u64 = sizes.iter().map(|size| size.1).sum();
        let staging = (total > 0).then(|| gpu.take_staging(total));
        if let Some(staging) = &staging {
            let mut at = 0;
            for ((buffer, offset, size), taken) in self.reads.iter().zip(&sizes) {
                buffer.copy_from(&mut encoder, (*offset, *size), staging, at);
                at += taken.1;
            }
        }
        let index = gpu.queue.submit([encoder.finish()]);
        Ok(Submission { gpu, staging, stamps, sizes, index })
    }

    /// Puts launches into an encoder.
    fn encode(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        range: Range<usize>,
        params: &Buffer,
        stamps: Option<&Stamps>,
    ) -> Result<(), EngineError> {
        if range.is_empty() {
            return Ok(());
        }
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        if range.start == 0 {
            stamps.iter().for_each(|stamps| stamps.write(&mut pass, 0));
        }
        for (index, launch) in range.clone().zip(&self.launches[range]) {
            let of = &launch.bind_group;
            let buffers: Vec<&Buffer> = of.buffers.iter().collect();
            let group = self.gpu.bind_group(of.kernel, of.variant, &launch.pipeline, params, &buffers)?;
            pass.set_pipeline(&launch.pipeline.raw);
            pass.set_bind_group(0, &group, &[launch.params_offset as u32]);
            match &launch.size {
                Size::Groups([x, y, z]) => pass.dispatch_workgroups(*x, *y, *z),
                Size::Indirect(buffer, offset) => pass.dispatch_workgroups_indirect(buffer.raw()?, *offset),
            }
            stamps.iter().for_each(|stamps| stamps.write(&mut pass, index + 1));
        }
        Ok(())
    }
}

/// How many launches go to the device before the last part, part by part.
fn parts(launches: usize) -> impl Iterator<Item = usize> {
    let mut left = launches;
    let sizes = (0..usize::BITS - 1 - FIRST_PART.ilog2()).map(|n| FIRST_PART << n);
    sizes.take_while(move |&size| {
        let cut = launches > WHOLE && left > 2 * size;
        left -= if cut { size } else { 0 };
        cut
    })
}

impl Submission<'_> {
    /// Waits for the submission and returns its read-backs in the order in which they were asked for.
    pub(crate) fn fetch(mut self) -> Result<Vec<Vec<u8>>, EngineError> {
        let lost = |what: String| EngineError::gpu(what, "the device may be lost: start again");
        let Some(staging) = self.staging.take() else { return Ok(Vec::new()) };
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.slice(..).map_async(wgpu::MapMode::Read, move |result| {
            let _ = sender.send(result);
        });
        let wait = wgpu::PollType::Wait { submission_index: Some(self.index.clone()), timeout: None };
        self.gpu.device.poll(wait).map_err(|e| lost(format!("waiting for a submission: {e}")))?;
        receiver
            .recv()
            .map_err(|_| lost("a read-back was dropped".into()))?
            .map_err(|e| lost(format!("a read-back failed: {e}")))?;
        if let Some(stamps) = &self.stamps {
            stamps.tell(self.gpu)?;
        }
        self.gpu.check()?;
        let parts = {
            let view = staging
                .slice(..)
                .get_mapped_range()
                .map_err(|e| lost(format!("a read-back could not be mapped: {e}")))?;
            let mut at = 0usize;
            let cut = |(size, taken): &(u64, u64)| {
                let part = view[at..at + *size as usize].to_vec();
                at += *taken as usize;
                part
            };
            self.sizes.iter().map(cut).collect()
        };
        staging.unmap();
        self.gpu.staging.borrow_mut().push(staging);
        Ok(parts)
    }
}

impl Gpu {
    /// The parameter buffer, grown to `bytes` where it is smaller.
    fn params_buffer(&self, bytes: u64) -> Result<Buffer, EngineError> {
        let mut slot = self.params.borrow_mut();
        match &*slot {
            Some(buffer) if buffer.bytes() >= bytes => Ok(buffer.clone()),
            _ => {
                let made =
                    self.buffer("parameters", bytes.next_power_of_two().max(1 << 15), Usage::Uniform)?;
                Ok(slot.insert(made).clone())
            }
        }
    }

    /// A read-back buffer of at least `bytes`, from those that are free.
    fn take_staging(&self, bytes: u64) -> wgpu::Buffer {
        let mut free = self.staging.borrow_mut();
        let fits = free.iter().position(|buffer| buffer.size() >= bytes);
        fits.map(|index| free.swap_remove(index)).unwrap_or_else(|| {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("read-back"),
                size: bytes.next_power_of_two().max(4096),
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{FIRST_PART, WHOLE, parts};

    #[test]
    fn a_long_recording_is_cut_into_growing_parts_that_leave_a_last_one() {
        for launches in 0..2000 {
            let before: Vec<usize> = parts(launches).collect();
            let sum: usize = before.iter().sum();
            assert_eq!(before.is_empty(), launches <= WHOLE, "{launches}");
            assert!(sum < launches.max(1), "{launches}: {before:?}");
            assert!(before.first().is_none_or(|&first| first == FIRST_PART));
            assert!(before.windows(2).all(|two| two[1] == 2 * two[0]), "{launches}: {before:?}");
        }
        assert_eq!(parts(93).collect::<Vec<_>>(), [8, 16, 32]);
    }
}
