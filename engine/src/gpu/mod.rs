//! The only place that knows wgpu: adapters, buffers, pipelines, and recordings of launches.

mod buffer;
mod device;
mod pipelines;
mod recording;
mod report;

pub(crate) use buffer::{Buffer, Usage};
pub(crate) use device::Gpu;
pub(crate) use recording::Recording;
pub use report::{DeviceReport, devices, prepare_process};
