//! One cell of the grid, in a process of its own: drivers may keep something of every device that a process ever had.

use super::super::super::failure::Failure;
use super::super::super::output;
use super::super::models::model_folder;
use super::{Args, LinkName, TableName, routes_path, table_path};
use exflow::engine::{ClusterOptions, Linger, NoProgress, RoutingTrace, Schedule, Strategy, TransportKind};
use exflow::placement::PlacementTable;
use exflow::study::{self, Candidate, Cell, Grid, GridRow};
use std::path::Path;
use std::process::{Command, Stdio};

/// Measures a cell in a process of its own.
pub(super) fn child(
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
    command.args(["-n", &args.tokens().to_string(), "-r", &args.repeats().to_string()]);
    command.args(["--seed", &args.runs.seed.to_string()]);
    command.arg("--cell-of").arg(folder);
    if args.ablations {
        command.arg("--ablations");
    } else {
        command.args(["--strategies", &list(args.strategies.iter().map(Strategy::to_string).collect())]);
        command.args(["--schedules", &list(args.schedules.iter().map(Schedule::to_string).collect())]);
        command.args(["--lingers", &list(args.lingers.iter().map(Linger::to_string).collect())]);
        command.args(["--tables", &list(args.tables.iter().map(TableName::to_string).collect())]);
    }
    if args.no_auto {
        command.arg("--no-auto");
    }
    if let Some(adapter) = &args.runs.adapter {
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
pub(super) fn run(args: &Args, folder: &Path) -> Result<(), Failure> {
    let (Some(model), Some(&ranks), Some(&link)) =
        (args.models.first(), args.ranks.first(), args.links.first())
    else {
        return Err(Failure::Input("a cell needs a model, a world size and a link".into()));
    };
    let path = model_folder(model, folder, args.runs.seed)?;
    let mut options = ClusterOptions::new(&path);
    options.ranks = ranks;
    options.adapter = args.runs.adapter.clone();
    options.link = link.spec();
    options.transport = if options.link.is_some() { TransportKind::Quic } else { TransportKind::Local };
    let mut settings = Vec::new();
    for (ablation, overlap, linger, strategy, schedule, table) in args.settings() {
        let placement = PlacementTable::read(&table_path(folder, model, ranks, table), None)?;
        let table = table.name().into();
        settings.push(Candidate { strategy, schedule, table, placement, ablation, overlap, linger });
    }
    let prompts = study::grid_prompts(&path, 8, args.runs.seed)?;
    let routes = match args.no_auto {
        true => None,
        false => Some(
            RoutingTrace::load_npy(&routes_path(folder, model)).map_err(|e| Failure::Run(e.to_string()))?,
        ),
    };
    let mut grid = Grid::start(&options, settings, routes, &prompts, &NoProgress)?;
    let mut rows = Vec::new();
    for &sequences in &args.sequences {
        let cell = Cell {
            model: model.clone(),
            link: link.name().into(),
            sequences,
            tokens: args.max_tokens as usize,
            repeats: args.runs.repeats as usize,
        };
        rows.extend(grid.measure(&cell, &prompts)?);
    }
    output::json(&rows)
}
