//! `exflow selftest`: every kernel against its twin on every adapter.

use super::failure::Failure;
use super::output;
use exflow::engine::{self, KernelCheck};

/// Checks every kernel against its CPU twin on every adapter of this machine, a line each
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  exflow selftest --adapter llvmpipe")]
pub(crate) struct Args {
    /// Only this adapter: part of its name, or its number in `exflow devices`
    #[arg(long, value_name = "NAME|N")]
    adapter: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut failed = None;
    let mut checks = 0usize;
    let mut sink = |check: &KernelCheck| {
        checks += 1;
        if failed.is_none() {
            failed = output::text(&line(check)).err();
        }
    };
    let passed = engine::selftest(args.adapter.as_deref(), &mut sink)?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    if passed && checks > 0 {
        output::note(&format!("{checks} checks passed"));
        return Ok(());
    }
    Err(Failure::Run("some kernels differ from their twins: the lines that say FAILED".into()))
}

fn line(check: &KernelCheck) -> String {
    format!(
        "{} {:<24} {:<28} error {:.1e} of {:.1e}  {}\n",
        if check.passed { "ok    " } else { "FAILED" },
        check.kernel,
        check.case,
        check.max_error,
        check.tolerance,
        check.adapter
    )
}
