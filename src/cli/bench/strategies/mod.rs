//! `exflow bench strategies`: the grid of strategies, schedules, tables, links, ranks and sequences.

mod cell;
mod child;
mod course;
mod tables;

use super::super::failure::Failure;
use super::super::flags;
use super::RunFlags;
use clap::ValueEnum;
use exflow::engine::{Linger, Overlap, Schedule, Strategy};
use exflow::placement::SolveOptions;
use exflow::study::Effort;
use exflow::transport::link::LinkSpec;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Measures every strategy with every schedule and table, interleaved, on links to order
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Each cell (model, ranks, link) runs in a process of its own, one rank per host on the shaped links: what each\n\
                        rank sends is delayed and slowed. All settings of a cell take turns and must say the same tokens; `auto` is what\n\
                        the planner picks from measurements taken in the cell, which also predict every other row.\n\
                        A cell that fails is named and the others go on; Ctrl-C ends the run with what is finished. Either way the\n\
                        last line says what is missing, and the exit code is not 0.\n\
                        docs/METHODOLOGY.md defines the figures.\n\n\
                        Example:\n  exflow bench strategies --ranks 4 --sequences 8 --links wan,local --format json"
)]
pub(crate) struct Args {
    /// Models: bundled, synthetic-gqa, or folders
    #[arg(long, value_name = "MODEL", value_delimiter = ',', default_values_t = ["bundled".to_owned(), "synthetic-gqa".to_owned()], default_value_if("quick", "true", "bundled"))]
    models: Vec<String>,
    /// World sizes
    #[arg(long, value_name = "R", value_delimiter = ',', default_values_t = [2, 4], default_value_if("quick", "true", "4"))]
    ranks: Vec<usize>,
    /// Sequences at once; 1: eight prompts, one after the other
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 8, 32], default_value_if("quick", "true", "8"))]
    sequences: Vec<usize>,
    /// Links: local (memory), lan, wifi, wan
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = LinkName::ALL, default_value_if("quick", "true", "local,wan"))]
    links: Vec<LinkName>,
    /// Strategies
    #[arg(long, value_name = "S", value_delimiter = ',', default_values_t = [Strategy::Vanilla, Strategy::Coherent])]
    strategies: Vec<Strategy>,
    /// Schedules
    #[arg(long, value_name = "S", value_delimiter = ',', default_values_t = [Schedule::Rounds, Schedule::Flow])]
    schedules: Vec<Schedule>,
    /// Tables: round_robin, affinity, replicas (affinity with half as many slots again), chain (affinity without the step
    /// from a token's last layer to its successor's first)
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = TableName::ALL, default_value_if("quick", "true", "round_robin,affinity"))]
    tables: Vec<TableName>,
    /// How long ready rows are held back for a fuller launch, in flow: off, auto, times up to 100ms
    #[arg(long, value_name = "L", value_delimiter = ',', default_value = "auto", value_parser = flags::linger)]
    lingers: Vec<Linger>,
    /// Tokens to make of each prompt
    #[arg(short = 'n', long, value_name = "N", default_value_t = 32, default_value_if("quick", "true", "12"), value_parser = clap::value_parser!(u32).range(2..))]
    max_tokens: u32,
    #[command(flatten)]
    runs: RunFlags,
    /// Neither measures links and kernels first, nor predicts, nor runs what the planner picks
    #[arg(long)]
    no_auto: bool,
    /// In place of every strategy, schedule and table: what each part is worth, from the baseline of two exchanges a layer
    /// to coherence, placement, both, and then with overlap, rows peer by peer, steps in halves, flow, the wrap, rows held back and replicas
    /// one by one
    #[arg(long, conflicts_with_all = ["strategies", "schedules", "tables", "lingers"])]
    ablations: bool,
    /// A grid of a minute: one run of each setting whatever -r says, with tables that are solved within 1 s; where
    /// nothing else is asked for, of the bundled model, 4 ranks, 8 sequences, local and wan, round_robin and affinity, 12 tokens
    #[arg(long)]
    quick: bool,
    /// How the result is written
    #[arg(long, value_enum, default_value = "md")]
    format: Format,
    /// File that is written anew whenever more is finished, in place of stdout at the end
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder of the parent process, with its tables, whose cell this one measures
    #[arg(long, value_name = "DIR", hide = true)]
    cell_of: Option<PathBuf>,
    /// Solves the tables of the parent's model in place of measuring
    #[arg(long, requires = "cell_of", hide = true)]
    solve: bool,
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
    Chain,
}

impl TableName {
    const ALL: [Self; 3] = [Self::RoundRobin, Self::Affinity, Self::Replicas];

    fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round_robin",
            Self::Affinity => "affinity",
            Self::Replicas => "replicas",
            Self::Chain => "chain",
        }
    }
}

impl std::fmt::Display for TableName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Time for the solver, per table, in a quick grid.
const QUICK_SOLVE: Duration = Duration::from_secs(1);

/// A row of the grid: its name among ablations, what runs while rows travel, and how it runs.
type SettingArgs = (Option<&'static str>, Overlap, Linger, Strategy, Schedule, TableName);

/// Each differs from one before it by what its name says.
const ABLATIONS: [SettingArgs; 11] = {
    use Linger::Off as AtOnce;
    use Overlap::{Auto, Halves, Off, Own, Peers};
    use Schedule::{Flow, Rounds};
    use Strategy::{Coherent, Vanilla};
    [
        (Some("baseline"), Off, AtOnce, Vanilla, Rounds, TableName::RoundRobin),
        (Some("coherence alone"), Off, AtOnce, Coherent, Rounds, TableName::RoundRobin),
        (Some("placement alone"), Off, AtOnce, Vanilla, Rounds, TableName::Chain),
        (Some("both"), Off, AtOnce, Coherent, Rounds, TableName::Chain),
        (Some("+ overlap"), Own, AtOnce, Coherent, Rounds, TableName::Chain),
        (Some("+ peer by peer"), Peers, AtOnce, Coherent, Rounds, TableName::Chain),
        (Some("+ halves"), Halves, AtOnce, Coherent, Rounds, TableName::Chain),
        (Some("+ flow"), Auto, AtOnce, Coherent, Flow, TableName::Chain),
        (Some("+ wrap"), Auto, AtOnce, Coherent, Flow, TableName::Affinity),
        (Some("+ linger"), Auto, Linger::Auto, Coherent, Flow, TableName::Affinity),
        (Some("+ replicas"), Auto, Linger::Auto, Coherent, Flow, TableName::Replicas),
    ]
};

impl Args {
    /// What is measured in each cell.
    fn settings(&self) -> Vec<SettingArgs> {
        if self.ablations {
            return ABLATIONS.to_vec();
        }
        let mut all = Vec::new();
        for &strategy in &self.strategies {
            for &schedule in &self.schedules {
                // In rounds nobody lingers.
                let lingers =
                    &self.lingers[..if schedule == Schedule::Flow { self.lingers.len() } else { 1 }];
                for &linger in lingers {
                    let of = |&table| (None, Overlap::Auto, linger, strategy, schedule, table);
                    all.extend(self.tables.iter().map(of));
                }
            }
        }
        all
    }

    /// The tables of these settings.
    fn solved(&self) -> Vec<TableName> {
        let mut tables = Vec::new();
        for (.., table) in self.settings() {
            if !tables.contains(&table) {
                tables.push(table);
            }
        }
        tables
    }

    /// Ranks with a device of their own that this process will host.
    pub(crate) fn device_ranks(&self) -> usize {
        self.ranks.iter().copied().max().unwrap_or(1)
    }

    fn effort(&self) -> Effort {
        if self.quick { Effort::glance() } else { Effort::full(self.runs.repeats as usize) }
    }

    /// How its tables are solved.
    fn solve_options(&self) -> SolveOptions {
        let mut solve = self.runs.solve();
        if self.quick {
            solve.time_limit = solve.time_limit.min(QUICK_SOLVE);
        }
        solve
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
        return if args.solve { cell::solve(args, folder) } else { cell::measure(args, folder) };
    }
    course::run(args)
}

fn table_path(folder: &Path, model: &str, ranks: usize, table: TableName) -> PathBuf {
    let model: String = model.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
    folder.join(format!("{model}-{ranks}-{table}.json"))
}

/// The routes that predictions are made from.
fn routes_path(folder: &Path, model: &str) -> PathBuf {
    table_path(folder, model, 0, TableName::RoundRobin).with_extension("routes")
}
