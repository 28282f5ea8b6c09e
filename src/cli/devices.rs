//! `exflow devices`: every adapter of this machine.

use super::failure::Failure;
use super::flags::large_model_bytes;
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
    /// Measures which variants of the kernels are the quickest here, and keeps that for every later run; with TYPES
    /// (f32, f16, q8, q4, mx4) for weights of those alone
    #[arg(long, value_name = "TYPES", num_args = 0.., value_delimiter = ',')]
    pub(super) tune: Option<Vec<String>>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if let Some(types) = &args.tune {
        for device in engine::devices() {
            let (name, seconds) = engine::tune(Some(&device.index.to_string()), types)?;
            output::note(&format!("{name}: measured in {seconds:.1} s"));
            if device.kind == "cpu" && engine::launch_threads_set().is_none() {
                engine::keep_pool_from_bytes(pool_from_bytes(device.index)?)?;
            }
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

/// Launches of a step, and the share of a model's files that it reads, for which the pool is weighed.
const STEP_LAUNCHES: f64 = 100.0;
const STEP_SHARE: f64 = 1.0 / 3.0;

/// Bytes of a model's files from which on lavapipe's pool of threads gains more by its products than it takes for its
/// launches. It reads its number of threads when a process starts: two other ones measure it.
fn pool_from_bytes(adapter: usize) -> Result<u64, Failure> {
    let without = rates(adapter, 0)?;
    let pool = rates(adapter, std::thread::available_parallelism().map_or(1, usize::from))?;
    Ok(crossing(without, pool))
}

/// Seconds of a launch and bytes per second of products without and with the pool, to the size where both are equal.
fn crossing((launch, read): (f64, f64), (pool_launch, pool_read): (f64, f64)) -> u64 {
    let per_byte = 1.0 / read - 1.0 / pool_read;
    let launches = STEP_LAUNCHES * (pool_launch - launch).max(0.0);
    // Where the pool gains nothing it is for no model.
    if per_byte > 0.0 { (launches / per_byte / STEP_SHARE) as u64 } else { u64::MAX }
}

/// Seconds of a launch, and bytes per second of products with a row, with so many threads of lavapipe.
fn rates(adapter: usize, threads: usize) -> Result<(f64, f64), Failure> {
    let failed = |what: String| Failure::Run(format!("measuring with LP_NUM_THREADS={threads}: {what}"));
    let exe = std::env::current_exe().map_err(|e| failed(e.to_string()))?;
    let output = std::process::Command::new(exe)
        .args(["bench", "device", "--format", "json", "--adapter", &adapter.to_string()])
        .env("LP_NUM_THREADS", threads.to_string())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let number = |name: &str| told[name].as_f64().filter(|value| *value > 0.0);
    match (number("launch_us"), number("matvec_bytes_per_s")) {
        (Some(launch_us), Some(bytes)) => Ok((launch_us / 1e6, bytes)),
        _ => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
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
    if let Some(side) = device.matrix_side {
        let by = if device.kind == "cpu" { ", which its driver emulates" } else { "" };
        let _ = write!(text, "\n   matrix units of {side} by {side}{by}: used by --numerics fast");
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

/// What chose the variants of the kernels that run here; all of them give the same bits, but matrix units in place of bytes.
fn kernels(device: &DeviceReport) -> String {
    let tuning = &device.tuning;
    match (tuning.measured, tuning.by_rule.is_empty()) {
        (false, _) => "by rules (--tune measures)".to_owned(),
        (true, true) => "as measured here".to_owned(),
        (true, false) => format!("as measured here, by rules for {}", tuning.by_rule.join(", ")),
    }
}

/// What runs on matrices of one form.
fn variants(form: &str, of: &FormTuning) -> String {
    let memory = if of.textures { "textures" } else { "buffers" };
    let lanes = if of.subgroups { "subgroup" } else { "plain" };
    let wide = if of.wide { ", one row by three columns a lane" } else { "" };
    let tiles = |tiles: &[TileUpTo]| {
        let kind = |of: &TileUpTo| if of.as_f32 { " as f32" } else { "" };
        let each: Vec<_> =
            tiles.iter().map(|of| format!("{}{} up to {}", of.tile, kind(of), of.rows)).collect();
        each.join(", ")
    };
    let units = if of.units { "; on matrix units, where all ranks' gain by it" } else { "" };
    format!(
        "{form:<8} {memory}, {lanes}{wide}; rows in a tile: {}; of experts: {}{units}",
        tiles(&of.linear),
        tiles(&of.experts)
    )
}

/// How many threads of its own lavapipe is left, on adapters that are CPUs.
fn launch_threads(device: &DeviceReport) -> Option<String> {
    (device.kind == "cpu").then(|| match engine::launch_threads_set() {
        Some(set) => format!("{set}, as set"),
        None => match large_model_bytes() {
            u64::MAX => "0: its pool of threads was measured to gain nothing here".to_owned(),
            bytes => format!(
                "0 for several ranks and models of less than {}, else its own choice",
                byte_text(bytes as f64)
            ),
        },
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
        "matrix_side": device.matrix_side,
        "kernels": device.tuning,
        "compiled_kernels": device.kept,
        "lp_num_threads": launch_threads(device),
    })
}

#[cfg(test)]
mod tests {
    use super::crossing;

    #[test]
    fn the_pool_pays_where_products_gain_what_launches_lose() {
        // 40 µs more for each of 100 launches; a third of the bytes at 4 instead of 2 GB/s.
        let bytes = crossing((5e-6, 2e9), (45e-6, 4e9));
        assert_eq!(bytes / 1_000_000, 48);
        assert_eq!(crossing((5e-6, 2e9), (45e-6, 2e9)), u64::MAX);
        assert_eq!(crossing((45e-6, 2e9), (5e-6, 4e9)), 0);
    }
}
