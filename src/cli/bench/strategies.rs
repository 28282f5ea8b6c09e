//! `exflow bench strategies`: the grid of strategies, schedules, tables, links, ranks and sequences.

use super::super::failure::Failure;
use super::super::{flags, output};
use clap::ValueEnum;
use exflow::engine::{Cluster, ClusterOptions, NoProgress, Schedule, Strategy, TransportKind};
use exflow::placement::{PlacementTable, SolveOptions};
use exflow::progress::Bars;
use exflow::study::{self, Cell, Grid, GridRow, GridSetting, SyntheticModel};
use exflow::transport::link::LinkSpec;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Measures every strategy with every schedule and table, interleaved, on links to order
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Each cell (model, ranks, link) runs in a process of its own, one rank per host on the shaped links: what each\n\
                        rank sends is delayed and slowed. All settings of a cell take turns and must say the same tokens.\n\
                        docs/METHODOLOGY.md defines the figures.\n\n\
                        Example:\n  exflow bench strategies --ranks 4 --sequences 8 --links wan,local --format json"
)]
pub(crate) struct Args {
    /// Models: bundled, synthetic-gqa, or folders
    #[arg(long, value_name = "MODEL", value_delimiter = ',', default_values_t = ["bundled".to_owned(), "synthetic-gqa".to_owned()])]
    models: Vec<String>,
    /// World sizes
    #[arg(long, value_name = "R", value_delimiter = ',', default_values_t = [2, 4])]
    ranks: Vec<usize>,
    /// Sequences at once; 1: eight prompts, one after the other
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 8, 32])]
    sequences: Vec<usize>,
    /// Links: local (memory), lan, wifi, wan
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = LinkName::ALL)]
    links: Vec<LinkName>,
    /// Strategies
    #[arg(long, value_name = "S", value_delimiter = ',', default_values_t = [Strategy::Vanilla, Strategy::Coherent])]
    strategies: Vec<Strategy>,
    /// Schedules
    #[arg(long, value_name = "S", value_delimiter = ',', default_values_t = [Schedule::Rounds, Schedule::Flow])]
    schedules: Vec<Schedule>,
    /// Tables: round_robin, affinity, replicas (affinity with half as many slots again)
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = TableName::ALL)]
    tables: Vec<TableName>,
    /// Tokens to make of each prompt
    #[arg(short = 'n', long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..))]
    max_tokens: u32,
    /// Measured runs of each setting
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Time for the solver, per table
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = flags::duration)]
    time_limit: Duration,
    /// Seed of the profiled text, the solver and the synthetic model
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Adapter: part of its name, or its number in `exflow devices` [default: the best one]
    #[arg(long, value_name = "NAME|N")]
    adapter: Option<String>,
    /// A grid of a minute: the bundled model, 4 ranks, 8 sequences, wan and local, two runs
    #[arg(long)]
    quick: bool,
    /// How the result is written
    #[arg(long, value_enum, default_value = "md")]
    format: Format,
    /// Solved tables of the parent process, whose cell this one measures
    #[arg(long, value_name = "DIR", hide = true)]
    cell_of: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Json,
    Md,
    Html,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LinkName {
    Local,
    Lan,
    Wifi,
    Wan,
}

impl LinkName {
    const ALL: [Self; 4] = [Self::Local, Self::Lan, Self::Wifi, Self::Wan];

    fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Lan => "lan",
            Self::Wifi => "wifi",
            Self::Wan => "wan",
        }
    }

    fn spec(self) -> Option<LinkSpec> {
        match self {
            Self::Local => None,
            Self::Lan => Some(LinkSpec::lan()),
            Self::Wifi => Some(LinkSpec::wifi()),
            Self::Wan => Some(LinkSpec::wan()),
        }
    }
}

impl std::fmt::Display for LinkName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum TableName {
    RoundRobin,
    Affinity,
    Replicas,
}

impl TableName {
    const ALL: [Self; 3] = [Self::RoundRobin, Self::Affinity, Self::Replicas];

    fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round_robin",
            Self::Affinity => "affinity",
            Self::Replicas => "replicas",
        }
    }
}

impl std::fmt::Display for TableName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the bundled model is, from the repository's root.
const BUNDLED: &str = "examples/models/gpt-moe-16e";

impl Args {
    /// Ranks with a device of their own that this process will host.
    pub(crate) fn device_ranks(&self) -> usize {
        self.ranks.iter().copied().max().unwrap_or(1)
    }

    fn tokens(&self) -> usize {
        if self.quick { self.max_tokens.min(24) as usize } else { self.max_tokens as usize }
    }

    fn repeats(&self) -> usize {
        if self.quick { self.repeats.min(2) as usize } else { self.repeats as usize }
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if let Some(zero) = args.ranks.iter().find(|ranks| **ranks == 0) {
        return Err(Failure::Input(format!("--ranks {zero}: use at least 1")));
    }
    if args.sequences.contains(&0) {
        return Err(Failure::Input("--sequences 0: use at least 1".into()));
    }
    if let Some(folder) = &args.cell_of {
        return cell(args, folder);
    }
    let rows = grid(args)?;
    match args.format {
        Format::Json => output::json(&rows),
        Format::Md => output::text(&markdown(&rows)),
        Format::Html => output::text(&html(&rows)),
    }
}

/// Solves the tables, then measures each cell in a process of its own: drivers may keep something of every device that
/// a process ever had.
fn grid(args: &Args) -> Result<Vec<GridRow>, Failure> {
    let folder = Scratch::new()?;
    let (models, ranks, sequences, links) = match args.quick {
        true => (vec!["bundled".to_owned()], vec![4], vec![8], vec![LinkName::Local, LinkName::Wan]),
        false => (args.models.clone(), args.ranks.clone(), args.sequences.clone(), args.links.clone()),
    };
    let mut rows = Vec::new();
    for model in &models {
        let path = model_folder(model, &folder.0, args.seed)?;
        let layers = solve_tables(args, model, &path, &ranks, &folder.0)?;
        for &ranks in &ranks {
            for link in &links {
                output::note(&format!("{model}, {ranks} ranks, {link}"));
                let mut measured = child(args, model, ranks, *link, &sequences, &folder.0)?;
                predict(&mut measured, &rows, *link, layers);
                rows.extend(measured);
            }
        }
    }
    Ok(rows)
}

/// Puts beside what was measured on a shaped link what the same setting's row on `local` foretells.
fn predict(measured: &mut [GridRow], before: &[GridRow], link: LinkName, layers: usize) {
    let Some(spec) = link.spec() else { return };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let setting = |r: &GridRow| {
        (r.model.clone(), r.ranks, r.sequences, r.strategy.clone(), r.schedule.clone(), r.table.clone())
    };
    for row in measured {
        let local = before.iter().find(|r| r.link == "local" && setting(r) == setting(row));
        row.predicted_tokens_per_s = local.and_then(|local| study::predict(local, &spec, layers, cores));
    }
}

/// A folder that goes with the process.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("exflow-strategies-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|e| {
            Failure::Run(format!("{}: {e}; set TMPDIR to a folder that can be written", path.display()))
        })?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn model_folder(model: &str, scratch: &Path, seed: u64) -> Result<PathBuf, Failure> {
    match model {
        "bundled" => match Path::new(BUNDLED).is_dir() {
            true => Ok(PathBuf::from(BUNDLED)),
            false => Err(Failure::Input(format!(
                "the bundled model is not at {BUNDLED}: start in the repository's root, or give folders to --models"
            ))),
        },
        "synthetic-gqa" => {
            let path = scratch.join("synthetic-gqa");
            if !path.is_dir() {
                SyntheticModel { seed, ..SyntheticModel::default() }.write(&path)?;
            }
            Ok(path)
        }
        folder => Ok(PathBuf::from(folder)),
    }
}

fn table_path(folder: &Path, model: &str, ranks: usize, table: TableName) -> PathBuf {
    let model: String = model.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
    folder.join(format!("{model}-{ranks}-{table}.json"))
}

fn solve_tables(
    args: &Args,
    model: &str,
    path: &Path,
    ranks: &[usize],
    folder: &Path,
) -> Result<usize, Failure> {
    let bars = Bars::new();
    let mut options = ClusterOptions::new(path);
    options.adapter = args.adapter.clone();
    let mut cluster = Cluster::start(options, &bars)?;
    let routes = study::grid_profile(&mut cluster, args.seed, &bars)?;
    let spec = cluster.spec().clone();
    for &ranks in ranks {
        for &table in &args.tables {
            let solve =
                SolveOptions { seed: args.seed, time_limit: args.time_limit, ..SolveOptions::default() };
            let mut solved = match table {
                TableName::RoundRobin => PlacementTable::round_robin(spec.moe_layers(), spec.experts, ranks),
                TableName::Affinity => study::grid_table(&routes, spec.experts, ranks, None, &solve)?,
                TableName::Replicas => {
                    let even = spec.experts.div_ceil(ranks);
                    let slots = even + even.div_ceil(2);
                    study::grid_table(&routes, spec.experts, ranks, Some(slots), &solve)?
                }
            };
            solved.model_digest = Some(spec.digest.clone());
            solved.source = Some(table.name().into());
            solved.save(&table_path(folder, model, ranks, table))?;
        }
    }
    Ok(spec.moe_layers())
}

fn child(
    args: &Args,
    model: &str,
    ranks: usize,
    link: LinkName,
    sequences: &[usize],
    folder: &Path,
) -> Result<Vec<GridRow>, Failure> {
    let failed = |what: String| Failure::Run(format!("{model}, {ranks} ranks, {link}: {what}"));
    let this = std::env::current_exe().map_err(|e| failed(format!("no path of this program: {e}")))?;
    let list = |items: Vec<String>| items.join(",");
    let mut command = Command::new(this);
    command.args(["bench", "strategies", "--format", "json", "--models", model]);
    command.args(["--ranks", &ranks.to_string(), "--links", link.name()]);
    command.args(["--sequences", &list(sequences.iter().map(usize::to_string).collect())]);
    command.args(["--strategies", &list(args.strategies.iter().map(Strategy::to_string).collect())]);
    command.args(["--schedules", &list(args.schedules.iter().map(Schedule::to_string).collect())]);
    command.args(["--tables", &list(args.tables.iter().map(TableName::to_string).collect())]);
    command.args(["-n", &args.tokens().to_string(), "-r", &args.repeats().to_string()]);
    command.args(["--seed", &args.seed.to_string()]);
    command.arg("--cell-of").arg(folder);
    if let Some(adapter) = &args.adapter {
        command.args(["--adapter", adapter]);
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| failed(format!("the cell's process did not start: {e}")))?;
    if !output.status.success() {
        return Err(failed("its process failed; the reason stands above".into()));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| failed(format!("its result cannot be read: {e}")))
}

/// The child's part: one model, world size and link.
fn cell(args: &Args, folder: &Path) -> Result<(), Failure> {
    let (Some(model), Some(&ranks), Some(&link)) =
        (args.models.first(), args.ranks.first(), args.links.first())
    else {
        return Err(Failure::Input("a cell needs a model, a world size and a link".into()));
    };
    let path = model_folder(model, folder, args.seed)?;
    let mut options = ClusterOptions::new(&path);
    options.ranks = ranks;
    options.adapter = args.adapter.clone();
    options.link = link.spec();
    options.transport = if options.link.is_some() { TransportKind::Quic } else { TransportKind::Local };
    let mut settings = Vec::new();
    for &strategy in &args.strategies {
        for &schedule in &args.schedules {
            for &table in &args.tables {
                let placement = PlacementTable::read(&table_path(folder, model, ranks, table), None)?;
                settings.push(GridSetting { strategy, schedule, table: table.name().into(), placement });
            }
        }
    }
    let prompts = study::grid_prompts(&path, 8, args.seed)?;
    let mut grid = Grid::start(&options, settings, &prompts, &NoProgress)?;
    let mut rows = Vec::new();
    for &sequences in &args.sequences {
        let cell = Cell {
            model: model.clone(),
            link: link.name().into(),
            sequences,
            tokens: args.max_tokens as usize,
            repeats: args.repeats as usize,
        };
        rows.extend(grid.measure(&cell, &prompts)?);
    }
    output::json(&rows)
}

/// The best vanilla with round-robin of a row's cell, and vanilla in rounds.
fn baselines(rows: &[GridRow], row: &GridRow) -> (f64, f64) {
    let of_cell = rows.iter().filter(|r| {
        (&r.model, r.ranks, r.sequences, &r.link) == (&row.model, row.ranks, row.sequences, &row.link)
            && r.strategy == "vanilla"
            && r.table == "round_robin"
    });
    let best = of_cell.clone().map(|r| r.tokens_per_s).fold(0.0, f64::max);
    let rounds = of_cell.filter(|r| r.schedule == "rounds").map(|r| r.tokens_per_s).fold(0.0, f64::max);
    (best, rounds)
}

const COLUMNS: [&str; 16] = [
    "setting",
    "tokens/s",
    "range",
    "predicted",
    "× best vanilla",
    "× vanilla in rounds",
    "floor",
    "TTFT ms",
    "2nd ms",
    "TPOT p50",
    "p99",
    "waits/layer",
    "crossings",
    "stay",
    "dispatch+combine B",
    "K/V B",
];

fn cells(rows: &[GridRow], row: &GridRow) -> [String; 16] {
    let (best, rounds) = baselines(rows, row);
    let times = |base: f64| if base > 0.0 { format!("{:.2}", row.tokens_per_s / base) } else { "–".into() };
    let bytes = &row.bytes_per_token;
    let or_dash = |figure: Option<f64>| figure.map_or_else(|| "–".to_owned(), |f| format!("{f:.1}"));
    [
        format!("{}, {}, {}", row.strategy, row.schedule, row.table),
        format!("{:.1}", row.tokens_per_s),
        format!("{:.1}–{:.1}", row.tokens_per_s_range.0, row.tokens_per_s_range.1),
        or_dash(row.predicted_tokens_per_s),
        times(best),
        times(rounds),
        or_dash(row.floor_tokens_per_s),
        format!("{:.0}", row.ttft_ms),
        format!("{:.0}", row.second_token_ms),
        format!("{:.1}", row.tpot_p50_ms),
        format!("{:.1}", row.tpot_p99_ms),
        format!("{:.2}", row.exchanges_per_layer),
        format!("{:.2}", row.crossings_per_token),
        format!("{:.3}", row.stay_rate),
        format!("{:.0}", bytes.dispatch + bytes.combine),
        format!("{:.0}", bytes.kv),
    ]
}

/// The rows by cell, with a heading each.
fn by_cell(rows: &[GridRow]) -> Vec<(String, Vec<&GridRow>)> {
    let mut cells: Vec<(String, Vec<&GridRow>)> = Vec::new();
    for row in rows {
        let name = format!("{}, {} ranks, {} sequences, {}", row.model, row.ranks, row.sequences, row.link);
        match cells.iter_mut().find(|(known, _)| *known == name) {
            Some((_, of)) => of.push(row),
            None => cells.push((name, vec![row])),
        }
    }
    cells
}

fn markdown(rows: &[GridRow]) -> String {
    let mut text = String::new();
    for (name, of) in by_cell(rows) {
        let _ =
            writeln!(text, "### {name}\n\n| {} |\n|{}", COLUMNS.join(" | "), "---|".repeat(COLUMNS.len()));
        for row in of {
            let _ = writeln!(text, "| {} |", cells(rows, row).join(" | "));
        }
        text.push('\n');
    }
    text
}

fn html(rows: &[GridRow]) -> String {
    let mut text = String::from(
        "<!doctype html><meta charset=\"utf-8\"><title>exflow bench strategies</title>\n\
         <style>body{font:14px sans-serif}td,th{padding:2px 8px;text-align:right}td:first-child{text-align:left}</style>\n",
    );
    for (name, of) in by_cell(rows) {
        let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;");
        let head: String = COLUMNS.iter().map(|c| format!("<th>{c}</th>")).collect();
        let _ = writeln!(text, "<h2>{}</h2>\n<table><tr>{head}</tr>", escape(&name));
        for row in of {
            let line: String = cells(rows, row).iter().map(|c| format!("<td>{}</td>", escape(c))).collect();
            let _ = writeln!(text, "<tr>{line}</tr>");
        }
        text += "</table>\n";
    }
    text
}
