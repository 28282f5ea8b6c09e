//! A matrix made on the device out of parts of others, whichever of them are textures.

use super::Gpu;
use super::buffer::{Buffer, Memory, UNIT_BYTES, Usage};
use crate::EngineError;
use exflow_shaders::Weights;

/// Consecutive units of a buffer.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) of: &'a Buffer,
    pub(crate) first: usize,
    pub(crate) units: usize,
}

impl Gpu {
    /// The parts one behind the other, in memory of the kind that [`Gpu::matrix`] takes for that form; `None`: in a buffer.
    pub(crate) fn gather(
        &self,
        label: &str,
        parts: &[Part<'_>],
        form: Option<Weights>,
    ) -> Result<Buffer, EngineError> {
        let units: usize = parts.iter().map(|part| part.units).sum();
        let whole = match form {
            Some(form) => self.empty_matrix(label, form, units)?,
            None => self.buffer(label, UNIT_BYTES * units as u64, Usage::Storage)?,
        };
        let mut at = 0;
        let places = parts.iter().map(|part| {
            at += part.units;
            (*part, &whole, at - part.units)
        });
        self.copy_units(places);
        self.uploads(whole.bytes());
        Ok(whole)
    }

    /// Copies parts to where they are to stand in other buffers: (part, buffer, its first unit there). No buffer is both.
    pub(crate) fn copy_units<'a>(&self, parts: impl Iterator<Item = (Part<'a>, &'a Buffer, usize)>) {
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for (part, to, at) in parts {
            let mut done = 0;
            while done < part.units {
                let (from, there, left) = (part.first + done, at + done, part.units - done);
                done += copy_run(&mut encoder, (part.of, from), (to, there), left);
            }
        }
        self.queue.submit([encoder.finish()]);
    }

    /// Waits until the device has done all that it was given.
    pub(crate) fn wait(&self) {
        // A device that is lost says so at the next read-back.
        let _ = self.device.poll(wgpu::PollType::wait_indefinitely());
    }
}

/// Records a copy of as many units as one command can take, `most` at most; returns how many those are. A texture's
/// row ends a run, unless both sides are textures and stand at the beginnings of equal rows.
fn copy_run(
    encoder: &mut wgpu::CommandEncoder,
    (from, first): (&Buffer, usize),
    (to, at): (&Buffer, usize),
    most: usize,
) -> usize {
    let (left, right) = (from.rest_of_row(first), to.rest_of_row(at));
    let run = most.min(left.unwrap_or(most)).min(right.unwrap_or(most));
    let bytes = |units: usize| UNIT_BYTES * units as u64;
    let layout = |unit: usize| wgpu::TexelCopyBufferLayout {
        offset: bytes(unit),
        ..wgpu::TexelCopyBufferLayout::default()
    };
    let row = wgpu::Extent3d { width: run as u32, height: 1, depth_or_array_layers: 1 };
    match (&from.memory, &to.memory) {
        (Memory::Buffer(source), Memory::Buffer(target)) => {
            encoder.copy_buffer_to_buffer(source, bytes(first), target, bytes(at), bytes(run));
        }
        (Memory::Buffer(source), Memory::Image(target, _)) => {
            let source = wgpu::TexelCopyBufferInfo { buffer: source, layout: layout(first) };
            encoder.copy_buffer_to_texture(source, texel(target, at), row);
        }
        (Memory::Image(source, _), Memory::Buffer(target)) => {
            let target = wgpu::TexelCopyBufferInfo { buffer: target, layout: layout(at) };
            encoder.copy_texture_to_buffer(texel(source, first), target, row);
        }
        (Memory::Image(source, _), Memory::Image(target, _)) => {
            let width = source.width() as usize;
            let rows = match source.width() == target.width() && left == Some(width) && right == left {
                true => (most / width).max(1),
                false => 1,
            };
            let size = wgpu::Extent3d { height: rows as u32, ..row };
            encoder.copy_texture_to_texture(texel(source, first), texel(target, at), size);
            return run * rows;
        }
    }
    run
}

/// Where a unit stands in a texture.
fn texel(texture: &wgpu::Texture, unit: usize) -> wgpu::TexelCopyTextureInfo<'_> {
    let width = texture.width() as usize;
    let origin = wgpu::Origin3d { x: (unit % width) as u32, y: (unit / width) as u32, z: 0 };
    wgpu::TexelCopyTextureInfo { origin, ..texture.as_image_copy() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Recording;

    #[test]
    fn parts_of_textures_and_buffers_come_one_behind_the_other() {
        let gpu = Gpu::open(None, 0).expect("an adapter");
        let unit = |i: usize| [i as u32, 1, 2, 3];
        let units = |range: std::ops::Range<usize>| range.map(unit).collect::<Vec<_>>();
        // One of several rows, one of less than a row, and a buffer.
        let long = gpu.matrix("long", Weights::F32, units(0..70_000)).expect("long");
        let short = gpu.matrix("short", Weights::F32, units(100_000..100_700)).expect("short");
        let plain = gpu.buffer_of("plain", &units(200_000..220_000)).expect("plain");
        let parts = [
            (&long, 0, 40_000, 0),
            (&short, 3, 690, 100_000),
            (&plain, 5, 19_000, 200_000),
            (&long, 32_768, 32_768, 0),
            (&plain, 0, 1, 200_000),
        ];
        let expected: Vec<[u32; 4]> =
            parts.iter().flat_map(|(_, first, n, base)| units(base + first..base + first + n)).collect();
        let parts = parts.map(|(of, first, units, _)| Part { of, first, units });
        for form in [Some(Weights::F32), None] {
            let whole = gpu.gather("whole", &parts, form).expect("gathered");
            let mut recording = Recording::new(&gpu);
            recording.read::<[u32; 4]>(&whole, 0, expected.len());
            let read = recording.submit().and_then(|submission| submission.fetch()).expect("read");
            let got: &[[u32; 4]] = bytemuck::cast_slice(&read[0]);
            assert!(got == expected, "{form:?}");
        }
    }
}
