//! The only place that knows wgpu: adapters, buffers, pipelines, and recordings of launches.

mod buffer;
mod device;
mod gather;
mod idle;
mod kept;
mod memory;
mod pipelines;
mod probe;
mod recording;
mod report;
mod stamps;
mod threads;
mod tuning;
mod units;

pub(crate) use buffer::{Buffer, Usage};
pub(crate) use device::Gpu;
pub(crate) use gather::Part;
pub use kept::KeptPipelines;
pub use memory::DeviceMemory;
pub use probe::{Probe, probe};
pub(crate) use recording::{Pending, Recording};
pub(crate) use report::chosen;
pub use report::{DeviceReport, devices, launch_threads_set, prepare_process};
pub use threads::{keep_pool_from_bytes, pool_from_bytes};
pub(crate) use tuning::{Cut, EXPERT_ROWS, Form, LINEAR_ROWS, Tuning, weights_name};
pub use tuning::{FormTuning, TileUpTo, TuningReport};
pub(crate) use units::OnUnits;
