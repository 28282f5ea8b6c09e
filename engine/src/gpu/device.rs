//! One device: the adapter that a rank runs on, with its queue and caches.

use super::idle::{self, Idle};
use super::kept::Kept;
use super::pipelines::{PipelineCache, Pipelines};
use super::recording::Ahead;
use super::report::Candidate;
use super::tuning::{Cut, Form, Tuning};
use super::units::OnUnits;
use crate::EngineError;
use exflow_shaders::{
    COOPERATIVE_BYTES, COOPERATIVE_SUBGROUPS, Columns, Cooperative, Kernel, Variant, Weights,
};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A wgpu device with what is cached for it. Belongs to one rank and its thread.
pub(crate) struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) pipelines: RefCell<Pipelines>,
    /// Pipelines that were there when this rank began.
    known: usize,
    /// What the driver compiled of them, with its file.
    pub(super) kept: Option<Kept>,
    pub(super) staging: RefCell<Vec<wgpu::Buffer>>,
    pub(super) params: RefCell<Vec<super::Buffer>>,
    pub(super) ahead: RefCell<Ahead>,
    /// By buffer: what [`Gpu::hold`] last wrote to it.
    pub(super) held: RefCell<HashMap<u64, Vec<u8>>>,
    pub(super) failure: Arc<Mutex<Option<String>>>,
    next_buffer_id: AtomicU64,
    uploading: AtomicU64,
    limits: wgpu::Limits,
    name: String,
    /// The adapter's place among this machine's.
    adapter: usize,
    handle: wgpu::Adapter,
    is_cpu: bool,
    hands_over: bool,
    width: usize,
    tuning: Tuning,
    most_in_chunk: Option<u64>,
    draws: bool,
    fast: bool,
    /// Rows and columns of the matrices that its matrix units multiply, where this device may use them.
    matrix_side: Option<usize>,
    /// What products are made on those where numerics are fast.
    on_units: OnUnits,
    /// Why they are not used, where they were to be.
    units_fault: Option<String>,
    largest_subgroup: u32,
}

/// Bytes that may wait for their way to the device; fewer where that is the host's own memory, as what was once waiting there
/// stays with the process.
const UPLOAD_WINDOW: u64 = 32 << 20;
const HOST_UPLOAD_WINDOW: u64 = 8 << 20;

/// Bytes of the blocks of memory that buffers share on a CPU adapter. What the host can map, all of it in lavapipe, has blocks of half
/// of it.
const CPU_BLOCK: u64 = 8 << 20;

/// How long an ending rank waits for what its device still computes.
const LAST_WORK: Duration = Duration::from_secs(5);

impl Gpu {
    /// Opens the adapter that `wanted` names (a part of its name or its index), or the best one; rank `rank`
    /// takes its turn among equally good ones.
    pub(crate) fn open(wanted: Option<&str>, rank: usize) -> Result<Self, EngineError> {
        Self::open_as(wanted, rank, false)
    }

    /// Opens one, where it has them with its matrix units: wgpu calls what they take an experiment, so that devices that
    /// do without them are made without.
    pub(crate) fn open_with_matrix_units(wanted: Option<&str>, rank: usize) -> Result<Self, EngineError> {
        Self::open_as(wanted, rank, true)
    }

    fn open_as(wanted: Option<&str>, rank: usize, with_units: bool) -> Result<Self, EngineError> {
        let Candidate { adapter, report } = super::report::choose(wanted, rank)?;
        let matrix_side = report.matrix_side.filter(|_| with_units);
        let units = matrix_side.is_some();
        let Idle { device, queue, pipelines, kept, failure, .. } =
            idle::take(report.index, &report.name, units)
                .map_or_else(|| make(&adapter, &report.name, units), Ok)?;
        if let Some(note) = &report.tuning.note {
            tracing::info!("{}: {note}; rules choose its kernels", report.name);
        }
        Ok(Self {
            is_cpu: report.kind == "cpu",
            // Asked for once: it takes files of the system, and a step goes by it in every layer.
            width: match report.kind == "cpu" {
                true => std::thread::available_parallelism().map_or(1, |threads| threads.get()),
                false => 512,
            },
            hands_over: device.features().contains(wgpu::Features::SUBGROUP) && report.has_lanes(),
            tuning: report.tuning.found(),
            name: report.name,
            adapter: report.index,
            handle: adapter,
            known: pipelines.len(),
            pipelines: RefCell::new(pipelines.into()),
            kept,
            staging: RefCell::default(),
            params: RefCell::default(),
            ahead: RefCell::default(),
            held: RefCell::default(),
            most_in_chunk: None,
            draws: report.kind != "cpu",
            fast: false,
            matrix_side,
            on_units: OnUnits::default(),
            units_fault: None,
            largest_subgroup: report.subgroup.map_or(1, |(_, largest)| largest),
            failure,
            next_buffer_id: AtomicU64::new(0),
            uploading: AtomicU64::new(0),
            limits: device.limits(),
            device,
            queue,
        })
    }

    /// The adapter's name, for reports.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its adapter's place among this machine's.
    pub(crate) fn adapter(&self) -> usize {
        self.adapter
    }

    /// Bytes that this device has allocated, where the driver's interface tells.
    pub(crate) fn allocated_bytes(&self) -> Option<u64> {
        self.device.generate_allocator_report().map(|report| report.total_allocated_bytes)
    }

    /// Bytes of the adapter's memory that nobody has taken, where the driver or the system tells.
    pub(crate) fn free_bytes(&self) -> Option<u64> {
        super::memory::of(&self.handle, self.is_cpu)?.free_bytes
    }

    /// The largest storage binding in bytes.
    pub(crate) fn max_binding_bytes(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size)
    }

    /// Rows of a texture.
    pub(super) fn max_image_rows(&self) -> u32 {
        self.limits.max_texture_dimension_2d
    }

    /// Lanes per workgroup of kernels that leave it open: lavapipe runs eight lanes as one vector, GPUs want
    /// one or two subgroups.
    pub(crate) fn workgroup(&self) -> u32 {
        if self.is_cpu { 8 } else { 64 }
    }

    /// Workgroups that keep the device busy: one for each thread of a CPU, some for each of the many cores of a GPU, of
    /// which nobody tells how many there are.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Whether the adapter is a CPU, which wants groups of one vector.
    pub(crate) fn is_cpu(&self) -> bool {
        self.is_cpu
    }

    /// Whether lanes can hand each other values: subgroups of eight lanes at least.
    pub(crate) fn hands_over(&self) -> bool {
        self.hands_over
    }

    /// Whether tokens are drawn here; on a CPU the host does that in less time, whose memory the logits are in.
    pub(crate) fn draws(&self) -> bool {
        self.draws
    }

    /// Has it draw or not; `None`: as above.
    pub(crate) fn set_draws(&mut self, draws: Option<bool>) {
        self.draws = draws.unwrap_or(!self.is_cpu);
    }

    /// Has experts, embedding, head and logits lie in chunks of at most so many bytes; `None`: of as many as one binding takes.
    pub(crate) fn limit_chunks(&mut self, bytes: Option<u64>) {
        self.most_in_chunk = bytes;
    }

    pub(super) fn most_in_chunk(&self) -> Option<u64> {
        self.most_in_chunk
    }

    /// Has products be formed by whatever is quickest, or in the one order of f32.
    pub(crate) fn set_fast(&mut self, fast: bool) {
        self.fast = fast;
    }

    /// Rows and columns of the matrices of f16 that its matrix units multiply and add in f32, where this device may use them.
    pub(crate) fn matrix_side(&self) -> Option<usize> {
        self.matrix_side
    }

    /// Has products of matrices in these forms be made on its matrix units where numerics are fast.
    pub(crate) fn use_matrix_units(&mut self, forms: OnUnits) {
        self.on_units = if self.matrix_side.is_some() { forms } else { OnUnits::default() };
    }

    /// Which products are made on matrix units where numerics are fast.
    pub(crate) fn on_units(&self) -> OnUnits {
        self.on_units
    }

    /// Notes why products that were to be made on its matrix units are not.
    pub(crate) fn note_units_fault(&mut self, fault: String) {
        self.units_fault = Some(fault);
    }

    /// Why products that were to be made on its matrix units are not.
    pub(crate) fn units_fault(&self) -> Option<&str> {
        self.units_fault.as_deref()
    }

    /// Rows and columns of the matrices that products are made of on its matrix units; 0: none is.
    pub(crate) fn side_in_use(&self) -> usize {
        if self.on_units.is_empty() { 0 } else { self.matrix_side.unwrap_or(0) }
    }

    /// What multiplies where matrix units do.
    pub(crate) fn units(&self) -> Cooperative {
        self.matrix_side.map_or(Cooperative::No, Cooperative::of_side)
    }

    /// Lanes of a workgroup that makes a variant's products.
    pub(super) fn lanes(&self, variant: Variant) -> u32 {
        match variant.cooperative {
            Cooperative::No => self.workgroup(),
            _ => COOPERATIVE_SUBGROUPS * self.largest_subgroup,
        }
    }

    /// Workgroups of a matrix kernel along `n4` vec4s of columns.
    pub(crate) fn matrix_groups(&self, kernel: Kernel, variant: Variant, n4: usize) -> u32 {
        n4.div_ceil(variant.group_columns4(kernel, self.workgroup() as usize)) as u32
    }

    /// The variant that makes `n4` vec4s of columns, and its workgroups along them. A workgroup of one row is dear on a CPU, and what it
    /// makes beyond the last column is work that is thrown away: wider ones run where they make no more of it, unless `devices --tune`
    /// found that they gain nothing.
    pub(crate) fn along(&self, kernel: Kernel, variant: Variant, n4: usize) -> (Variant, u32) {
        let (two, three) = self.widths(kernel, variant, n4);
        let rule = self.is_cpu && self.hands_over;
        match three {
            Some(three) if self.cut(variant.weights).tuned.map_or(rule, |of| of.wide) => three,
            _ => two,
        }
    }

    /// The same by two vec4s of columns a lane, and by three where those make no more beyond the last column.
    pub(crate) fn widths(
        &self,
        kernel: Kernel,
        variant: Variant,
        n4: usize,
    ) -> ((Variant, u32), Option<(Variant, u32)>) {
        let [two, three] = [Columns::Two, Columns::Three].map(|columns| {
            let variant = Variant { columns, ..variant }.of(kernel);
            (variant, self.matrix_groups(kernel, variant, n4))
        });
        let made = |(variant, groups): &(Variant, u32)| variant.columns.count() as u32 * groups;
        let is_wider = three.0.columns == Columns::Three && made(&three) <= made(&two);
        (two, is_wider.then_some(three))
    }

    /// How matrices in this form are worked on.
    pub(crate) fn cut(&self, form: Weights) -> Cut<'_> {
        let cooperates = self.fast && self.on_units.has(form);
        let cooperative = if cooperates { self.units() } else { Cooperative::No };
        let form = Form::new(form, self.fast);
        Cut { form, is_cpu: self.is_cpu, tuned: self.tuning.get(&form.name()), cooperative }
    }

    /// Whether matrices in this form are textures, where they fit into one.
    pub(crate) fn wants_textures(&self, form: Weights) -> bool {
        self.cut(form).tuned.map_or(self.is_cpu, |of| of.textures)
    }

    pub(super) fn uniform_alignment(&self) -> u64 {
        u64::from(self.limits.min_uniform_buffer_offset_alignment).max(4)
    }

    pub(super) fn next_buffer_id(&self) -> u64 {
        self.next_buffer_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Notes that `bytes` wait for their way to the device, and sends them off where those are many: until then they are
    /// there twice.
    pub(super) fn uploads(&self, bytes: u64) {
        let window = if self.is_cpu { HOST_UPLOAD_WINDOW } else { UPLOAD_WINDOW };
        if self.uploading.fetch_add(bytes, Ordering::Relaxed) + bytes >= window {
            self.uploading.store(0, Ordering::Relaxed);
            self.queue.submit([]);
            // A device that is lost says so at the next read-back.
            let _ = self.device.poll(wgpu::PollType::wait_indefinitely());
        }
    }

    /// Fails if the device reported an error since it was opened.
    pub(crate) fn check(&self) -> Result<(), EngineError> {
        let first = self.failure.lock().ok().and_then(|seen| seen.clone());
        match first {
            None => Ok(()),
            Some(error) => Err(EngineError::gpu(
                format!("{}: {error}", self.name),
                "run `exflow selftest`; if it passes, report this with the command that led to it",
            )),
        }
    }
}

impl Drop for Gpu {
    /// Leaves the device for the next rank, unless something went wrong with it.
    fn drop(&mut self) {
        let idle = wgpu::PollType::Wait { submission_index: None, timeout: Some(LAST_WORK) };
        let sound = self.device.poll(idle).is_ok() && self.check().is_ok();
        if sound && !std::thread::panicking() {
            let pipelines = std::mem::take(&mut self.pipelines.get_mut().pipelines);
            if pipelines.len() > self.known {
                self.kept.iter().for_each(Kept::save);
            }
            let (device, queue) = (self.device.clone(), self.queue.clone());
            let (kept, failure) = (self.kept.take(), self.failure.clone());
            let matrix_units = self.matrix_side.is_some();
            let idle = Idle { device, queue, matrix_units, pipelines, kept, failure };
            idle::put(self.adapter, &self.name, idle);
        }
    }
}

/// Rows and columns of the largest matrices of f16 that an adapter's matrix units multiply and add in f32, of those that
/// kernels can ask for.
pub(super) fn matrix_side(adapter: &wgpu::Adapter) -> Option<usize> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let (limits, lanes) = (adapter.limits(), COOPERATIVE_SUBGROUPS * adapter.get_info().subgroup_max_size);
    let fits = COOPERATIVE_BYTES <= limits.max_compute_workgroup_storage_size
        && lanes <= limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
    let needed = MATRIX_FEATURES | wgpu::Features::SUBGROUP;
    let offered = adapter.cooperative_matrix_properties();
    let has = |side: u32| {
        offered.iter().any(|of| {
            [of.m_size, of.n_size, of.k_size] == [side; 3] && (of.ab_type, of.cr_type) == (F16, F32)
        })
    };
    let side = [16, 8].into_iter().find(|&side| has(side))?;
    (fits && adapter.features().contains(needed)).then_some(side as usize)
}

/// What kernels of matrix units need besides subgroups.
const MATRIX_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16);

/// A new device of an adapter called `name`, with all that the adapter has, but matrix units where they are not asked for.
fn make(adapter: &wgpu::Adapter, name: &str, matrix_units: bool) -> Result<Idle, EngineError> {
    let memory_hints = match adapter.get_info().device_type {
        // The smallest that wgpu makes: what is larger than a block has memory of its own and just as much, and what a load has
        // uploaded leaves no blocks behind with holes too small for the next matrix.
        wgpu::DeviceType::Cpu => {
            wgpu::MemoryHints::Manual { suballocated_device_memory_block_size: CPU_BLOCK..CPU_BLOCK }
        }
        _ => wgpu::MemoryHints::Performance,
    };
    // SAFETY: what wgpu asks for is that its defects are reckoned with. Kernels that use matrix units are compared with
    // their twins before a model's products are made by them.
    let experimental_features = match matrix_units {
        true => unsafe { wgpu::ExperimentalFeatures::enabled() },
        false => wgpu::ExperimentalFeatures::disabled(),
    };
    let units = if matrix_units { MATRIX_FEATURES } else { wgpu::Features::empty() };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("exflow rank"),
        memory_hints,
        experimental_features,
        required_limits: adapter.limits(),
        required_features: adapter.features()
            & (wgpu::Features::SUBGROUP
                | wgpu::Features::PIPELINE_CACHE
                | wgpu::Features::TIMESTAMP_QUERY
                | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES
                | units),
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| {
        EngineError::gpu(
            format!("{name}: no device could be made: {e}"),
            "close other programs that use the GPU, or choose another adapter (`exflow devices`)",
        )
    })?;
    let failure = Arc::new(Mutex::new(None));
    let seen = failure.clone();
    device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
        if let Ok(mut first) = seen.lock() {
            first.get_or_insert_with(|| error.to_string());
        }
    }));
    let kept = Kept::open(&device, &adapter.get_info());
    Ok(Idle { device, queue, matrix_units, pipelines: PipelineCache::default(), kept, failure })
}
