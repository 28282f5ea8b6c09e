//! `exflow place`: from counts to a placement table, and what it is worth.

mod counts;
mod summary;

use super::failure::Failure;
use super::flags;
use super::output::{self, Format};
use clap::ValueEnum;
use counts::{Counts, CountsFlags};
use exflow::placement::{
    Balance, Memory, PlacementTable, SolveOptions, TableFormat, TableShape, Topology, Weights,
};
use exflow::progress::Bars;
use exflow::study::{balances, held_out, keep_back, solve_with_progress};
use std::path::PathBuf;
use std::time::Duration;

/// Solves where experts live, so that most tokens find their next expert where they are
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  exflow place --affinity affinity.npz --ranks 4 --time-limit 10s --out placement.json"
)]
pub(crate) struct Args {
    #[command(flatten)]
    counts: CountsFlags,
    /// Ranks to place on
    #[arg(long, value_name = "R", value_parser = flags::ranks, required_unless_present = "topology")]
    ranks: Option<usize>,
    /// Hosts, ranks and links [default: equal ranks, equal links]
    #[arg(long, value_name = "T.toml")]
    topology: Option<PathBuf>,
    #[command(flatten)]
    objective: Objective,
    /// When to stop searching; it stops by itself once nothing can be better. What the table is worth on unseen tokens takes
    /// up to 0.6 times as long besides
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = flags::duration)]
    time_limit: Duration,
    /// Seed of the search
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Threads [default: as many as there are cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Do not solve: score this table, and write it to --out (JSON, Expert,Node CSV or SGLang's map)
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// The table to write
    #[arg(long, value_name = "P.json")]
    out: PathBuf,
    /// How the table is written [default: csv where --out ends so, else json]
    #[arg(long, value_enum)]
    out_format: Option<OutFormat>,
    /// How the summary is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

/// What is to be cheap, and within which bounds.
#[derive(Debug, clap::Args)]
struct Objective {
    /// Weights of the objective's terms: moves between layers, to the next token, ranks of a token within a layer, tokens
    /// on the busiest rank
    #[arg(long, value_name = "transitions=1,wrap=1,coactivation=0,load=0", value_parser = weights)]
    weights: Option<Weights>,
    /// What is spread evenly: each layer by slots, each layer as flat as slots allow, or a rank's total alone (layers may
    /// then be left off ranks)
    #[arg(long, value_name = "slots|layer|total", default_value = "slots")]
    balance: Balance,
    /// Most tokens on a rank, over round-robin's busiest: in each layer, with --balance total over all
    #[arg(long, value_name = "FACTOR")]
    load_bound: Option<f64>,
    /// Further slots per rank and layer, for copies
    #[arg(long, value_name = "N", default_value_t = 0)]
    spare_slots: usize,
    /// Leave spare slots empty
    #[arg(long)]
    no_replicas: bool,
    /// Weights of an expert, where ranks name their memory_gb
    #[arg(long, value_name = "MB", default_value_t = 0.0)]
    expert_mb: f64,
    /// Attention weights of a layer
    #[arg(long, value_name = "MB", default_value_t = 0.0)]
    attention_mb: f64,
    /// K/V cache of a layer
    #[arg(long, value_name = "MB", default_value_t = 0.0)]
    kv_mb: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutFormat {
    Json,
    Csv,
    Sglang,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    flags::check_out(&args.out)?;
    let mut topology = topology(args.topology.as_deref(), args.ranks)?;
    let given = args.table.as_ref().map(|path| given(args, path, &topology)).transpose()?;
    let Some(counts) = Counts::load(&args.counts)? else {
        let Some(table) = given else {
            return Err(Failure::Input(
                "nothing to place by: give --affinity or --trace (or --table alone, to convert it)".into(),
            ));
        };
        table.write(&args.out, table_format(args))?;
        return output::text(&format!("written to {}\n", args.out.display()));
    };
    spare_slots(&mut topology, counts.affinity.experts, args.objective.spare_slots);
    let options = options(args, &counts)?;
    let affinity = &counts.affinity;
    if let Some(table) = &given {
        table.check_fits(affinity.layers, affinity.experts, topology.len(), counts.digest.as_deref())?;
    }
    let (part, kept) = match &counts.held_out {
        Some(kept) => (affinity.clone(), kept.clone()),
        None => keep_back(counts.trace.as_ref(), affinity, args.seed),
    };
    let (table, unseen) = match given {
        Some(table) => {
            let unseen = held_out(&part, affinity, &topology, &options, Some(&table))?;
            (table, unseen)
        }
        None => {
            let mut table = solve_with_progress(affinity, &topology, &options, &Bars::new())?;
            table.model_digest = counts.digest.clone();
            table.source = Some(counts.source.clone());
            let judged = counts.held_out.is_some().then_some(&table);
            let unseen = held_out(&part, &kept, &topology, &options, judged)?;
            (table, unseen)
        }
    };
    table.write(&args.out, table_format(args))?;
    let balances = if topology.len() > 1 { balances(&part, &kept, &topology, &options) } else { Vec::new() };
    let summary = summary::Summary::new(&table, affinity, &topology, &unseen, &balances, options.balance)?;
    match args.format {
        Format::Json => output::json(&summary.json()),
        Format::Text => output::text(&summary.text(&args.out.display().to_string())),
    }
}

fn options(args: &Args, counts: &Counts) -> Result<SolveOptions, Failure> {
    let objective = &args.objective;
    let no_moves = counts.affinity.transitions.iter().all(|&count| count == 0.0);
    let weights = match objective.weights {
        Some(weights) => weights,
        None if no_moves && counts.affinity.load.is_some() => {
            output::note("these counts hold no transitions: placing by load alone (--weights load=1)");
            Weights { load: 1.0, ..Weights::default() }
        }
        None => Weights::default(),
    };
    let megabytes = [
        ("--expert-mb", objective.expert_mb),
        ("--attention-mb", objective.attention_mb),
        ("--kv-mb", objective.kv_mb),
    ];
    if let Some((flag, value)) = megabytes.iter().find(|(_, mb)| !(*mb >= 0.0 && mb.is_finite())) {
        return Err(Failure::Input(format!("{flag} {value}: give a number of 0 or more")));
    }
    let [expert_bytes, attention_bytes, kv_bytes] = megabytes.map(|(_, mb)| mb * 1e6);
    Ok(SolveOptions {
        seed: args.seed,
        time_limit: args.time_limit,
        threads: args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        weights,
        balance: objective.balance,
        load_bound: objective.load_bound,
        replicas: !objective.no_replicas,
        memory: Memory { expert_bytes, attention_bytes, kv_bytes },
        ..SolveOptions::default()
    })
}

/// A table of any format, for `--table`.
fn given(args: &Args, path: &std::path::Path, topology: &Topology) -> Result<PlacementTable, Failure> {
    let shape = args.counts.experts.map(|experts| TableShape { experts, ranks: Some(topology.len()) });
    Ok(PlacementTable::read(path, shape)?)
}

fn table_format(args: &Args) -> TableFormat {
    let csv = args.out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
    match args.out_format {
        Some(OutFormat::Csv) => TableFormat::Csv,
        Some(OutFormat::Sglang) => TableFormat::Sglang,
        None if csv => TableFormat::Csv,
        Some(OutFormat::Json) | None => TableFormat::Json,
    }
}

/// The topology's file, or equal ranks.
pub(crate) fn topology(path: Option<&std::path::Path>, ranks: Option<usize>) -> Result<Topology, Failure> {
    let Some(path) = path else {
        return Ok(Topology::uniform(ranks.unwrap_or(1)));
    };
    let topology = Topology::load(path)?;
    match ranks {
        Some(ranks) if ranks != topology.len() => Err(Failure::Input(format!(
            "--ranks {ranks}, but {} has {} ranks; leave --ranks out or make them agree",
            path.display(),
            topology.len()
        ))),
        _ => Ok(topology),
    }
}

/// Slots for copies: on ranks without slots, beyond an even share.
fn spare_slots(topology: &mut Topology, experts: usize, spare: usize) {
    if spare == 0 {
        return;
    }
    let even = experts.div_ceil(topology.len().max(1));
    topology.ranks.iter_mut().for_each(|rank| rank.slots = Some(rank.slots.unwrap_or(even) + spare));
}

/// `transitions=1,wrap=1,coactivation=0,load=0`, any of them.
fn weights(text: &str) -> Result<Weights, String> {
    let mut weights = Weights::default();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        let wrong = || format!("{part:?} is no weight: write transitions=1,wrap=1,coactivation=0,load=0");
        let (name, value) = part.split_once('=').ok_or_else(wrong)?;
        let value: f64 = value.trim().parse().map_err(|_| wrong())?;
        match name.trim() {
            "transitions" => weights.transitions = value,
            "wrap" => weights.wrap = value,
            "coactivation" => weights.coactivation = value,
            "load" => weights.load = value,
            _ => return Err(wrong()),
        }
    }
    Ok(weights)
}
