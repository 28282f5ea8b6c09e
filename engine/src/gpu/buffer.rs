//! Device buffers, named so that an error tells which one did not fit.

use super::Gpu;
use crate::EngineError;
use bytemuck::Pod;

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

/// A buffer on one device.
#[derive(Debug, Clone)]
pub(crate) struct Buffer {
    pub(super) raw: wgpu::Buffer,
    pub(super) id: u64,
}

impl Buffer {
    /// Size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.raw.size()
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
        Ok(Buffer { raw, id: self.next_buffer_id() })
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
        if !data.is_empty() {
            self.queue.write_buffer(&buffer.raw, offset, bytemuck::cast_slice(data));
        }
    }
}
