//! `exflow place`: from counts to a placement table.

use super::failure::Failure;
use super::flags;
use super::output::{self, Format};
use exflow::placement::{Affinity, PlacementTable, RoutingTrace, SolveOptions, Topology, score_affinity};
use exflow::progress::Bars;
use exflow::study::{load_affinity, solve_with_progress};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

/// Solves where experts live, so that most tokens find their next expert where they are
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  exflow place --affinity affinity.npz --ranks 4 --time-limit 10s --out placement.json"
)]
pub(crate) struct Args {
    #[command(flatten)]
    counts: Counts,
    /// Ranks to place on
    #[arg(long, value_name = "R", value_parser = flags::ranks, required_unless_present = "topology")]
    ranks: Option<usize>,
    /// Hosts, ranks and links [default: equal ranks, equal links]
    #[arg(long, value_name = "T.toml")]
    topology: Option<PathBuf>,
    /// Experts per layer, where a trace does not show them all
    #[arg(long, value_name = "E", conflicts_with = "affinity")]
    experts: Option<usize>,
    /// When to stop searching; it stops by itself once nothing can be better
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = flags::duration)]
    time_limit: Duration,
    /// Seed of the search
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Threads [default: as many as there are cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// The table to write
    #[arg(long, value_name = "P.json")]
    out: PathBuf,
    /// How the summary is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

/// Counts or the trace to count, one of the two.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Counts {
    /// Affinity of `exflow profile`
    #[arg(long, value_name = "A.npz")]
    affinity: Option<PathBuf>,
    /// Routing trace of `exflow profile`, or any int array [tokens, layers]
    #[arg(long, value_name = "T.npy")]
    trace: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    flags::check_out(&args.out)?;
    let (affinity, digest, source) = counts(args)?;
    let topology = topology(args)?;
    let options = SolveOptions {
        seed: args.seed,
        time_limit: args.time_limit,
        threads: args.threads.unwrap_or_else(default_threads),
        ..SolveOptions::default()
    };
    let mut table = solve_with_progress(&affinity, &topology, &options, &Bars::new())?;
    table.model_digest = digest;
    table.source = Some(source);
    table.save(&args.out)?;
    match args.format {
        Format::Json => output::json(&summary(&table, &affinity, &topology)),
        Format::Text => {
            output::text(&describe(&table, &affinity, &topology, &args.out.display().to_string()))
        }
    }
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The counts, the digest of the model they are of where it is known, and where they come from.
fn counts(args: &Args) -> Result<(Affinity, Option<String>, String), Failure> {
    let advice = |error: String| Failure::Input(format!("{error}; make one with `exflow profile`"));
    if let Some(path) = &args.counts.affinity {
        let (affinity, digest) =
            load_affinity(path).map_err(|error| advice(named(path, &error.to_string())))?;
        return Ok((affinity, digest, path.display().to_string()));
    }
    let path = args.counts.trace.clone().unwrap_or_default();
    let trace = RoutingTrace::load_npy(&path).map_err(|error| advice(named(&path, &error.to_string())))?;
    if trace.tokens() == 0 {
        return Err(advice(format!("{}: an empty trace", path.display())));
    }
    let affinity = Affinity::from_trace(&trace, args.experts.unwrap_or_else(|| trace.experts()))?;
    Ok((affinity, None, path.display().to_string()))
}

/// The message, with the file in front where it does not name it.
fn named(path: &std::path::Path, message: &str) -> String {
    let name = path.display().to_string();
    if message.contains(&name) { message.to_owned() } else { format!("{name}: {message}") }
}

fn topology(args: &Args) -> Result<Topology, Failure> {
    let Some(path) = &args.topology else {
        return Ok(Topology::uniform(args.ranks.unwrap_or(1)));
    };
    let topology = Topology::load(path)?;
    match args.ranks {
        Some(ranks) if ranks != topology.len() => Err(Failure::Input(format!(
            "--ranks {ranks}, but {} has {} ranks; leave --ranks out or make them agree",
            path.display(),
            topology.len()
        ))),
        _ => Ok(topology),
    }
}

fn summary(table: &PlacementTable, affinity: &Affinity, topology: &Topology) -> Value {
    let score = |table: &PlacementTable| score_affinity(table, affinity, topology);
    let (l, e, r) = (table.layers, table.experts, table.ranks);
    json!({
        "layers": l,
        "experts": e,
        "ranks": r,
        "cost": table.cost,
        "lower_bound": table.lower_bound,
        "gap": table.gap,
        "baselines": table.baselines,
        "score": score(table),
        "round_robin": score(&PlacementTable::round_robin(l, e, r)),
        "linear": score(&PlacementTable::linear(l, e, r)),
    })
}

fn describe(table: &PlacementTable, affinity: &Affinity, topology: &Topology, out: &str) -> String {
    let (l, e, r) = (table.layers, table.experts, table.ranks);
    let mut text = format!("{l} MoE layers × {e} experts on {r} ranks, on the profiled tokens:\n");
    let _ = writeln!(
        text,
        "{:<13} {:>10} {:>19} {:>26}",
        "", "stay rate", "crossings a token", "busiest rank ÷ mean, worst"
    );
    let rows = [
        ("this table", table.clone()),
        ("round_robin", PlacementTable::round_robin(l, e, r)),
        ("linear", PlacementTable::linear(l, e, r)),
    ];
    for (name, table) in rows {
        let score = score_affinity(&table, affinity, topology);
        let _ = writeln!(
            text,
            "{name:<13} {:>8.1} % {:>19.3} {:>26.2}",
            100.0 * score.stay_rate,
            score.crossings_per_token,
            score.worst_load
        );
    }
    if let (Some(cost), Some(bound), Some(gap)) = (table.cost, table.lower_bound, table.gap) {
        let _ = writeln!(text, "cost {cost:.0}, proven lower bound {bound:.0}, gap {:.1} %", 100.0 * gap);
    }
    let _ = writeln!(text, "written to {out}");
    text
}
