//! `exflow devices`: every adapter of this machine.

use super::failure::Failure;
use super::flags::LARGE_MODEL_BYTES;
use super::output::{self, Format};
use exflow::engine::{self, DeviceReport, FormTuning, TileUpTo};
use exflow::report::byte_text;
use serde_json::json;
use std::fmt::Write;

/// Lists every adapter of this machine, best first: what it can do, which kernels it runs, and how much memory is left
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  exflow devices --tune")]
pub(crate) struct Args {
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// Measures which variants of the kernels are the quickest here, and keeps that for every later run
    #[arg(long)]
    pub(super) tune: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if args.tune {
        for device in engine::devices() {
            let (name, seconds) = engine::tune(Some(&device.index.to_string()))?;
            output::note(&format!("{name}: measured in {seconds:.1} s"));
        }
    }
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
    if let Some(note) = &device.tuning.note {
        let _ = write!(text, " (a file of measurements is ignored: {note})");
    }
    if let Some(threads) = launch_threads(device) {
        let _ = write!(text, "; LP_NUM_THREADS {threads}");
    }
    for (form, of) in &device.tuning.weights {
        let _ = write!(text, "\n   {}", variants(form, of));
    }
    if let Some(kept) = &device.kept {
        let bytes = kept.bytes.map_or("nothing yet".to_owned(), |bytes| byte_text(bytes as f64));
        let _ = write!(text, "\n   compiled kernels kept in {}: {bytes}", kept.path.display());
    }
    text.push('\n');
    text
}

/// What chose the variants of the kernels that run here; all of them give the same bits.
fn kernels(device: &DeviceReport) -> &'static str {
    if device.tuning.measured { "as measured here" } else { "by rules (--tune measures)" }
}

/// What runs on matrices of one form.
fn variants(form: &str, of: &FormTuning) -> String {
    let memory = if of.textures { "textures" } else { "buffers" };
    let lanes = if of.subgroups { "subgroup" } else { "plain" };
    let tiles = |tiles: &[TileUpTo]| {
        let each: Vec<_> = tiles.iter().map(|of| format!("{} up to {}", of.tile, of.rows)).collect();
        each.join(", ")
    };
    format!(
        "{form:<4} {memory}, {lanes}; rows in a tile: {}; of experts: {}",
        tiles(&of.linear),
        tiles(&of.experts)
    )
}

/// How many threads of its own lavapipe is left, on adapters that are CPUs.
fn launch_threads(device: &DeviceReport) -> Option<String> {
    (device.kind == "cpu").then(|| match engine::launch_threads_set() {
        Some(set) => format!("{set}, as set"),
        None => format!(
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
        "kernels": device.tuning,
        "compiled_kernels": device.kept,
        "lp_num_threads": launch_threads(device),
    })
}
