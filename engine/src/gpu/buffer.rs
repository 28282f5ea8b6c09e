//! Device buffers, named so that an error tells which one did not fit; and matrices in textures, which are bound alike.

use super::Gpu;
use crate::EngineError;
use bytemuck::Pod;
use exflow_shaders::IMAGE_WIDTH;

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
    memory: Memory,
    bytes: u64,
    pub(super) id: u64,
}

#[derive(Debug, Clone)]
enum Memory {
    Buffer(wgpu::Buffer),
    /// Rows of [`IMAGE_WIDTH`] texels of 16 bytes.
    Image(wgpu::TextureView),
}

/// llvmpipe makes no larger textures.
const MAX_IMAGE_BYTES: u64 = 1 << 30;

impl Buffer {
    /// Size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether kernels see a texture.
    pub(super) fn is_image(&self) -> bool {
        matches!(self.memory, Memory::Image(_))
    }

    /// What a launch binds.
    pub(super) fn resource(&self) -> wgpu::BindingResource<'_> {
        match &self.memory {
            Memory::Buffer(raw) => raw.as_entire_binding(),
            Memory::Image(view) => wgpu::BindingResource::TextureView(view),
        }
    }

    /// The buffer itself, for copies and launches that it sizes.
    pub(super) fn raw(&self) -> Result<&wgpu::Buffer, EngineError> {
        match &self.memory {
            Memory::Buffer(raw) => Ok(raw),
            Memory::Image(_) => {
                Err(EngineError::Internal("a matrix in a texture is read by kernels only".into()))
            }
        }
    }
}

impl Gpu {
    /// A zeroed buffer of at least `bytes` bytes.
    pub(crate) fn buffer(&self, label: &str, bytes: u64, usage: Usage) -> Result<Buffer, EngineError> {
        let bytes = bytes.max(16).next_multiple_of(16);
        if bytes > self.max_binding_bytes() {
            return Err(EngineError::gpu(
                format!("{label}: {bytes} bytes, {} binds at most {}", self.name(), self.max_binding_bytes()),
                "use more ranks so that each holds less, or an adapter with larger bindings",
            ));
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
        Ok(Buffer { memory: Memory::Buffer(raw), bytes, id: self.next_buffer_id() })
    }

    /// A matrix of units as kernels read it best: CPUs load texels much faster than 16 bytes of a buffer.
    pub(crate) fn matrix(&self, label: &str, units: Vec<[u32; 4]>) -> Result<Buffer, EngineError> {
        let bytes = 16 * units.len() as u64;
        let rows = units.len().div_ceil(IMAGE_WIDTH) as u32;
        match self.is_cpu() && bytes <= MAX_IMAGE_BYTES && rows <= self.max_image_rows() {
            true => Ok(self.image(label, units)),
            false => self.buffer_of(label, &units),
        }
    }

    /// A texture that holds `units`.
    pub(crate) fn image(&self, label: &str, mut units: Vec<[u32; 4]>) -> Buffer {
        let width = units.len().clamp(1, IMAGE_WIDTH);
        let height = units.len().div_ceil(width).max(1);
        // All of it is written: a part would have the rest cleared first.
        units.resize(width * height, [0; 4]);
        let size = wgpu::Extent3d { width: width as u32, height: height as u32, depth_or_array_layers: 1 };
        let texture = self.device.create_texture(&wgpu::TextureDescriptor {
            label: Some(label),
            size,
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: wgpu::TextureFormat::Rgba32Uint,
            usage: wgpu::TextureUsages::STORAGE_BINDING | wgpu::TextureUsages::COPY_DST,
            view_formats: &[],
        });
        let row = wgpu::TexelCopyBufferLayout {
            offset: 0,
            bytes_per_row: Some(16 * size.width),
            rows_per_image: None,
        };
        self.queue.write_texture(texture.as_image_copy(), bytemuck::cast_slice(&units), row, size);
        let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
        Buffer { memory: Memory::Image(view), bytes: 16 * units.len() as u64, id: self.next_buffer_id() }
    }

    /// A buffer that holds `data`.
    pub(crate) fn buffer_of<T: Pod>(&self, label: &str, data: &[T]) -> Result<Buffer, EngineError> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.buffer(label, bytes.len() as u64, Usage::Storage)?;
        self.write(&buffer, 0, data);
        Ok(buffer)
    }

    /// Writes `data` at byte `offset`, before whatever is submitted next.
    pub(crate) fn write<T: Pod>(&self, buffer: &Buffer, offset: u64, data: &[T]) {
        if let (false, Memory::Buffer(raw)) = (data.is_empty(), &buffer.memory) {
            self.queue.write_buffer(raw, offset, bytemuck::cast_slice(data));
        }
    }
}
