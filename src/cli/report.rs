//! `exflow report`: one HTML page of traces, affinity, tables, benchmarks and studies.

use super::failure::Failure;
use super::flags;
use super::output::{self, Format};
use exflow::report::{self, CheckFacts};
use exflow::study::{Gathered, RoutingHistory, StudyOptions, paper_checks};
use std::path::PathBuf;
use std::time::Duration;

/// Draws traces, affinity, tables, benchmarks and studies into one HTML file
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Files are told apart by what they hold: a routing trace (.npy), affinity (.npz), placement tables (.json, .csv),\n\
                  JSON of exflow bench, exflow bench strategies, exflow simulate or exflow report; a folder of exflow bench --report.\n\n\
                  Example:\n  exflow report affinity.npz placement.json --out report.html"
)]
pub(crate) struct Args {
    /// What to draw
    #[arg(value_name = "FILE", required_unless_present = "study")]
    files: Vec<PathBuf>,
    /// Check the paper's claims on these routes and runs: each with our figure, pass or fail
    #[arg(long)]
    study: bool,
    /// Model folder whose routing history (routing_history.npz) the study looks at
    #[arg(short, long, value_name = "DIR", requires = "study")]
    pub(crate) model: Option<PathBuf>,
    /// Ranks of the study's placements
    #[arg(long, value_name = "R", default_value_t = 4, value_parser = flags::ranks, requires = "study")]
    ranks: usize,
    /// Time for each of the study's placements
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = flags::duration, requires = "study")]
    time_limit: Duration,
    /// Seed of the study's splits, shuffles and placements
    #[arg(long, value_name = "N", default_value_t = 0, requires = "study")]
    seed: u64,
    /// The page to write
    #[arg(short, long, value_name = "FILE.html")]
    out: PathBuf,
    /// Its title
    #[arg(long, value_name = "TEXT", default_value = "exflow report")]
    title: String,
    /// Experts per layer, where a trace or a table does not tell
    #[arg(long, value_name = "E")]
    experts: Option<usize>,
    /// text: where the page is; json: its numbers as well
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    flags::check_out(&args.out)?;
    let mut found = Gathered::read(&args.files, args.experts)?;
    if args.study {
        found.checks = studied(args, &found)?;
    }
    let data = found.into_report(&args.title);
    std::fs::write(&args.out, report::render(&data))
        .map_err(|error| Failure::Run(format!("{}: {error}", args.out.display())))?;
    match args.format {
        Format::Json => output::json(&data),
        Format::Text => {
            let path = args.out.canonicalize().unwrap_or_else(|_| args.out.clone());
            output::text(&format!("{}report: file://{}\n", check_lines(&data.checks), path.display()))
        }
    }
}

/// The checks from the paper.
fn studied(args: &Args, found: &Gathered) -> Result<Vec<CheckFacts>, Failure> {
    let history = match &args.model {
        Some(model) if !model.is_dir() => {
            return Err(Failure::Input(format!(
                "{}: no such folder; give a model's folder",
                model.display()
            )));
        }
        Some(model) => RoutingHistory::load(model)?,
        None => None,
    };
    if history.is_none() && args.files.is_empty() {
        return Err(Failure::Input(
            "nothing to study: give a trace, affinity, JSON of exflow bench, or -m with a model that has routing_history.npz".into(),
        ));
    }
    let options = StudyOptions { ranks: args.ranks, time_limit: args.time_limit, seed: args.seed };
    Ok(paper_checks(found, history.as_ref(), &options)?)
}

/// A line for each check: pass, fail or open, its name and figure.
fn check_lines(checks: &[CheckFacts]) -> String {
    let line = |check: &CheckFacts| {
        let word = match check.pass {
            Some(true) => "pass",
            Some(false) => "FAIL",
            None => "open",
        };
        format!("{word}  {}: {}\n      claim: {}\n", check.name, check.figure, check.claim)
    };
    checks.iter().map(line).collect()
}
