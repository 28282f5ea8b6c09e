//! `exflow bench`: strategies and placements side by side; its sub-verbs measure one part each.

mod alltoall;
mod device;
mod kernels;
mod model;
mod models;
mod moves;
mod strategies;

use super::failure::Failure;
use super::flags::{self, Transport};
use super::output::{self, TableFormat};
use clap::Subcommand;
use exflow::engine::{Cluster, ClusterOptions, Request, Strategy};
use exflow::placement::SolveOptions;
use exflow::progress::Bars;
use exflow::report::{ModelFacts, ReportData, rate_text};
use exflow::study::{self, Corpus, Document, OwnText, Setting, Study, markdown_table, text_table};
use exflow::transport::link::LinkSpec;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Parts that can be measured alone.
#[derive(Debug, Subcommand)]
pub(crate) enum Part {
    Alltoall(alltoall::Args),
    Device(device::Args),
    Kernels(kernels::Args),
    Model(model::Args),
    Moves(Box<moves::Args>),
    Strategies(strategies::Args),
}

/// Runs vanilla and coherent with round-robin, and coherent with a solved placement, interleaved
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Profiles on --text and on text that the model writes itself, solves the placement, then prints\n\
                        medians; every run must produce the same tokens. docs/METHODOLOGY.md defines the figures.\n\n\
                        Example:\n  exflow bench -m examples/models/gpt-moe-16e --ep-size 4 -r 5 --format md"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// Model folder: config.json, *.safetensors, tokenizer.json; or a name on the Hub
    #[arg(short, long, value_name = "DIR|ORG/NAME", required = true)]
    model: Option<PathBuf>,
    /// Ranks of this process, where it is the only one
    #[arg(long, value_name = "R", default_value_t = 4, value_parser = flags::ranks, conflicts_with_all = ["rank", "world_size", "leader"])]
    ep_size: usize,
    /// What joins the ranks of this process
    #[arg(long, value_enum, default_value = "quic")]
    transport: Transport,
    /// Shapes what each rank sends: lan, wifi, wan, or latency=5ms,rate=100mbit,…
    #[arg(long, value_name = "LINK", value_parser = flags::link)]
    link: Option<LinkSpec>,
    /// Tokens to add to each prompt; the end-of-text token does not end it
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// Prompts, run together [default: eight of its own]
    #[arg(short, long, value_name = "TEXT", num_args = 1..)]
    prompts: Vec<String>,
    /// Text files to profile on, beside what the model writes
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Sequences of 192 tokens that the model writes to be profiled on
    #[arg(long, value_name = "N", default_value_t = 24)]
    own_text: usize,
    #[command(flatten)]
    runs: RunFlags,
    /// Folder for trace.npy, affinity.npz, placement.json and report.html
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: TableFormat,
    #[command(flatten)]
    group: flags::group::GroupFlags,
}

/// How settings are measured whose tables are solved first.
#[derive(Debug, clap::Args)]
struct RunFlags {
    /// Measured runs of each setting
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Time for the solver, per table
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = flags::duration)]
    time_limit: Duration,
    /// Seed of the text that tables are made from, the solver and a synthetic model
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Adapter: part of its name, or its number in `exflow devices` [default: the best one]
    #[arg(long, value_name = "NAME|N")]
    adapter: Option<String>,
}

impl RunFlags {
    fn solve(&self) -> SolveOptions {
        SolveOptions { seed: self.seed, time_limit: self.time_limit, ..SolveOptions::default() }
    }
}

impl Args {
    /// Ranks with a device of their own that this process will host.
    pub(crate) fn device_ranks(&self) -> usize {
        match &self.part {
            Some(Part::Alltoall(_)) => 1,
            Some(Part::Device(_)) => 0,
            Some(Part::Kernels(args)) => args.ranks.hosted(),
            Some(Part::Model(args)) => args.ranks.hosted(),
            Some(Part::Moves(args)) => args.ranks.hosted(),
            Some(Part::Strategies(args)) => args.device_ranks(),
            None if self.group.is_told() => flags::hosted(self.model(), 1),
            None => self.ep_size,
        }
    }

    /// The model that is measured, which may be named as on the Hub.
    pub(crate) fn model_mut(&mut self) -> Option<&mut PathBuf> {
        match &mut self.part {
            Some(Part::Alltoall(_) | Part::Device(_) | Part::Strategies(_)) => None,
            Some(Part::Kernels(args)) => Some(&mut args.ranks.model),
            Some(Part::Model(args)) => Some(&mut args.ranks.model),
            Some(Part::Moves(args)) => Some(&mut args.ranks.model),
            None => self.model.as_mut(),
        }
    }

    /// The model's folder, which is there where no part alone is measured.
    fn model(&self) -> &Path {
        self.model.as_deref().unwrap_or(Path::new("."))
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    match &args.part {
        Some(Part::Alltoall(args)) => alltoall::run(args),
        Some(Part::Strategies(args)) => strategies::run(args),
        Some(Part::Device(args)) => device::run(args),
        Some(Part::Kernels(args)) => kernels::run(args),
        Some(Part::Model(args)) => model::run(args),
        Some(Part::Moves(args)) => moves::run(args),
        None => three(args),
    }
}

fn three(args: &Args) -> Result<(), Failure> {
    let documents = args
        .text
        .iter()
        .map(|path| Ok(Document { name: path.display().to_string(), text: flags::read_text(path)? }))
        .collect::<Result<Vec<_>, Failure>>()?;
    let Some(study) = measure(args, &documents)? else { return Ok(()) };
    if let Some(folder) = &args.report {
        let path = study.save(folder)?;
        output::note(&format!("report: file://{}", path.display()));
    }
    match args.format {
        TableFormat::Json => output::json(&brief(study.report)),
        TableFormat::Md => output::text(&(markdown_table(&study.report) + "\n" + &remarks(&study.report))),
        TableFormat::Text => output::text(&(text_table(&study.report) + "\n" + &remarks(&study.report))),
    }
}

/// Nothing where this process serves rank 0 of another.
fn measure(args: &Args, documents: &[Document]) -> Result<Option<Study>, Failure> {
    let bars = Bars::new();
    let mut options = ClusterOptions::new(args.model());
    options.ranks = args.ep_size;
    options.transport = args.transport.into();
    options.strategy = Strategy::Vanilla;
    options.adapter = args.runs.adapter.clone();
    options.link = args.link;
    args.group.apply(&mut options)?;
    let Some(options) = flags::group::led(options, &bars)? else { return Ok(None) };
    let mut cluster = Cluster::start(options, &bars)?;
    let prompts = if args.prompts.is_empty() {
        study::BEGINNINGS.map(String::from).to_vec()
    } else {
        args.prompts.clone()
    };
    let requests = requests(&cluster, &prompts, args.max_tokens)?;
    let own =
        OwnText { beginnings: prompts.clone(), sequences: args.own_text, tokens: 192, seed: args.runs.seed };
    let corpus = Corpus::collect(&mut cluster, documents, &own, 256, &bars)?;
    let profiled = study::profile(&mut cluster, &corpus, &bars)?;
    let mut placed =
        study::place(&profiled, cluster.spec().experts, cluster.options().ranks, &args.runs.solve(), &bars)?;
    placed.table.model_digest = Some(cluster.spec().digest.clone());
    let facts = ModelFacts::of(cluster.spec(), args.model());
    let settings = Setting::three(&placed.table);
    let compared =
        study::compare(&mut cluster, settings, &requests, args.runs.repeats as usize, &mut |_, _| {})?;
    let texts =
        prompts.into_iter().zip(compared.said.sequences.iter().map(|done| done.text.clone())).collect();
    Ok(Some(Study::new("exflow bench", facts, &corpus, profiled, placed, &compared, texts)))
}

fn requests(cluster: &Cluster, prompts: &[String], max_tokens: usize) -> Result<Vec<Request>, Failure> {
    let codec = cluster.text()?;
    prompts
        .iter()
        .map(|prompt| {
            let prompt_ids = codec.encode(prompt)?;
            Ok(Request { prompt_ids, max_tokens, ignore_eos: true, ..Request::default() })
        })
        .collect()
}

/// The figures without the matrices, which the report's files hold.
fn brief(data: ReportData) -> ReportData {
    ReportData { transitions: Vec::new(), load: Vec::new(), ..data }
}

fn remarks(data: &ReportData) -> String {
    let mut text = format!(
        "{} sequences at once, medians of {} interleaved runs; bytes are of one run. All runs produced the same tokens.\n\
         Stay rate on {} held-out tokens:",
        data.sequences, data.repeats, data.profile.held_out_tokens
    );
    for stay in &data.stay {
        let _ =
            write!(text, " {} {} (balance {:.2});", stay.label, rate_text(stay.stay_rate), stay.imbalance);
    }
    text.pop();
    text.push('\n');
    text
}
