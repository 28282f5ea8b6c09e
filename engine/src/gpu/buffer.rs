//! Device buffers, named so that an error tells which one did not fit; and matrices in textures, which are bound alike.

use super::Gpu;
use crate::EngineError;
use bytemuck::Pod;
use exflow_shaders::{IMAGE_WIDTH, Weights};

/// What a buffer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Usage {
    /// Storage, written by uploads and kernels, read back at will.
    Storage,
    /// Storage that also sizes launches.
    Indirect,
    /// Parameter blocks.
    Uniform,
}

/// A buffer on one device, or a texture that stands for one.
#[derive(Debug, Clone)]
pub(crate) struct Buffer {
    pub(super) memory: Memory,
    /// Where it begins in a buffer that it is a part of.
    offset: u64,
    bytes: u64,
    pub(super) id: u64,
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

#[derive(Debug, Clone)]
pub(super) enum Memory {
    Buffer(wgpu::Buffer),
    /// Rows of [`IMAGE_WIDTH`] texels.
    Image(wgpu::Texture, wgpu::TextureView),
}

/// A unit of a matrix.
pub(super) const UNIT_BYTES: u64 = 16;

/// llvmpipe makes no larger textures.
const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// What a list takes that is compared with the one before it: all of a step's parameters, or what is as small.
const HELD_BYTES: usize = 1 << 15;

impl Buffer {
    /// Size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether kernels see a texture.
    pub(crate) fn is_image(&self) -> bool {
        matches!(self.memory, Memory::Image(..))
    }

    /// What a launch binds.
    pub(super) fn resource(&self) -> wgpu::BindingResource<'_> {
        match &self.memory {
            Memory::Buffer(buffer) => wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer,
                offset: self.offset,
                size: std::num::NonZeroU64::new(self.bytes),
            }),
            Memory::Image(_, view) => wgpu::BindingResource::TextureView(view),
        }
    }

    /// Bytes that [`Buffer::copy_from`] copies where `size` are asked for: whole rows of a texture.
    pub(super) fn copied(&self, size: u64) -> u64 {
        match &self.memory {
            Memory::Buffer(_) => size,
            Memory::Image(texture, _) => size.next_multiple_of(self.bytes / u64::from(texture.height())),
        }
    }

    /// Records a copy of `size` bytes from byte `offset` on to byte `at` of `staging`; from the beginning of a texture, which has
    /// rows of whole [`IMAGE_WIDTH`]s then, in whole rows.
    pub(super) fn copy_from(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        (offset, size): (u64, u64),
        staging: &wgpu::Buffer,
        at: u64,
    ) {
        match &self.memory {
            Memory::Buffer(raw) => {
                encoder.copy_buffer_to_buffer(raw, self.offset + offset, staging, at, size)
            }
            Memory::Image(texture, _) if offset > 0 => {
                let row = self.bytes / u64::from(texture.height());
                let texel = row / u64::from(texture.width());
                // Parts of rows: a part of one is a copy of its own.
                let mut done = 0;
                while done < size {
                    let (x, y) = ((offset + done) % row, (offset + done) / row);
                    let part = (size - done).min(row - x);
                    let from = wgpu::TexelCopyTextureInfo {
                        origin: wgpu::Origin3d { x: (x / texel) as u32, y: y as u32, z: 0 },
                        ..texture.as_image_copy()
                    };
                    let layout = wgpu::TexelCopyBufferLayout { offset: at + done, ..Default::default() };
                    let to = wgpu::TexelCopyBufferInfo { buffer: staging, layout };
                    let width = (part / texel) as u32;
                    let extent = wgpu::Extent3d { width, height: 1, depth_or_array_layers: 1 };
                    encoder.copy_texture_to_buffer(from, to, extent);
                    done += part;
                }
            }
            Memory::Image(texture, _) => {
                let row = self.bytes / u64::from(texture.height());
                let layout = wgpu::TexelCopyBufferLayout {
                    offset: at,
                    bytes_per_row: Some(row as u32),
                    rows_per_image: None,
                };
                let height = (self.copied(size) / row) as u32;
                let size = wgpu::Extent3d { width: texture.width(), height, depth_or_array_layers: 1 };
                let to = wgpu::TexelCopyBufferInfo { buffer: staging, layout };
                encoder.copy_texture_to_buffer(texture.as_image_copy(), to, size);
            }
        }
    }

    /// Units from unit `unit` to the end of its row; `None` where there are no rows.
    pub(super) fn rest_of_row(&self, unit: usize) -> Option<usize> {
        match &self.memory {
            Memory::Buffer(_) => None,
            Memory::Image(texture, _) => Some(texture.width() as usize - unit % texture.width() as usize),
        }
    }

    /// The buffer itself, for launches that it sizes.
    pub(super) fn raw(&self) -> Result<&wgpu::Buffer, EngineError> {
        match &self.memory {
            Memory::Buffer(raw) => Ok(raw),
            Memory::Image(..) => Err(EngineError::Internal("a texture sizes no launch".into())),
        }
    }
}

/// Texels of so many words.
pub(super) fn texel_format(words: u32) -> wgpu::TextureFormat {
    match words {
        1 => wgpu::TextureFormat::R32Uint,
        2 => wgpu::TextureFormat::Rg32Uint,
        _ => wgpu::TextureFormat::Rgba32Uint,
    }
}

impl Gpu {
    /// A zeroed buffer of at least `bytes` bytes.
    pub(crate) fn buffer(&self, label: &str, bytes: u64, usage: Usage) -> Result<Buffer, EngineError> {
        let bytes = bytes.max(16).next_multiple_of(16);
        if bytes > self.max_binding_bytes() {
            return Err(self.too_large(label, bytes, ""));
        }
        let flags = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let flags = flags
            | match usage {
                Usage::Storage => wgpu::BufferUsages::STORAGE,
                Usage::Indirect => wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::INDIRECT,
                Usage::Uniform => wgpu::BufferUsages::UNIFORM,
            };
        let raw = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: bytes,
            usage: flags,
            mapped_at_creation: false,
        });
        Ok(Buffer { memory: Memory::Buffer(raw), offset: 0, bytes, id: self.next_buffer_id() })
    }

    /// At most `bytes` bytes of a buffer from byte `offset` on, a multiple of 256, for launches to bind; what is uploaded goes
    /// to the whole.
    pub(crate) fn part(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Buffer {
        let memory = buffer.memory.clone();
        let bytes = bytes.min(buffer.bytes - offset);
        Buffer { memory, offset: buffer.offset + offset, bytes, id: self.next_buffer_id() }
    }

    /// A matrix of units as kernels read it best: CPUs load texels much faster than 16 bytes of a buffer.
    pub(crate) fn matrix(
        &self,
        label: &str,
        form: Weights,
        units: Vec<[u32; 4]>,
    ) -> Result<Buffer, EngineError> {
        let bytes = UNIT_BYTES * units.len() as u64;
        self.check_matrix(label, form, bytes)?;
        match self.wants_textures(form) && self.fits_image(bytes, 4) {
            true => Ok(self.image_of(label, units)),
            false => self.buffer_of(label, &units),
        }
    }

    /// Memory for a matrix of so many units, for copies or [`Gpu::put_units`] to fill.
    pub(crate) fn empty_matrix(
        &self,
        label: &str,
        form: Weights,
        units: usize,
    ) -> Result<Buffer, EngineError> {
        let bytes = UNIT_BYTES * units as u64;
        self.check_matrix(label, form, bytes)?;
        match self.wants_textures(form) && self.fits_image(bytes, 4) {
            true => Ok(self.image(label, units.clamp(1, IMAGE_WIDTH), units, 4)),
            false => self.buffer(label, bytes, Usage::Storage),
        }
    }

    /// Zeroed memory of `words` words for a cache whose elements are `per_texel` words.
    pub(crate) fn cache(&self, label: &str, words: u64, per_texel: u32) -> Result<Buffer, EngineError> {
        match self.is_cpu() && self.fits_image(4 * words, per_texel) {
            true => {
                Ok(self.image(label, IMAGE_WIDTH, words.div_ceil(u64::from(per_texel)) as usize, per_texel))
            }
            false if 4 * words > self.max_binding_bytes() => Err(self.too_large(
                label,
                4 * words,
                "have fewer positions (--ctx-size) or a smaller --kv-dtype, or ",
            )),
            false => self.buffer(label, 4 * words, Usage::Storage),
        }
    }

    /// Whether one binding takes a matrix, which is not cut.
    fn check_matrix(&self, label: &str, form: Weights, bytes: u64) -> Result<(), EngineError> {
        let fits =
            bytes <= self.max_binding_bytes() || self.wants_textures(form) && self.fits_image(bytes, 4);
        let smaller = "hold weights in fewer bytes (--dtype f16, --quant q8_0 or q4_0), or ";
        if fits { Ok(()) } else { Err(self.too_large(label, bytes, smaller)) }
    }

    fn too_large(&self, label: &str, bytes: u64, otherwise: &str) -> EngineError {
        EngineError::gpu(
            format!("{label}: {bytes} bytes, {} binds at most {}", self.name(), self.max_binding_bytes()),
            format!("{otherwise}use an adapter with larger bindings (`exflow devices` tells them)"),
        )
    }

    /// Writes units of a matrix from unit `first` on, before whatever is submitted next.
    pub(crate) fn put_units(&self, matrix: &Buffer, first: usize, units: &[[u32; 4]]) {
        let Memory::Image(texture, _) = &matrix.memory else {
            self.write(matrix, UNIT_BYTES * first as u64, units);
            return self.uploads(UNIT_BYTES * units.len() as u64);
        };
        // What is left of a row, whole rows, and the beginning of one.
        let width = texture.width() as usize;
        let mut done = 0;
        while done < units.len() {
            let (at, left) = (first + done, units.len() - done);
            let (x, y) = (at % width, at / width);
            let (columns, rows) = match x {
                0 if left >= width => (width, left / width),
                _ => (left.min(width - x), 1),
            };
            let part = &units[done..done + columns * rows];
            let origin = wgpu::Origin3d { x: x as u32, y: y as u32, z: 0 };
            let layout = wgpu::TexelCopyBufferLayout {
                offset: 0,
                bytes_per_row: Some((UNIT_BYTES as usize * columns) as u32),
                rows_per_image: None,
            };
            let size =
                wgpu::Extent3d { width: columns as u32, height: rows as u32, depth_or_array_layers: 1 };
            let to = wgpu::TexelCopyTextureInfo { origin, ..texture.as_image_copy() };
            self.queue.write_texture(to, bytemuck::cast_slice(part), layout, size);
            done += part.len();
        }
        self.uploads(UNIT_BYTES * units.len() as u64);
    }

    /// A texture that holds `units`, texels of as many words each as an array has.
    pub(crate) fn image_of<const WORDS: usize>(&self, label: &str, mut units: Vec<[u32; WORDS]>) -> Buffer
    where
        [u32; WORDS]: Pod,
    {
        let width = units.len().clamp(1, IMAGE_WIDTH);
        let buffer = self.image(label, width, units.len(), WORDS as u32);
        if let Memory::Image(texture, _) = &buffer.memory {
            // All of it is written: a part would have the rest cleared first.
            units.resize(width * texture.height() as usize, [0; WORDS]);
            let row = wgpu::TexelCopyBufferLayout {
                offset: 0,
                bytes_per_row: Some((4 * WORDS * width) as u32),
                rows_per_image: None,
            };
            let (data, size) = (bytemuck::cast_slice(&units), texture.size());
            self.queue.write_texture(texture.as_image_copy(), data, row, size);
            self.uploads(buffer.bytes());
        }
        buffer
    }

    /// The largest matrix in this form that one binding takes, in bytes.
    pub(crate) fn max_matrix_bytes(&self, form: Weights) -> u64 {
        let row = UNIT_BYTES * IMAGE_WIDTH as u64;
        let most = match self.wants_textures(form) {
            true => MAX_IMAGE_BYTES.min(row * u64::from(self.max_image_rows())),
            false => self.max_binding_bytes(),
        };
        self.within_chunk(most)
    }

    /// The most bytes of what is cut that lie together in a buffer.
    pub(crate) fn max_part_bytes(&self) -> u64 {
        self.within_chunk(self.max_binding_bytes())
    }

    fn within_chunk(&self, most: u64) -> u64 {
        self.most_in_chunk().map_or(most, |limit| limit.min(most))
    }

    fn fits_image(&self, bytes: u64, words: u32) -> bool {
        let rows = bytes.div_ceil(4 * u64::from(words) * IMAGE_WIDTH as u64);
        bytes <= MAX_IMAGE_BYTES && rows <= u64::from(self.max_image_rows())
    }

    fn image(&self, label: &str, width: usize, texels: usize, words: u32) -> Buffer {
        let height = texels.div_ceil(width).max(1) as u32;
        let texture = self.device.create_texture(&wgpu::TextureDescriptor {
            label: Some(label),
            size: wgpu::Extent3d { width: width as u32, height, depth_or_array_layers: 1 },
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: texel_format(words),
            usage: wgpu::TextureUsages::STORAGE_BINDING
                | wgpu::TextureUsages::COPY_DST
                | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
        let bytes = 4 * u64::from(words) * width as u64 * u64::from(height);
        Buffer { memory: Memory::Image(texture, view), offset: 0, bytes, id: self.next_buffer_id() }
    }

    /// A buffer that holds `data`.
    pub(crate) fn buffer_of<T: Pod>(&self, label: &str, data: &[T]) -> Result<Buffer, EngineError> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.buffer(label, bytes.len() as u64, Usage::Storage)?;
        self.write(&buffer, 0, data);
        self.uploads(buffer.bytes());
        Ok(buffer)
    }

    /// Has a buffer that no kernel writes begin with `data`, before whatever is submitted next: where it does so already, as
    /// from step to step with most lists, nothing is uploaded.
    pub(crate) fn hold<T: Pod>(&self, buffer: &Buffer, data: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        if !self.holds(buffer, bytes) {
            self.write(buffer, 0, data);
            self.note_held(buffer.id, bytes);
        }
    }

    /// Whether a buffer that no kernel writes is known to begin with these bytes.
    pub(super) fn holds(&self, buffer: &Buffer, bytes: &[u8]) -> bool {
        self.held.borrow().get(&buffer.id).is_some_and(|held| held.starts_with(bytes))
    }

    pub(super) fn note_held(&self, buffer: u64, bytes: &[u8]) {
        if bytes.len() <= HELD_BYTES {
            self.held.borrow_mut().insert(buffer, bytes.to_vec());
        }
    }

    pub(super) fn forget(&self, buffer: &Buffer) {
        self.held.borrow_mut().remove(&buffer.id);
    }

    /// Writes `data` at byte `offset`, before whatever is submitted next.
    pub(crate) fn write<T: Pod>(&self, buffer: &Buffer, offset: u64, data: &[T]) {
        if let (false, Memory::Buffer(raw)) = (data.is_empty(), &buffer.memory) {
            self.forget(buffer);
            self.queue.write_buffer(raw, offset, bytemuck::cast_slice(data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_binding_takes_is_refused_by_name() {
        let gpu = Gpu::open(None, 0).expect("an adapter");
        let limit = format!("binds at most {}", gpu.max_binding_bytes());
        let refused = [
            gpu.empty_matrix("h.0.attn.c_attn.weight", Weights::F16, 1 << 50).map(|_| ()),
            gpu.cache("KV cache", 1 << 50, 4).map(|_| ()),
            gpu.buffer("logits", 1 << 50, Usage::Storage).map(|_| ()),
        ];
        let told = refused.map(|result| result.expect_err("beyond any adapter").to_string());
        for (text, label, bytes, remedy) in [
            (&told[0], "h.0.attn.c_attn.weight", 1u64 << 54, "--quant q8_0"),
            (&told[1], "KV cache", 1 << 52, "--ctx-size"),
            (&told[2], "logits", 1 << 50, "use an adapter with larger bindings"),
        ] {
            let all = [label, &bytes.to_string(), &limit, remedy];
            assert!(all.iter().all(|part| text.contains(part)), "{text}");
        }
    }
}
