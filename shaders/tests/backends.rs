//! Every variant of every kernel through naga's back ends for Vulkan, Metal, DX12 and OpenGL, with the capabilities that each
//! of them has: what no device here runs is at least text that its driver may be given.

use exflow_shaders::{Kernel, Variant, module};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{Module, ShaderStage, back, proc::BoundsCheckPolicies};

type Written = Result<String, String>;

struct BackEnd {
    name: &'static str,
    capabilities: fn() -> Capabilities,
    write: fn(&Module, &ModuleInfo) -> Written,
    /// Whether it can write kernels of matrix units.
    matrix_units: bool,
    /// What stands in the text of any compute kernel.
    mark: &'static str,
}

const BACK_ENDS: [BackEnd; 4] = [
    BackEnd {
        name: "SPIR-V",
        capabilities: back::spv::supported_capabilities,
        write: spirv,
        matrix_units: true,
        mark: "0x7230203",
    },
    BackEnd {
        name: "MSL",
        capabilities: back::msl::supported_capabilities,
        write: msl,
        matrix_units: true,
        mark: "kernel void",
    },
    BackEnd {
        name: "HLSL",
        capabilities: back::hlsl::supported_capabilities,
        write: hlsl,
        matrix_units: false,
        mark: "[numthreads(",
    },
    BackEnd {
        name: "GLSL",
        capabilities: back::glsl::supported_capabilities,
        write: glsl,
        matrix_units: false,
        mark: "local_size_x",
    },
];

fn entry() -> (ShaderStage, String) {
    (ShaderStage::Compute, "main".to_owned())
}

fn spirv(module: &Module, info: &ModuleInfo) -> Written {
    // 1.3 is what subgroups need, and what wgpu asks of Vulkan 1.1.
    let options = back::spv::Options { lang_version: (1, 3), ..Default::default() };
    let (shader_stage, entry_point) = entry();
    let pipeline = back::spv::PipelineOptions { shader_stage, entry_point };
    let words = back::spv::write_vec(module, info, &options, Some(&pipeline)).map_err(|e| e.to_string())?;
    Ok(format!("{:#x?}", words.first()))
}

fn msl(module: &Module, info: &ModuleInfo) -> Written {
    let options = back::msl::Options { lang_version: (2, 4), ..Default::default() };
    let pipeline = back::msl::PipelineOptions { entry_point: Some(entry()), ..Default::default() };
    let (text, told) =
        back::msl::write_string(module, info, &options, &pipeline).map_err(|e| e.to_string())?;
    told.entry_point_names.into_iter().collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    Ok(text)
}

fn hlsl(module: &Module, info: &ModuleInfo) -> Written {
    let options = back::hlsl::Options { shader_model: back::hlsl::ShaderModel::V6_0, ..Default::default() };
    let pipeline = back::hlsl::PipelineOptions { entry_point: Some(entry()) };
    let mut text = String::new();
    let mut writer = back::hlsl::Writer::new(&mut text, &options, &pipeline);
    let told = writer.write(module, info, None).map_err(|e| e.to_string())?;
    told.entry_point_names.into_iter().collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    Ok(text)
}

fn glsl(module: &Module, info: &ModuleInfo) -> Written {
    let options = back::glsl::Options { version: back::glsl::Version::Desktop(450), ..Default::default() };
    let (shader_stage, entry_point) = entry();
    let pipeline = back::glsl::PipelineOptions { shader_stage, entry_point, multiview: None };
    let mut text = String::new();
    back::glsl::Writer::new(&mut text, module, info, &options, &pipeline, BoundsCheckPolicies::default())
        .and_then(|mut writer| writer.write())
        .map_err(|e| e.to_string())?;
    Ok(text)
}

/// A variant as this back end writes it.
fn written(back_end: &BackEnd, kernel: Kernel, variant: Variant) -> Written {
    let text = module(kernel, variant).map_err(|e| e.to_string())?.wgsl;
    let parsed = naga::front::wgsl::parse_str(&text).map_err(|e| e.emit_to_string(&text))?;
    let info = Validator::new(ValidationFlags::all(), (back_end.capabilities)())
        .validate(&parsed)
        .map_err(|e| e.emit_to_string(&text))?;
    let main = Some((ShaderStage::Compute, "main"));
    let constants = back::PipelineConstants::default();
    let (parsed, info) = back::pipeline_constants::process_overrides(&parsed, &info, main, &constants)
        .map_err(|e| e.to_string())?;
    (back_end.write)(&parsed, &info)
}

fn every_variant_through(back_end: &BackEnd) {
    let mut failed = Vec::new();
    for kernel in Kernel::ALL {
        let takes = |of: &Variant| back_end.matrix_units || of.matrix_side(kernel).is_none();
        for variant in kernel.variants().into_iter().filter(takes) {
            match written(back_end, kernel, variant) {
                Ok(text) if text.contains(back_end.mark) => {}
                Ok(text) => failed.push(format!("{} {variant:?}: no kernel in {text}", kernel.name())),
                Err(reason) => failed.push(format!("{} {variant:?}: {reason}", kernel.name())),
            }
        }
    }
    assert!(failed.is_empty(), "{}: {} variants: {}", back_end.name, failed.len(), failed[0]);
}

#[test]
fn spirv_takes_every_variant() {
    every_variant_through(&BACK_ENDS[0]);
}

#[test]
fn msl_takes_every_variant() {
    every_variant_through(&BACK_ENDS[1]);
}

#[test]
fn hlsl_takes_every_variant() {
    every_variant_through(&BACK_ENDS[2]);
}

#[test]
fn glsl_takes_every_variant() {
    every_variant_through(&BACK_ENDS[3]);
}
