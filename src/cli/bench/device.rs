//! `exflow bench device`: what an adapter can do, measured by kernels.

use super::super::failure::Failure;
use super::super::output::{self, Format};
use exflow::engine::{DeviceRates, bench_device};

/// Measures copies, arithmetic and launches of an adapter
#[derive(Debug, clap::Args)]
#[command(
    after_help = "f32, dot4 and matrix units (of f16, with sums in f32; left out where the adapter offers none) are rates on registers; kernels\n\
                        that also load reach a part of them.\n\n\
                        Example:\n  exflow bench device --format json"
)]
pub(crate) struct Args {
    /// Adapter: part of its name, or its number in `exflow devices` [default: the best one]
    #[arg(long, value_name = "NAME|N")]
    adapter: Option<String>,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let rates = bench_device(args.adapter.as_deref())?;
    match args.format {
        Format::Json => output::json(&rates),
        Format::Text => output::text(&describe(&rates)),
    }
}

pub(super) fn describe(rates: &DeviceRates) -> String {
    let threads = match &rates.lp_num_threads {
        Some(threads) => format!(" (LP_NUM_THREADS={threads})"),
        None => String::new(),
    };
    let units = match rates.matrix_flops {
        Some(flops) => format!("matrix units {:.1} GFLOP/s, ", flops / 1e9),
        None => String::new(),
    };
    format!(
        "{}{threads}: copies {:.1} GB/s, f32 {:.1} GFLOP/s, dot4 {:.1} GOP/s, {units}products with a row {:.1} GB/s, a launch {:.1} µs\n",
        rates.adapter,
        rates.copy_bytes_per_s / 1e9,
        rates.f32_flops / 1e9,
        rates.dot4_ops / 1e9,
        rates.matvec_bytes_per_s / 1e9,
        rates.launch_us
    )
}
