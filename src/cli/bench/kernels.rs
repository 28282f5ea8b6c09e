//! `exflow bench kernels`: a model's heaviest launches beside the limits of the adapter.

use super::super::failure::Failure;
use super::super::flags::RankFlags;
use super::super::output::{self, TableFormat};
use super::device;
use exflow::engine::{KernelRate, bench_kernels};
use serde_json::json;
use std::fmt::Write;

/// Measures a model's heaviest launches, one rank, beside the limit that binds each
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A launch must read its weights (at the best rate of products of one row, by lanes or on matrix units, with as large\n\
                        or larger matrices in the same form, bound alike), do its operations (at the rate of f32 on registers, or of the matrix units that make\n\
                        it with --numerics fast) and be launched; whichever\n\
                        takes longest binds it, and its share is that time over the measured one.\n\n\
                        Example:\n  exflow bench kernels -m examples/models/gpt-moe-16e --rows 1 8 128 --format md"
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    /// Rows at once: 1 is a decode step behind 128 positions, more are a prompt
    #[arg(long, value_name = "T", num_args = 1.., default_values_t = [1, 8, 128])]
    rows: Vec<usize>,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: TableFormat,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if args.rows.iter().any(|rows| !(1..=4096).contains(rows)) {
        return Err(Failure::Input("--rows takes numbers from 1 to 4096".into()));
    }
    let (limits, measured) = bench_kernels(&args.ranks.options()?, &args.rows)?;
    match args.format {
        TableFormat::Json => output::json(&json!({ "device": limits, "kernels": measured })),
        TableFormat::Text | TableFormat::Md => {
            output::text(&format!("{}\n{}", device::describe(&limits), table(&measured)))
        }
    }
}

fn table(measured: &[KernelRate]) -> String {
    let mut text = "| piece | rows | made on | µs | GFLOP/s | GB/s | bound by | share |\n".to_owned();
    text += "|---|---:|---|---:|---:|---:|---|---:|\n";
    for rate in measured {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {:.0} | {:.2} | {:.2} | {} | {:.0} % |",
            rate.piece,
            rate.rows,
            rate.on,
            rate.us,
            rate.flops / 1e9,
            rate.bytes_per_s / 1e9,
            rate.bound,
            100.0 * rate.share
        );
    }
    text
}
