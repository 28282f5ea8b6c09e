//! What a process of the grid's does: it solves the tables of a model, or measures one cell.

use super::super::super::failure::Failure;
use super::super::super::output;
use super::super::models::model_folder;
use super::{Args, TableName, routes_path, table_path};
use exflow::engine::{Cluster, ClusterOptions, NoProgress, RoutingTrace, TransportKind};
use exflow::placement::PlacementTable;
use exflow::progress::Bars;
use exflow::study::{self, Candidate, Cell, Grid};
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;

/// Solves a model's tables, for every world size.
pub(super) fn solve(args: &Args, folder: &Path) -> Result<(), Failure> {
    let Some(model) = args.models.first() else {
        return Err(Failure::Input("tables are those of a model".into()));
    };
    let bars = Bars::new();
    let mut options = ClusterOptions::new(model_folder(model, folder, args.runs.seed)?);
    options.adapter = args.runs.adapter.clone();
    let mut cluster = Cluster::start(options, &bars)?;
    let routes = study::grid_profile(&mut cluster, study::SOLVED_ON, args.runs.seed, &bars)?;
    // A table does better on the text that it was solved on than on any other, and tokens stay more or less often as a
    // text grows longer: predictions are made from other text, as long as what is measured and made as it is.
    let predicted_on = study::grid_alike(&mut cluster, args.max_tokens as usize, &bars)?;
    save_routes(&routes_path(folder, model), &predicted_on)?;
    let spec = cluster.spec().clone();
    for &ranks in &args.ranks {
        for table in args.solved() {
            let solve = args.solve_options();
            let mut solved = match table {
                TableName::RoundRobin => PlacementTable::round_robin(spec.moe_layers(), spec.experts, ranks),
                TableName::Affinity => study::grid_table(&routes, spec.experts, ranks, None, &solve)?,
                TableName::Chain => study::chain_table(&routes, spec.experts, ranks, &solve)?,
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
    Ok(())
}

/// Measures one model, world size and link; a line of JSON for each number of sequences, as soon as it is there.
pub(super) fn measure(args: &Args, folder: &Path) -> Result<(), Failure> {
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
    let most = args.sequences.iter().copied().max().unwrap_or(1).max(study::ALONE);
    let effort = args.effort();
    let prompts = study::grid_prompts(&path, most * effort.repeats, args.runs.seed)?;
    let routes = match args.no_auto {
        true => None,
        false => Some(load_routes(&routes_path(folder, model))?),
    };
    let how = (effort, &NoProgress as _);
    let mut grid = Grid::start(&options, settings, routes, &args.sequences, &prompts, how)?;
    for &sequences in &args.sequences {
        let cell = Cell {
            model: model.clone(),
            link: link.name().into(),
            sequences,
            tokens: args.max_tokens as usize,
        };
        output::json_line(&grid.measure(&cell)?)?;
    }
    Ok(())
}

/// With where texts begin, which predictions go by.
fn save_routes(path: &Path, routes: &RoutingTrace) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::Run(format!("{}: {e}", path.display()));
    let file = BufWriter::new(File::create(path).map_err(failed)?);
    serde_json::to_writer(file, routes).map_err(|e| failed(e.into()))
}

fn load_routes(path: &Path) -> Result<RoutingTrace, Failure> {
    let failed = |e: std::io::Error| Failure::Run(format!("{}: {e}", path.display()));
    let file = BufReader::new(File::open(path).map_err(failed)?);
    serde_json::from_reader(file).map_err(|e| failed(e.into()))
}
