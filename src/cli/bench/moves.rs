//! `exflow bench moves`: what requests notice of experts that move while they run.

use super::super::failure::Failure;
use super::super::flags::{self, RankFlags};
use super::super::output::{self, TableFormat};
use super::models::{Scratch, model_folder};
use exflow::engine::{Cluster, PlacementSource, PlacementTable, Request};
use exflow::progress::Bars;
use exflow::study::{self, Gaps, MovePauses};
use std::fmt::Write;
use std::path::Path;

/// Measures the gaps between a request's tokens with and without experts that move meanwhile
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Runs with a move and without take turns and must say the same tokens. A move begins once a fourth of the tokens is\n\
                        told, from the table of --placement to that of --to, the next one back. Not counted are the first 8 gaps of each\n\
                        sequence, between which the prompts of others are prefilled. -m bundled and -m synthetic-gqa are the models of\n\
                        `exflow bench strategies`.\n\n\
                        Example:\n  exflow bench moves -m bundled --ep-size 4 --schedule flow -r 5 --format md"
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) ranks: RankFlags,
    /// Where experts move to: a table file, round_robin or linear
    #[arg(long, value_name = "FILE|round_robin|linear", default_value = "linear", value_parser = flags::placement)]
    to: PlacementSource,
    /// Sequences at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    sequences: u32,
    /// Tokens to make of each prompt
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..))]
    max_tokens: u32,
    /// Runs with a move, and as many without
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Seed of the prompts of a model without a tokenizer, and of synthetic-gqa
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: TableFormat,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let scratch = Scratch::new("moves")?;
    let named = args.ranks.model.to_str().unwrap_or_default();
    let model = match args.ranks.model.is_dir() {
        true => args.ranks.model.clone(),
        false => model_folder(named, scratch.path(), args.seed)?,
    };
    let bars = Bars::new();
    let Some(mut options) = args.ranks.led(&bars)? else { return Ok(()) };
    options.model = model.clone();
    options.room_for_moves = true;
    let cluster = Cluster::start(options, &bars)?;
    let other = table(&args.to, &cluster)?;
    let now = cluster.placement();
    if (&other.assignment, &other.replicas) == (&now.assignment, &now.replicas) {
        return Err(Failure::Input("--to and --placement are the same table: nothing would move".into()));
    }
    let result = study::move_pauses(cluster, &other, &requests(args, &model)?, args.repeats as usize)?;
    match args.format {
        TableFormat::Json => output::json(&result),
        TableFormat::Md | TableFormat::Text => output::text(&table_of(&result)),
    }
}

/// The table to move to.
fn table(to: &PlacementSource, cluster: &Cluster) -> Result<PlacementTable, Failure> {
    let (spec, ranks) = (cluster.spec(), cluster.options().ranks);
    let (layers, experts) = (spec.moe_layers(), spec.experts);
    Ok(match to {
        PlacementSource::RoundRobin => PlacementTable::round_robin(layers, experts, ranks),
        PlacementSource::Linear => PlacementTable::linear(layers, experts, ranks),
        PlacementSource::Table(table) => table.clone(),
        PlacementSource::File(path) => PlacementTable::read(path, None)?,
    })
}

fn requests(args: &Args, model: &Path) -> Result<Vec<Request>, Failure> {
    let prompts = study::grid_prompts(model, args.sequences as usize, args.seed)?;
    Ok(study::requests(&prompts, args.max_tokens as usize))
}

fn table_of(result: &MovePauses) -> String {
    let mut text = String::from(
        "| gaps between a sequence's tokens | count | p50 ms | p99 ms | longest ms | longest of all runs |\n\
         |---|---:|---:|---:|---:|---:|\n",
    );
    let lines =
        [("no move", result.without), ("with a move", result.with), ("while experts moved", result.moving)];
    for (what, Gaps { count, p50_ms, p99_ms, longest_ms, worst_ms }) in lines {
        let _ = writeln!(
            text,
            "| {what} | {count} | {p50_ms:.2} | {p99_ms:.2} | {longest_ms:.2} | {worst_ms:.2} |"
        );
    }
    let _ = writeln!(
        text,
        "\n{} ranks, {}, {} sequences of {} tokens, {} runs of each kind; a run's longest gap: the median. Tokens/s: {:.1} \
         without a move, {:.1} with one. A move took {:.0} ms (median) for {} experts; {} tokens were told while they were read.",
        result.ranks,
        result.schedule,
        result.sequences,
        result.tokens,
        result.repeats,
        result.tokens_per_s_without,
        result.tokens_per_s_with,
        result.move_ms,
        result.experts / result.repeats.max(1) as u64,
        result.tokens_while_read / result.repeats.max(1) as u64,
    );
    text
}
