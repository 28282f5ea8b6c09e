//! `exflow simulate`: replays a routing trace over tables, links and strategies, without a model.

use super::failure::Failure;
use super::flags;
use super::output::{self, Format};
use super::place::topology;
use exflow::engine::{ModelSpec, Strategy};
use exflow::placement::{Link, RoutingTrace, SimulateOptions, Topology};
use exflow::report;
use exflow::study::{Replayed, TableChoice, replay, sweep};
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

/// Replays a routing trace: stay rates, bytes on every link, and the time that exchanges take
#[derive(Debug, clap::Args)]
#[command(after_help = "Computing is not modelled; times are those of the links alone.\n\n\
                  Example:\n  exflow simulate --trace trace.npy --placement placement.json --latency 200us --gbit-per-s 1\n  \
                  exflow simulate --trace trace.npy --sweep-ranks 2,4,8 --report runs/sweep.html")]
pub(crate) struct Args {
    /// Routing trace of `exflow profile`, or any int array [tokens, layers] or [tokens, layers, k]
    #[arg(long, value_name = "T.npy")]
    trace: PathBuf,
    /// Tables to replay over
    #[arg(long, value_name = "FILE|round_robin|linear", num_args = 1.., default_value = "round_robin")]
    placement: Vec<String>,
    /// Ranks, where no table and no topology names them
    #[arg(long, value_name = "R", value_parser = flags::ranks)]
    ranks: Option<usize>,
    /// Solve a table on the first half of the trace for each of these numbers of ranks, and replay the second half
    #[arg(long, value_name = "R,R,…", value_delimiter = ',', conflicts_with_all = ["ranks", "topology", "placement"])]
    sweep_ranks: Vec<usize>,
    /// Hosts, ranks and links
    #[arg(long, value_name = "C.toml")]
    topology: Option<PathBuf>,
    /// Strategies to replay [default: both]
    #[arg(long, value_name = "vanilla|coherent", num_args = 1..)]
    strategy: Vec<Strategy>,
    /// Experts per layer, where the trace does not show them all
    #[arg(long, value_name = "E")]
    experts: Option<usize>,
    /// Sequences that decode at once
    #[arg(long, value_name = "B", default_value_t = 8)]
    batch: usize,
    /// Model whose rows and K/V travel (f32)
    #[arg(short, long, value_name = "DIR", conflicts_with_all = ["row_bytes", "kv_bytes"])]
    model: Option<PathBuf>,
    /// Bytes of a row: hidden size × 4
    #[arg(long, value_name = "N", default_value_t = 4096.0)]
    row_bytes: f64,
    /// Bytes of K/V that a token makes in a layer
    #[arg(long, value_name = "N", default_value_t = 2048.0)]
    kv_bytes: f64,
    /// Latency between any two ranks, where the topology has no links
    #[arg(long, value_name = "TIME", default_value = "200us", value_parser = flags::duration)]
    latency: Duration,
    /// Bandwidth between any two ranks, where the topology has no links
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    gbit_per_s: f64,
    /// Time for each solve of a sweep
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = flags::duration)]
    time_limit: Duration,
    /// HTML to draw into
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// How the figures are written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    args.report.iter().try_for_each(|path| flags::check_out(path))?;
    let trace = RoutingTrace::load_npy(&args.trace)?;
    let experts = args.experts.unwrap_or_else(|| trace.experts());
    let sizes = [("--row-bytes", args.row_bytes), ("--kv-bytes", args.kv_bytes)];
    if let Some((flag, value)) = sizes.iter().find(|(_, bytes)| !(*bytes >= 0.0 && bytes.is_finite())) {
        return Err(Failure::Input(format!("{flag} {value}: give a number of 0 or more")));
    }
    if !(args.gbit_per_s > 0.0 && args.gbit_per_s.is_finite()) {
        return Err(Failure::Input(format!("--gbit-per-s {}: give a number above 0", args.gbit_per_s)));
    }
    let (row_bytes, kv_bytes) = match &args.model {
        Some(folder) => {
            let spec = ModelSpec::read(folder)?;
            (4.0 * spec.hidden as f64, 4.0 * spec.cached_values() as f64)
        }
        None => (args.row_bytes, args.kv_bytes),
    };
    let link = Link { latency_us: 1e6 * args.latency.as_secs_f64(), gbit_per_s: args.gbit_per_s };
    let base = SimulateOptions {
        strategy: Strategy::Coherent,
        batch: args.batch,
        row_bytes,
        kv_bytes,
        combine_sum: false,
    };
    let strategies = match args.strategy.as_slice() {
        [] => vec![Strategy::Vanilla, Strategy::Coherent],
        some => some.to_vec(),
    };
    let rows = if args.sweep_ranks.is_empty() {
        let (topology, tables) = tables(args, trace.layers(), experts)?;
        replay(&trace, &tables, &topology.or_linked(link), &strategies, &base)?
    } else {
        sweep(&trace, experts, &args.sweep_ranks, link, &strategies, &base, args.time_limit)?
    };
    if let Some(path) = &args.report {
        let title = format!("Replay of {}", args.trace.display());
        std::fs::write(path, report::render_replay(&title, &rows))
            .map_err(|error| Failure::Run(format!("{}: {error}", path.display())))?;
    }
    match args.format {
        Format::Json => output::json(&rows),
        Format::Text => output::text(&text(&rows, args)),
    }
}

/// The topology and the tables that are named.
fn tables(args: &Args, layers: usize, experts: usize) -> Result<(Topology, Vec<TableChoice>), Failure> {
    let known =
        args.topology.is_some().then(|| topology(args.topology.as_deref(), args.ranks)).transpose()?;
    let mut wanted = known.as_ref().map(Topology::len).or(args.ranks);
    // A rule such as round_robin takes its number of ranks from the files beside it.
    for name in args.placement.iter().filter(|name| !matches!(name.as_str(), "round_robin" | "linear")) {
        wanted = Some(TableChoice::named(name, layers, experts, wanted)?.table.ranks);
    }
    let tables = args
        .placement
        .iter()
        .map(|name| Ok(TableChoice::named(name, layers, experts, wanted)?))
        .collect::<Result<Vec<_>, Failure>>()?;
    let ranks = wanted.or_else(|| tables.first().map(|choice| choice.table.ranks)).unwrap_or(1);
    Ok((known.unwrap_or_else(|| Topology::uniform(ranks)), tables))
}

fn text(rows: &[Replayed], args: &Args) -> String {
    let mut text = format!(
        "{:<22} {:>5} {:<9} {:>8} {:>9} {:>9} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9}\n",
        "",
        "ranks",
        "strategy",
        "stay",
        "crossings",
        "exchanges",
        "dispatch B",
        "combine B",
        "kv B",
        "busiest",
        "rounds ms",
        "flow ms"
    );
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.3}"));
    for row in rows {
        let s = &row.simulation;
        let _ = writeln!(
            text,
            "{:<22} {:>5} {:<9} {:>6.1} % {:>9.3} {:>9.2} {:>10.0} {:>10.0} {:>10.0} {:>9.2} {:>9} {:>9}",
            row.placement,
            row.ranks,
            row.strategy,
            100.0 * s.stay_rate,
            s.crossings_per_token,
            s.exchanges_per_layer,
            s.dispatch_bytes,
            s.combine_bytes,
            s.kv_bytes,
            s.imbalance,
            ms(s.rounds_ms),
            ms(s.flow_ms),
        );
    }
    let _ = writeln!(
        text,
        "stay, crossings and bytes are per token, exchanges per MoE layer and step of {} sequences; busiest: rank over mean",
        args.batch
    );
    args.report.iter().for_each(|path| {
        let _ = writeln!(text, "drawn in {}", path.display());
    });
    text
}
