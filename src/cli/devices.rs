//! `exflow devices`: every adapter of this machine.

use super::failure::Failure;
use super::flags::LARGE_MODEL_BYTES;
use super::output::{self, Format};
use exflow::engine::{self, DeviceReport};
use exflow::report::byte_text;
use serde_json::json;
use std::fmt::Write;

/// Lists every adapter of this machine, best first: what it can do, and how much memory is left
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  exflow devices --format json")]
pub(crate) struct Args {
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let devices = engine::devices();
    match args.format {
        Format::Json => output::json(&json!({ "devices": devices.iter().map(as_json).collect::<Vec<_>>() }))?,
        Format::Text => output::text(&devices.iter().map(describe).collect::<String>())?,
    }
    if devices.is_empty() {
        return Err(Failure::Run(
            "no adapter found; install a Vulkan driver, on Linux without a GPU: apt install mesa-vulkan-drivers".into(),
        ));
    }
    Ok(())
}

fn describe(device: &DeviceReport) -> String {
    let mut text = format!(
        "{}: {} ({}, {}, {})\n   largest buffer {}, largest binding {}",
        device.index,
        device.name,
        device.backend,
        device.kind,
        device.driver,
        byte_text(device.max_buffer_bytes as f64),
        byte_text(device.max_binding_bytes as f64)
    );
    if let Some(memory) = device.memory {
        let free =
            memory.free_bytes.map(|free| format!("{} of ", byte_text(free as f64))).unwrap_or_default();
        let left = if free.is_empty() { "" } else { " left" };
        let _ = write!(text, ", memory {free}{}{left}", byte_text(memory.total_bytes as f64));
    }
    if let Some((low, high)) = device.subgroup {
        let _ = write!(text, ", subgroups of {low} to {high}");
    }
    if !device.features.is_empty() {
        let _ = write!(text, "\n   {}", device.features.join(" "));
    }
    let _ = write!(text, "\n   kernels: {}", kernels(device));
    if let Some(threads) = launch_threads(device) {
        let _ = write!(text, "; LP_NUM_THREADS {threads}");
    }
    if let Some(kept) = &device.kept {
        let bytes = kept.bytes.map_or("nothing yet".to_owned(), |bytes| byte_text(bytes as f64));
        let _ = write!(text, "\n   compiled kernels kept in {}: {bytes}", kept.path.display());
    }
    text.push('\n');
    text
}

/// Which variant of the kernels runs here; all of them give the same bits.
fn kernels(device: &DeviceReport) -> &'static str {
    let has = device.features.iter().any(|f| f == "subgroup");
    match device.subgroup {
        Some((smallest, _)) if has && smallest >= 8 => "subgroup",
        _ => "plain",
    }
}

/// How many threads of its own lavapipe is left, on adapters that are CPUs.
fn launch_threads(device: &DeviceReport) -> Option<String> {
    (device.kind == "cpu").then(|| match std::env::var("LP_NUM_THREADS") {
        Ok(set) => format!("{set}, as set"),
        Err(_) => format!(
            "0 for several ranks and models of less than {}, else its own choice",
            byte_text(LARGE_MODEL_BYTES as f64)
        ),
    })
}

fn as_json(device: &DeviceReport) -> serde_json::Value {
    json!({
        "index": device.index,
        "name": device.name,
        "backend": device.backend,
        "kind": device.kind,
        "driver": device.driver,
        "max_buffer_bytes": device.max_buffer_bytes,
        "max_binding_bytes": device.max_binding_bytes,
        "memory": device.memory,
        "subgroup": device.subgroup,
        "features": device.features,
        "kernels": kernels(device),
        "compiled_kernels": device.kept,
        "lp_num_threads": launch_threads(device),
    })
}
