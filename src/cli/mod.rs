//! The verbs of `exflow`: one file each, `Args` as typed and `run` as meant.

mod bench;
mod cert;
mod completions;
mod config;
mod devices;
mod doctor;
mod eval;
mod failure;
mod flags;
mod generate;
mod log;
mod logits;
mod os;
mod output;
mod place;
mod plan;
mod profile;
mod report;
mod selftest;
#[cfg(feature = "server")]
mod serve;
mod simulate;
mod worker;

use clap::{CommandFactory, Parser, Subcommand};
use failure::Failure;
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs Mixture-of-Experts language models with their experts spread over several GPUs.
#[derive(Debug, Parser)]
#[command(
    name = "exflow",
    version,
    after_help = "Example:\n  exflow generate -m examples/models/gpt-moe-16e --ep-size 4 -p \"In the beginning\" -n 40\n\n\
                  Exit codes: 0 done, 1 a failure at run time, 2 bad usage or bad input."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    log: log::LogFlags,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Devices(devices::Args),
    Doctor(doctor::Args),
    Generate(generate::Args),
    #[cfg(feature = "server")]
    Serve(serve::Args),
    Logits(logits::Args),
    Eval(eval::Args),
    Profile(profile::Args),
    Place(place::Args),
    Plan(plan::Args),
    Bench(Box<bench::Args>),
    Simulate(simulate::Args),
    Report(report::Args),
    Selftest(selftest::Args),
    Cert(cert::Args),
    Worker(worker::Args),
    Completions(completions::Args),
    Man(completions::ManArgs),
}

impl Verb {
    /// Ranks that this process will host, 0 for one with large matrices; decides how the driver is set up.
    fn ranks(&self) -> usize {
        match self {
            Self::Generate(args) => args.ranks.hosted(),
            #[cfg(feature = "server")]
            Self::Serve(args) => args.ranks.hosted(),
            Self::Logits(args) => args.ranks.hosted(),
            Self::Eval(args) => args.ranks.hosted(),
            Self::Profile(args) => args.ranks.hosted(),
            Self::Plan(args) => args.ranks.hosted(),
            Self::Bench(args) => args.device_ranks(),
            // Launches are measured without a pool, whose threads others disturb.
            Self::Devices(args) => usize::from(args.tune.is_some()),
            Self::Place(_) | Self::Simulate(_) | Self::Report(_) | Self::Selftest(_) => 1,
            Self::Completions(_) | Self::Man(_) | Self::Doctor(_) | Self::Cert(_) => 1,
            Self::Worker(args) => flags::hosted(&args.model, 1),
        }
    }

    /// The model that it is about, which may be named as on the Hub.
    fn model(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::Generate(args) => Some(&mut args.ranks.model),
            #[cfg(feature = "server")]
            Self::Serve(args) => Some(&mut args.ranks.model),
            Self::Logits(args) => Some(&mut args.ranks.model),
            Self::Eval(args) => Some(&mut args.ranks.model),
            Self::Profile(args) => Some(&mut args.ranks.model),
            Self::Plan(args) => Some(&mut args.ranks.model),
            Self::Bench(args) => args.model_mut(),
            Self::Report(args) => args.model.as_mut(),
            Self::Worker(args) => Some(&mut args.model),
            Self::Devices(_) | Self::Place(_) | Self::Simulate(_) | Self::Selftest(_) => None,
            Self::Completions(_) | Self::Man(_) | Self::Doctor(_) | Self::Cert(_) => None,
        }
    }

    fn run(&mut self) -> Result<(), Failure> {
        if let Some(model) = self.model() {
            *model = exflow::hub::find(model, &exflow::progress::Bars::new())?;
        }
        match self {
            Self::Devices(args) => devices::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::Generate(args) => generate::run(args),
            #[cfg(feature = "server")]
            Self::Serve(args) => serve::run(args),
            Self::Logits(args) => logits::run(args),
            Self::Eval(args) => eval::run(args),
            Self::Profile(args) => profile::run(args),
            Self::Place(args) => place::run(args),
            Self::Plan(args) => plan::run(args),
            Self::Simulate(args) => simulate::run(args),
            Self::Report(args) => report::run(args),
            Self::Bench(args) => bench::run(args),
            Self::Selftest(args) => selftest::run(args),
            Self::Cert(args) => cert::run(args),
            Self::Worker(args) => worker::run(args),
            Self::Completions(args) => completions::run::<Cli>(args),
            Self::Man(args) => completions::man::<Cli>(args),
        }
    }
}

/// Parses, runs, and turns whatever went wrong into a few lines and an exit code.
pub(crate) fn main() -> ExitCode {
    let args = match config::applied(std::env::args_os().collect(), &Cli::command()) {
        Ok(args) => args,
        Err(failure) => return failure.report(),
    };
    let mut cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error),
    };
    // Before any thread exists: it may set environment variables that drivers read.
    exflow::engine::prepare_process(cli.verb.ranks());
    let _logging = match log::start(&cli.log) {
        Ok(logging) => logging,
        Err(failure) => return failure.report(),
    };
    match cli.verb.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_an_example_in_its_help() {
        for verb in Cli::command().get_subcommands_mut() {
            let help = verb.render_long_help().to_string();
            assert!(help.contains("Example:"), "{}", verb.get_name());
        }
    }
}
