//! Pipelines by kernel and variant, bind groups by the buffers they bind: both made once.

use super::buffer::texel_format;
use super::{Buffer, Gpu};
use crate::EngineError;
use exflow_shaders::{Access, Binding, Kernel, Variant};
use std::collections::HashMap;

/// Both caches of one device.
pub(super) struct Pipelines {
    pub(super) pipelines: PipelineCache,
    /// How many were made since somebody asked.
    made: u64,
    /// By what is bound.
    bind_groups: HashMap<(Kernel, Variant, Bound), wgpu::BindGroup>,
}

/// The ids of parameters and buffers that a launch binds.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Bound([u64; MAX_BINDINGS]);

impl Bound {
    pub(super) fn of(params: &Buffer, buffers: &[&Buffer]) -> Result<Self, EngineError> {
        let mut ids = [0; MAX_BINDINGS];
        if buffers.len() >= MAX_BINDINGS {
            return Err(EngineError::Internal(format!("a launch binds {} buffers", buffers.len())));
        }
        ids[0] = params.id;
        ids[1..].iter_mut().zip(buffers).for_each(|(id, buffer)| *id = buffer.id);
        Ok(Self(ids))
    }
}

/// Pipelines, which outlive the buffers that they were made for.
pub(super) type PipelineCache = HashMap<(Kernel, Variant), Pipeline>;

#[derive(Clone)]
pub(super) struct Pipeline {
    raw: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    params_size: u64,
}

impl From<PipelineCache> for Pipelines {
    fn from(pipelines: PipelineCache) -> Self {
        Self { pipelines, made: 0, bind_groups: HashMap::new() }
    }
}

/// Bind groups are few, one per launch of a step; when buffers were replaced often enough to fill this, start anew.
const MAX_BIND_GROUPS: usize = 4096;

/// Bindings of a kernel at most, its parameters included.
const MAX_BINDINGS: usize = 10;

impl Gpu {
    /// Lets go of all buffers that launches were bound to: those that were replaced are freed by it.
    pub(crate) fn forget_bindings(&self) {
        self.pipelines.borrow_mut().bind_groups.clear();
        self.held.borrow_mut().clear();
    }

    /// The same for these buffers alone.
    pub(crate) fn forget_bindings_of<'b>(&self, buffers: impl Iterator<Item = &'b Buffer>) {
        let gone: Vec<u64> = buffers.map(|buffer| buffer.id).collect();
        let is_gone = |bound: &Bound| bound.0.iter().any(|id| gone.contains(id));
        self.pipelines.borrow_mut().bind_groups.retain(|(_, _, bound), _| !is_gone(bound));
    }

    /// How many pipelines were made since this was last asked.
    pub(crate) fn take_made(&self) -> u64 {
        std::mem::take(&mut self.pipelines.borrow_mut().made)
    }

    /// Whether it has that pipeline.
    pub(super) fn has_made(&self, kernel: Kernel, variant: Variant) -> bool {
        self.pipelines.borrow().pipelines.contains_key(&(kernel, variant))
    }

    /// The pipeline of a variant that this device runs ([`Gpu::runs`]).
    fn pipeline(&self, kernel: Kernel, variant: Variant) -> Result<Pipeline, EngineError> {
        if let Some(found) = self.pipelines.borrow().pipelines.get(&(kernel, variant)) {
            return Ok(found.clone());
        }
        let made = self.make_pipeline(kernel, variant)?;
        let mut cache = self.pipelines.borrow_mut();
        cache.pipelines.insert((kernel, variant), made.clone());
        cache.made += 1;
        Ok(made)
    }

    /// The variant that this device runs in its place on such buffers: the same bits.
    pub(super) fn runs(&self, kernel: Kernel, variant: Variant, buffers: &[&Buffer]) -> Variant {
        let subgroup = variant.subgroup && self.hands_over();
        let image = buffers.iter().any(|buffer| buffer.is_image());
        Variant { subgroup, image, ..variant }.of(kernel)
    }

    fn make_pipeline(&self, kernel: Kernel, variant: Variant) -> Result<Pipeline, EngineError> {
        let module =
            exflow_shaders::module(kernel, variant).map_err(|e| EngineError::Internal(e.to_string()))?;
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(kernel.name()),
            source: wgpu::ShaderSource::Wgsl(module.wgsl.as_str().into()),
        };
        // SAFETY: the text is this project's own, validated by naga, and compared with its CPU twin by
        // `exflow selftest`; every index comes from parameter blocks and lists that the engine bounds.
        let shader = unsafe {
            self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked())
        };
        let entries: Vec<_> = module.bindings.iter().map(|b| layout_entry(b, module.params_size)).collect();
        let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(kernel.name()),
            entries: &entries,
        });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(kernel.name()),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let workgroup = [("WORKGROUP", f64::from(self.lanes(variant)))];
        let raw = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.name()),
            layout: Some(&pipeline_layout),
            module: &shader,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: if kernel.has_workgroup_override() { &workgroup } else { &[] },
                zero_initialize_workgroup_memory: false,
            },
            cache: self.kept.as_ref().map(|kept| &kept.raw),
        });
        Ok(Pipeline { raw, layout, params_size: u64::from(module.params_size) })
    }

    /// The pipeline of a variant that this device runs, and what binds these parameters and buffers to it.
    pub(super) fn bound(
        &self,
        kernel: Kernel,
        variant: Variant,
        bound: Bound,
        (params, buffers): (&Buffer, &[&Buffer]),
    ) -> Result<(wgpu::ComputePipeline, wgpu::BindGroup), EngineError> {
        let pipeline = self.pipeline(kernel, variant)?;
        let raw = params.raw()?;
        let mut cache = self.pipelines.borrow_mut();
        if cache.bind_groups.len() > MAX_BIND_GROUPS {
            cache.bind_groups.clear();
        }
        let make = || {
            let uniform = wgpu::BindGroupEntry {
                binding: 0,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: raw,
                    offset: 0,
                    size: std::num::NonZeroU64::new(pipeline.params_size),
                }),
            };
            let storage = buffers.iter().enumerate().map(|(i, buffer)| wgpu::BindGroupEntry {
                binding: i as u32 + 1,
                resource: buffer.resource(),
            });
            let entries: Vec<_> = std::iter::once(uniform).chain(storage).collect();
            self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(kernel.name()),
                layout: &pipeline.layout,
                entries: &entries,
            })
        };
        let group = cache.bind_groups.entry((kernel, variant, bound)).or_insert_with(make).clone();
        Ok((pipeline.raw, group))
    }
}

fn layout_entry(binding: &Binding, params_size: u32) -> wgpu::BindGroupLayoutEntry {
    let uniform = binding.access == Access::Uniform;
    let buffer = |ty| wgpu::BindingType::Buffer {
        ty,
        has_dynamic_offset: uniform,
        min_binding_size: if uniform { std::num::NonZeroU64::new(u64::from(params_size)) } else { None },
    };
    let ty = match binding.access {
        Access::Uniform => buffer(wgpu::BufferBindingType::Uniform),
        Access::Read => buffer(wgpu::BufferBindingType::Storage { read_only: true }),
        Access::ReadWrite => buffer(wgpu::BufferBindingType::Storage { read_only: false }),
        Access::Image { words, written } => wgpu::BindingType::StorageTexture {
            access: match written {
                true => wgpu::StorageTextureAccess::WriteOnly,
                false => wgpu::StorageTextureAccess::ReadOnly,
            },
            format: texel_format(words),
            view_dimension: wgpu::TextureViewDimension::D2,
        },
    };
    wgpu::BindGroupLayoutEntry {
        binding: binding.number,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty,
        count: None,
    }
}
