//! A recording of launches and read-backs, executed as one submission.

use super::pipelines::Bound;
use super::stamps::Stamps;
use super::{Buffer, Gpu, Usage};
use crate::EngineError;
use bytemuck::Pod;
use exflow_shaders::{Kernel, Variant};

#[derive(PartialEq)]
enum Size {
    Groups([u32; 3]),
    Indirect(Buffer, u64),
}

/// What a launch is known by; all else follows from it.
#[derive(PartialEq)]
struct Call {
    kernel: Kernel,
    variant: Variant,
    bound: Bound,
    /// Where its parameters are in their buffer.
    params_offset: u32,
    size: Size,
}

struct Launch {
    call: Call,
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
}

/// Bytes of a buffer of parameter blocks; a recording that needs more takes several.
const PARAMS_BYTES: usize = 1 << 15;

/// What a submission does; parameter blocks and what else is uploaded for it are no part of it.
#[derive(Default)]
struct Work {
    launches: Vec<Launch>,
    /// Buffer, offset and size in bytes of what is read back.
    reads: Vec<(Buffer, u64, u64)>,
}

/// Commands that a device takes, with what they copy read-backs to.
struct Encoded {
    commands: wgpu::CommandBuffer,
    staging: Option<wgpu::Buffer>,
    /// Bytes of each read-back, and those that it takes in the staging buffer.
    sizes: Vec<(u64, u64)>,
}

/// What was submitted last, and where it had been the same before, the commands for doing it again: a step of decoding is like
/// the one before it but for its uploads, and is encoded while the device works on that.
#[derive(Default)]
pub(super) struct Ahead {
    last: Work,
    again: Option<Encoded>,
}

/// Launches in order; each sees what the ones before it wrote.
pub(crate) struct Recording<'g> {
    gpu: &'g Gpu,
    /// What was submitted last, of which the first `same` launches are this recording's; once one differs, all are.
    ahead: Ahead,
    same: usize,
    differs: bool,
    reads: Vec<(Buffer, u64, u64)>,
    /// What goes into each buffer of parameter blocks.
    params: Vec<Vec<u8>>,
    /// Launches are of no workgroups, and only of kernels that the device has not made yet.
    without_work: bool,
    failure: Option<EngineError>,
}

/// What was submitted, with the read-backs still to be fetched.
pub(crate) struct Submission<'g> {
    gpu: &'g Gpu,
    pending: Pending,
}

/// The same by itself. One that nobody fetches is worked on all the same.
pub(crate) struct Pending {
    staging: Option<wgpu::Buffer>,
    stamps: Option<Stamps>,
    /// Bytes of each read-back, and those that it takes in the staging buffer.
    sizes: Vec<(u64, u64)>,
    index: wgpu::SubmissionIndex,
}

impl<'g> Recording<'g> {
    pub(crate) fn new(gpu: &'g Gpu) -> Self {
        let ahead = gpu.ahead.take();
        Self {
            gpu,
            ahead,
            same: 0,
            differs: false,
            reads: Vec::new(),
            params: Vec::new(),
            without_work: false,
            failure: None,
        }
    }

    /// Launches that only have the device make their kernels: drivers do part of that when one is first launched.
    pub(crate) fn without_work(gpu: &'g Gpu) -> Self {
        Self { without_work: true, ..Self::new(gpu) }
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
        if self.without_work && self.gpu.has_made(kernel, variant) {
            return;
        }
        let size = if self.without_work { Size::Groups([0; 3]) } else { size };
        let (block, params_offset) = self.put(bytemuck::bytes_of(params));
        if let Err(e) = self.call(block, (kernel, variant, params_offset, size), buffers) {
            let _ = self.failure.get_or_insert(e);
        }
    }

    fn call(
        &mut self,
        block: usize,
        (kernel, variant, params_offset, size): (Kernel, Variant, u32, Size),
        buffers: &[&Buffer],
    ) -> Result<(), EngineError> {
        let params = self.gpu.params_buffer(block)?;
        let call = Call { kernel, variant, bound: Bound::of(&params, buffers)?, params_offset, size };
        let launches = &mut self.ahead.last.launches;
        if !self.differs {
            if launches.get(self.same).is_some_and(|launch| launch.call == call) {
                self.same += 1;
                return Ok(());
            }
            launches.truncate(self.same);
            self.differs = true;
        }
        let (pipeline, bind_group) = self.gpu.bound(kernel, variant, call.bound, (&params, buffers))?;
        launches.push(Launch { call, pipeline, bind_group });
        Ok(())
    }

    /// Notes a launch's parameters; returns which buffer they are in, and where.
    fn put(&mut self, params: &[u8]) -> (usize, u32) {
        let alignment = self.gpu.uniform_alignment() as usize;
        let start = self.params.last().map(|last| last.len().next_multiple_of(alignment));
        let start = start.filter(|start| start + params.len() <= PARAMS_BYTES);
        if start.is_none() {
            self.params.push(Vec::with_capacity(PARAMS_BYTES));
        }
        let (block, start) = (self.params.len() - 1, start.unwrap_or(0));
        let bytes = &mut self.params[block];
        bytes.resize(start, 0);
        bytes.extend_from_slice(params);
        (block, start as u32)
    }

    /// Asks for `count` elements of `T` from byte `offset` of `buffer`, as they are after the last launch.
    pub(crate) fn read<T: Pod>(&mut self, buffer: &Buffer, offset: u64, count: usize) {
        self.reads.push((buffer.clone(), offset, (count * std::mem::size_of::<T>()) as u64));
    }

    /// How many launches it has.
    pub(crate) fn launches(&self) -> usize {
        if self.differs { self.ahead.last.launches.len() } else { self.same }
    }

    /// Executes the recording.
    pub(crate) fn submit(self) -> Result<Submission<'g>, EngineError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let gpu = self.gpu;
        for (block, bytes) in self.params.iter().enumerate() {
            gpu.hold(&gpu.params_buffer(block)?, bytes);
        }
        let Ahead { last: mut work, again } = self.ahead;
        let repeats = !self.differs && self.same == work.launches.len() && self.reads == work.reads;
        if !self.differs {
            work.launches.truncate(self.same);
        }
        work.reads = self.reads;
        let stamps = gpu.stamps(work.launches.iter().map(|of| (of.call.kernel, of.call.variant)));
        let encoded = match again.filter(|_| repeats && stamps.is_none()) {
            Some(encoded) => encoded,
            None => work.encode(gpu, stamps.as_ref())?,
        };
        let index = gpu.queue.submit([encoded.commands]);
        let again = match repeats && stamps.is_none() {
            true => Some(work.encode(gpu, None)?),
            false => None,
        };
        gpu.ahead.replace(Ahead { last: work, again });
        let pending = Pending { staging: encoded.staging, stamps, sizes: encoded.sizes, index };
        Ok(Submission { gpu, pending })
    }
}

impl Work {
    fn encode(&self, gpu: &Gpu, stamps: Option<&Stamps>) -> Result<Encoded, EngineError> {
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        if !self.launches.is_empty() {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            stamps.iter().for_each(|stamps| stamps.write(&mut pass, 0));
            for (index, launch) in self.launches.iter().enumerate() {
                pass.set_pipeline(&launch.pipeline);
                pass.set_bind_group(0, &launch.bind_group, &[launch.call.params_offset]);
                match &launch.call.size {
                    Size::Groups([x, y, z]) => pass.dispatch_workgroups(*x, *y, *z),
                    Size::Indirect(buffer, offset) => {
                        pass.dispatch_workgroups_indirect(buffer.raw()?, *offset)
                    }
                }
                stamps.iter().for_each(|stamps| stamps.write(&mut pass, index + 1));
            }
            drop(pass);
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
        Ok(Encoded { commands: encoder.finish(), staging, sizes })
    }
}

impl Submission<'_> {
    /// Waits for the submission and returns its read-backs in the order in which they were asked for.
    pub(crate) fn fetch(self) -> Result<Vec<Vec<u8>>, EngineError> {
        self.pending.fetch(self.gpu)
    }

    /// Leaves it to the device: it is fetched later, and others may be submitted until then.
    pub(crate) fn later(self) -> Pending {
        self.pending
    }
}

impl Pending {
    /// As [`Submission::fetch`], of what was submitted to `gpu`.
    pub(crate) fn fetch(mut self, gpu: &Gpu) -> Result<Vec<Vec<u8>>, EngineError> {
        let lost = |what: String| EngineError::gpu(what, "the device may be lost: start again");
        let Some(staging) = self.staging.take() else { return Ok(Vec::new()) };
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.slice(..).map_async(wgpu::MapMode::Read, move |result| {
            let _ = sender.send(result);
        });
        let wait = wgpu::PollType::Wait { submission_index: Some(self.index.clone()), timeout: None };
        gpu.device.poll(wait).map_err(|e| lost(format!("waiting for a submission: {e}")))?;
        receiver
            .recv()
            .map_err(|_| lost("a read-back was dropped".into()))?
            .map_err(|e| lost(format!("a read-back failed: {e}")))?;
        if let Some(stamps) = &self.stamps {
            stamps.tell(gpu)?;
        }
        gpu.check()?;
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
        gpu.staging.borrow_mut().push(staging);
        Ok(parts)
    }
}

impl Gpu {
    /// The `block`-th buffer of parameter blocks.
    fn params_buffer(&self, block: usize) -> Result<Buffer, EngineError> {
        let mut made = self.params.borrow_mut();
        while made.len() <= block {
            made.push(self.buffer("parameters", PARAMS_BYTES as u64, Usage::Uniform)?);
        }
        Ok(made[block].clone())
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
