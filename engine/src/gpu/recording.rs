//! A recording of launches, uploads between them and read-backs, executed as one submission.

use super::pipelines::Bound;
use super::stamps::Stamps;
use super::{Buffer, Gpu, Usage};
use crate::EngineError;
use bytemuck::Pod;
use exflow_shaders::{Kernel, Variant};
use std::collections::HashMap;

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

/// Bytes of a buffer, from byte `offset` on.
#[derive(PartialEq)]
struct Span {
    buffer: Buffer,
    offset: u64,
    bytes: u64,
}

/// What a submission does is a list of such.
enum Command {
    Launch(Launch),
    /// From byte `.1` of a buffer of parameter blocks.
    Upload(Buffer, u64, Span),
    Read(Span),
}

/// Bytes of a buffer of parameter blocks; a recording that needs more takes several.
const PARAMS_BYTES: usize = 1 << 15;

/// What a submission does, in its order. What parameter blocks hold and what is uploaded before the first launch is no part of it.
#[derive(Default)]
struct Work {
    commands: Vec<Command>,
}

/// Commands that a device takes, with what they copy read-backs to.
struct Encoded {
    buffer: wgpu::CommandBuffer,
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
    /// What was submitted last, of which the first `same` commands are this recording's; once one differs, all are.
    ahead: Ahead,
    same: usize,
    differs: bool,
    /// What goes into each buffer of parameter blocks.
    params: Vec<Vec<u8>>,
    /// By buffer: what [`Recording::hold`] last had written to it.
    held: HashMap<u64, Vec<u8>>,
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
            params: Vec::new(),
            held: HashMap::new(),
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
        if self.repeats(|command| matches!(command, Command::Launch(launch) if launch.call == call)) {
            return Ok(());
        }
        let (pipeline, bind_group) = self.gpu.bound(kernel, variant, call.bound, (&params, buffers))?;
        self.ahead.last.commands.push(Command::Launch(Launch { call, pipeline, bind_group }));
        Ok(())
    }

    /// Whether the last submission did the same here: then it is here already.
    fn repeats(&mut self, is_same: impl FnOnce(&Command) -> bool) -> bool {
        let commands = &mut self.ahead.last.commands;
        if self.differs {
            return false;
        }
        if commands.get(self.same).is_some_and(is_same) {
            self.same += 1;
            return true;
        }
        commands.truncate(self.same);
        self.differs = true;
        false
    }

    fn commands(&self) -> &[Command] {
        if self.differs { &self.ahead.last.commands } else { &self.ahead.last.commands[..self.same] }
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

    /// Writes `data` at byte `offset`, for the launches from here on. Before the first one that is no command of the submission.
    pub(crate) fn write<T: Pod>(&mut self, buffer: &Buffer, offset: u64, data: &[T]) {
        if self.commands().is_empty() {
            return self.gpu.write(buffer, offset, data);
        }
        self.gpu.forget(buffer);
        self.held.remove(&buffer.id);
        let mut done = 0;
        for piece in bytemuck::cast_slice(data).chunks(PARAMS_BYTES) {
            let to = Span { buffer: buffer.clone(), offset: offset + done, bytes: piece.len() as u64 };
            done += to.bytes;
            if let Err(e) = self.upload(piece, to) {
                let _ = self.failure.get_or_insert(e);
            }
        }
    }

    /// As [`Gpu::hold`], for the launches from here on.
    pub(crate) fn hold<T: Pod>(&mut self, buffer: &Buffer, data: &[T]) {
        if self.commands().is_empty() {
            return self.gpu.hold(buffer, data);
        }
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let holds = match self.held.get(&buffer.id) {
            Some(held) => held.starts_with(bytes),
            None => self.gpu.holds(buffer, bytes),
        };
        if !holds {
            self.write(buffer, 0, data);
            self.held.insert(buffer.id, bytes.to_vec());
        }
    }

    fn upload(&mut self, piece: &[u8], to: Span) -> Result<(), EngineError> {
        let (block, at) = self.put(piece);
        let (from, at) = (self.gpu.params_buffer(block)?, u64::from(at));
        if !self
            .repeats(|command| matches!(command, Command::Upload(f, a, t) if (f, *a, t) == (&from, at, &to)))
        {
            self.ahead.last.commands.push(Command::Upload(from, at, to));
        }
        Ok(())
    }

    /// Asks for `count` elements of `T` from byte `offset` of `buffer`, as they are here.
    pub(crate) fn read<T: Pod>(&mut self, buffer: &Buffer, offset: u64, count: usize) {
        let bytes = (count * std::mem::size_of::<T>()) as u64;
        let span = Span { buffer: buffer.clone(), offset, bytes };
        if !self.repeats(|command| matches!(command, Command::Read(read) if *read == span)) {
            self.ahead.last.commands.push(Command::Read(span));
        }
    }

    /// How many launches it has.
    pub(crate) fn launches(&self) -> usize {
        self.commands().iter().filter(|command| matches!(command, Command::Launch(_))).count()
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
        self.held.iter().for_each(|(&buffer, bytes)| gpu.note_held(buffer, bytes));
        let Ahead { last: mut work, again } = self.ahead;
        let repeats = !self.differs && self.same == work.commands.len();
        if !self.differs {
            work.commands.truncate(self.same);
        }
        let launches = work.launches().map(|of| (of.call.kernel, of.call.variant));
        let stamps = gpu.stamps(|| launches.collect());
        let encoded = match again.filter(|_| repeats && stamps.is_none()) {
            Some(encoded) => encoded,
            None => work.encode(gpu, stamps.as_ref())?,
        };
        let index = gpu.queue.submit([encoded.buffer]);
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
    fn launches(&self) -> impl Iterator<Item = &Launch> {
        self.commands.iter().filter_map(|command| match command {
            Command::Launch(launch) => Some(launch),
            _ => None,
        })
    }

    fn encode(&self, gpu: &Gpu, stamps: Option<&Stamps>) -> Result<Encoded, EngineError> {
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let sizes: Vec<(u64, u64)> = self
            .commands
            .iter()
            .filter_map(|command| match command {
                Command::Read(Span { buffer, bytes, .. }) => {
                    Some((*bytes, buffer.copied(*bytes).next_multiple_of(8)))
                }
                _ => None,
            })
            .collect();
        let total: u64 = sizes.iter().map(|size| size.1).sum();
        let staging = (total > 0).then(|| gpu.take_staging(total));
        let (mut launched, mut read, mut at) = (0, 0, 0);
        let of_a_pass = |a: &Command, b: &Command| matches!((a, b), (Command::Launch(_), Command::Launch(_)));
        for run in self.commands.chunk_by(of_a_pass) {
            match &run[0] {
                Command::Launch(_) => {
                    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                    stamps.iter().filter(|_| launched == 0).for_each(|stamps| stamps.write(&mut pass, 0));
                    for command in run {
                        let Command::Launch(launch) = command else { continue };
                        launch.encode(&mut pass)?;
                        launched += 1;
                        stamps.iter().for_each(|stamps| stamps.write(&mut pass, launched));
                    }
                }
                Command::Upload(from, first, to) => {
                    encoder.copy_buffer_to_buffer(from.raw()?, *first, to.buffer.raw()?, to.offset, to.bytes);
                }
                Command::Read(Span { buffer, offset, bytes }) => {
                    if let Some(staging) = &staging {
                        buffer.copy_from(&mut encoder, (*offset, *bytes), staging, at);
                    }
                    at += sizes[read].1;
                    read += 1;
                }
            }
        }
        stamps.iter().filter(|_| launched > 0).for_each(|stamps| stamps.resolve(&mut encoder));
        Ok(Encoded { buffer: encoder.finish(), staging, sizes })
    }
}

impl Launch {
    fn encode(&self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), EngineError> {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[self.call.params_offset]);
        match &self.call.size {
            Size::Groups([x, y, z]) => pass.dispatch_workgroups(*x, *y, *z),
            Size::Indirect(buffer, offset) => pass.dispatch_workgroups_indirect(buffer.raw()?, *offset),
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Thrice, as the third is encoded ahead; then in another order.
    #[test]
    fn uploads_and_read_backs_are_done_where_they_are_recorded() {
        let gpu = Gpu::open(None, 0).expect("an adapter");
        let [a, b] = ["a", "b"].map(|name| gpu.buffer_of(name, &[0u32; 40_000]).expect("a buffer"));
        for round in [1u32, 2, 3, 4] {
            let long: Vec<u32> = (0..20_000).map(|i| i * round).collect();
            let mut r = Recording::new(&gpu);
            r.write(&a, 0, &[round, 10]);
            r.read::<u32>(&a, 0, 2);
            r.write(&a, 4, &[round + 100]);
            r.hold(&b, &long);
            r.read::<u32>(&a, 0, 2);
            if round < 4 {
                r.hold(&b, &long[..9]);
                r.read::<u32>(&b, 4 * 9_000, 1);
            }
            r.write(&b, 0, &[7u32]);
            r.hold(&b, &long[..2]);
            r.read::<u32>(&b, 0, 3);
            let read = r.submit().and_then(|submission| submission.fetch()).expect("read");
            let read: Vec<Vec<u32>> = read.iter().map(|part| bytemuck::pod_collect_to_vec(part)).collect();
            let mut expected = vec![vec![round, 10], vec![round, round + 100]];
            expected.extend((round < 4).then(|| vec![9_000 * round]));
            expected.push(vec![0, round, 2 * round]);
            assert_eq!(read, expected, "round {round}");
            // What is held is known behind the submission too.
            assert!(gpu.holds(&b, bytemuck::cast_slice(&[0, round])));
        }
    }
}
