//! Which adapters this machine has, and which one a rank takes.

use super::tuning::{Form, FormTuning, Subject, TuningReport};
use super::units::OnUnits;
use crate::EngineError;
use exflow_shaders::Weights;
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};

/// What one adapter can do.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceReport {
    /// Its place in [`devices`].
    pub index: usize,
    /// Its name.
    pub name: String,
    /// `vulkan`, `metal` or `dx12`.
    pub backend: String,
    /// `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    pub kind: String,
    /// Driver and its version.
    pub driver: String,
    /// The largest storage binding in bytes.
    pub max_binding_bytes: u64,
    /// The largest buffer in bytes.
    pub max_buffer_bytes: u64,
    /// Smallest and largest subgroup, where the adapter tells.
    pub subgroup: Option<(u32, u32)>,
    /// Its memory, where its interface tells.
    pub memory: Option<super::DeviceMemory>,
    /// Rows and columns of the matrices of f16 that its matrix units multiply and add in f32, where kernels can ask for them.
    pub matrix_side: Option<usize>,
    /// Optional features that matter here.
    pub features: Vec<String>,
    /// Where its compiled kernels are kept, where its interface offers that.
    pub kept: Option<super::KeptPipelines>,
    /// Which variants of the matrix kernels it runs.
    pub tuning: super::TuningReport,
}

pub(super) struct Candidate {
    pub(super) adapter: wgpu::Adapter,
    pub(super) report: DeviceReport,
}

/// Every adapter of this machine, best first.
pub fn devices() -> Vec<DeviceReport> {
    candidates().into_iter().map(|c| c.report).collect()
}

/// What lavapipe takes its number of threads from.
const LAUNCH_THREADS: &str = "LP_NUM_THREADS";
/// Whether this process chose it.
static OURS: AtomicBool = AtomicBool::new(false);

/// `LP_NUM_THREADS` where the user, not [`prepare_process`], has set it.
pub fn launch_threads_set() -> Option<String> {
    std::env::var(LAUNCH_THREADS).ok().filter(|_| !OURS.load(Ordering::Relaxed))
}

/// Sets what drivers read from the environment, where the user has not:
///
/// - `LP_NUM_THREADS=0`: lavapipe then runs a launch in the thread that submits it, which for small launches is 4 to
///   30 times faster than its thread pool, and lets several ranks of one process run beside each other. With
///   one rank and large matrices the pool is the faster one; a caller says so by `ranks` of 0.
/// - `XDG_RUNTIME_DIR`: without it, Mesa's window system code complains on stderr each time adapters are listed.
///
/// Call it first thing in `main`: it changes the environment, which is only sound while there is one thread.
pub fn prepare_process(ranks: usize) {
    let set = |name: &str, value: &std::ffi::OsStr| {
        if std::env::var_os(name).is_none() {
            // SAFETY: the caller promises that no other thread runs yet.
            unsafe { std::env::set_var(name, value) };
        }
    };
    if ranks > 0 && std::env::var_os(LAUNCH_THREADS).is_none() {
        set(LAUNCH_THREADS, "0".as_ref());
        OURS.store(true, Ordering::Relaxed);
    }
    if cfg!(target_os = "linux") {
        set("XDG_RUNTIME_DIR", std::env::temp_dir().as_os_str());
    }
}

/// What the adapters are that ranks would take, each as `wanted` says of it.
pub(crate) fn chosen<'a>(
    wanted: impl Iterator<Item = Option<&'a str>>,
) -> Result<Vec<DeviceReport>, EngineError> {
    let all = candidates();
    wanted.enumerate().map(|(rank, wanted)| Ok(all[choice(&all, wanted, rank)?].report.clone())).collect()
}

pub(super) fn choose(wanted: Option<&str>, rank: usize) -> Result<Candidate, EngineError> {
    let mut all = candidates();
    let index = choice(&all, wanted, rank)?;
    Ok(all.swap_remove(index))
}

/// The place among `all` of the adapter that `wanted` names; rank `rank` takes its turn among equally good ones.
fn choice(all: &[Candidate], wanted: Option<&str>, rank: usize) -> Result<usize, EngineError> {
    let Some(best) = all.first() else {
        return Err(EngineError::gpu(
            "no adapter found",
            "install a Vulkan driver, on Linux without a GPU: apt install mesa-vulkan-drivers",
        ));
    };
    let found = match wanted {
        None => {
            let best = rank_of_kind(&best.report.kind);
            let equals = all.iter().filter(|c| rank_of_kind(&c.report.kind) == best).count();
            Some(rank % equals)
        }
        Some(text) => all.iter().position(|c| {
            text.parse() == Ok(c.report.index) || c.report.name.to_lowercase().contains(&text.to_lowercase())
        }),
    };
    found.ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|c| format!("{}: {}", c.report.index, c.report.name)).collect();
        EngineError::usage(
            format!("no adapter is called {}", wanted.unwrap_or_default()),
            format!("choose one of: {}", names.join(", ")),
        )
    })
}

fn candidates() -> Vec<Candidate> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle().with_env();
    // Launch sizes come from our own kernel; checking them would add a pass to every step.
    descriptor.flags.remove(wgpu::InstanceFlags::VALIDATION_INDIRECT_CALL);
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.sort_by_key(|a| rank_of_kind(kind(a.get_info().device_type)));
    let of = |(index, adapter)| Candidate { report: report(index, &adapter), adapter };
    adapters.into_iter().enumerate().map(of).collect()
}

fn rank_of_kind(kind: &str) -> usize {
    ["discrete", "integrated", "virtual", "other", "cpu"].iter().position(|&k| k == kind).unwrap_or(9)
}

fn kind(device: wgpu::DeviceType) -> &'static str {
    match device {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "cpu",
        wgpu::DeviceType::Other => "other",
    }
}

fn report(index: usize, adapter: &wgpu::Adapter) -> DeviceReport {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let known = [
        (wgpu::Features::SUBGROUP, "subgroup"),
        (wgpu::Features::SHADER_F16, "f16"),
        (wgpu::Features::IMMEDIATES, "immediates"),
        (wgpu::Features::PIPELINE_CACHE, "pipeline-cache"),
        (wgpu::Features::TIMESTAMP_QUERY, "timestamps"),
        (wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, "cooperative-matrix"),
    ];
    let has = adapter.features();
    let mut report = DeviceReport {
        index,
        backend: format!("{:?}", info.backend).to_lowercase(),
        kind: kind(info.device_type).to_owned(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        max_buffer_bytes: limits.max_buffer_size,
        subgroup: (info.subgroup_max_size > 0).then_some((info.subgroup_min_size, info.subgroup_max_size)),
        features: known.iter().filter(|(f, _)| has.contains(*f)).map(|(_, n)| (*n).to_owned()).collect(),
        matrix_side: super::device::matrix_side(adapter),
        kept: super::kept::report(&info).filter(|_| has.contains(wgpu::Features::PIPELINE_CACHE)),
        memory: super::memory::of(adapter, info.device_type == wgpu::DeviceType::Cpu),
        name: info.name,
        tuning: TuningReport::default(),
    };
    report.tuning = report.tuned();
    report
}

impl DeviceReport {
    /// Whether lanes can hand each other values: subgroups of eight lanes at least.
    pub(super) fn has_lanes(&self) -> bool {
        self.features.iter().any(|feature| feature == "subgroup")
            && self.subgroup.is_some_and(|(smallest, _)| smallest >= 8)
    }

    /// Matrices whose products it makes on its matrix units where numerics are fast: those with scales, which it could multiply
    /// as bytes, where that was measured to gain.
    pub(crate) fn on_units(&self) -> OnUnits {
        let gains = |form: Weights| {
            let tuned = self.tuning.weights.get(&Form::new(form, true).name());
            !form.has_scales() || tuned.is_some_and(|of| of.units)
        };
        match self.matrix_side {
            Some(_) => OnUnits::of(Weights::ALL.into_iter().filter(|form| gains(*form))),
            None => OnUnits::default(),
        }
    }

    /// What its file of measurements is about.
    pub(super) fn subject(&self) -> Subject {
        Subject::of(&self.name, &self.backend, &self.driver)
    }

    /// What its file of measurements says, and the rules where it says nothing.
    fn tuned(&self) -> TuningReport {
        let subject = self.subject();
        let path = subject.path();
        let (measured, note) = match path.as_ref().map_or(Ok(None), |path| subject.read(path)) {
            Ok(found) => (found, None),
            Err(why) => (None, Some(why)),
        };
        let (is_cpu, subgroups) = (self.kind == "cpu", self.has_lanes());
        let rule = |form: Form| (form.name(), FormTuning::by_rule(form, is_cpu, subgroups));
        let mut weights: super::Tuning = Form::all().map(rule).collect();
        let is_measured = measured.is_some();
        let measured = measured.unwrap_or_default();
        let by_rule = weights.keys().filter(|form| !measured.contains_key(*form)).cloned().collect();
        weights.extend(measured);
        TuningReport { path, measured: is_measured, note, by_rule, weights }
    }

    /// Keeps what was measured of it in its file, beside what is there of other forms.
    pub(crate) fn keep_tuning(&self, found: super::Tuning) -> Result<(), EngineError> {
        let subject = self.subject();
        let path = subject.path().ok_or_else(|| {
            EngineError::usage("there is no folder for caches", "set XDG_CACHE_HOME or HOME to a folder")
        })?;
        let mut weights = subject.read(&path).ok().flatten().unwrap_or_default();
        weights.extend(found);
        subject.write(&path, &weights)
    }
}
