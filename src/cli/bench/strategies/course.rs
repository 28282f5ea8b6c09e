//! The course of a grid: each model's tables, then its cells, one after the other; what is finished is kept whatever
//! becomes of the rest.

use super::super::super::failure::Failure;
use super::super::super::output;
use super::super::models::{Scratch, model_folder};
use super::child::{End, Parts};
use super::{Args, Format, LinkName, tables};
use exflow::engine::ModelSpec;
use exflow::study::GridRow;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is measured in one process.
struct Cell<'a> {
    model: &'a str,
    ranks: usize,
    link: LinkName,
}

impl std::fmt::Display for Cell<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} ranks, {}", self.model, self.ranks, self.link)
    }
}

struct Course<'a> {
    args: &'a Args,
    /// Of all cells that are finished, and of unfinished ones' numbers of sequences.
    rows: Vec<GridRow>,
    /// Exit codes of the parts that failed; `None` of one that was killed.
    failed: Vec<Option<i32>>,
}

/// Measures the grid and writes what came of it.
///
/// # Errors
/// Names the cells that are missing, after what is there was written.
pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let mut course = Course { args, rows: Vec::new(), failed: Vec::new() };
    let scratch = Scratch::new("strategies")?;
    // A name that is wrong is told now, not when its turn comes.
    for model in args.models.iter().filter(|model| *model != "synthetic-gqa") {
        ModelSpec::read(&model_folder(model, scratch.path(), args.runs.seed)?)?;
    }
    if let Some(path) = &args.out {
        let refused = |e| Failure::Input(format!("{}: cannot be written: {e}", path.display()));
        std::fs::write(beside(path), "")
            .and_then(|()| std::fs::remove_file(beside(path)))
            .map_err(refused)?;
    }
    let parts = Parts::new()?;
    let stopped = course.measure(&parts, scratch.path())?;
    course.finish(stopped)
}

impl Course<'_> {
    /// Whether it was stopped on the way.
    fn measure(&mut self, parts: &Parts, folder: &Path) -> Result<bool, Failure> {
        for model in &self.args.models {
            output::note(&format!("{model}: tables"));
            match parts.run(self.tables_of(model, folder)?, &mut |_| {})? {
                End::Done => {}
                End::Failed(status) => {
                    self.failed(&format!("{model}: tables"), status);
                    continue;
                }
                End::Stopped => return Ok(true),
            }
            for cell in self.cells(model) {
                output::note(&cell.to_string());
                let part = self.part_of(&cell, folder)?;
                match parts.run(part, &mut |line| self.take(&cell, line))? {
                    End::Done => {}
                    End::Failed(status) => self.failed(&cell.to_string(), status),
                    End::Stopped => return Ok(true),
                }
            }
        }
        Ok(false)
    }

    fn cells<'m>(&self, model: &'m str) -> Vec<Cell<'m>> {
        let of = |&ranks: &usize| self.args.links.iter().map(move |&link| Cell { model, ranks, link });
        self.args.ranks.iter().flat_map(of).collect()
    }

    /// Keeps what a cell tells of one number of sequences.
    fn take(&mut self, cell: &Cell<'_>, line: &str) {
        match serde_json::from_str::<Vec<GridRow>>(line) {
            Ok(rows) => self.rows.extend(rows),
            Err(error) => output::note(&format!("{cell}: its result cannot be read: {error}")),
        }
        // The end of the grid writes again, and fails where this did.
        if let Err(Failure::Run(error)) = self.keep() {
            output::note(&format!("{cell}: {error}"));
        }
    }

    fn failed(&mut self, what: &str, status: std::process::ExitStatus) {
        self.failed.push(status.code());
        output::note(&format!("{what}: failed ({status})"));
    }

    /// The rows as they are asked for, and what is not among them.
    fn document(&self) -> Result<String, Failure> {
        let missing = self.missing();
        Ok(match self.args.format {
            Format::Json => serde_json::to_string_pretty(&self.rows)? + "\n",
            Format::Md => tables::markdown(&self.rows, &missing),
            Format::Html => tables::html(&self.rows, &missing),
        })
    }

    /// Writes the file that was asked for, in one go: who reads it meanwhile finds it whole.
    fn keep(&self) -> Result<(), Failure> {
        let Some(path) = &self.args.out else { return Ok(()) };
        std::fs::write(beside(path), self.document()?)
            .and_then(|()| std::fs::rename(beside(path), path))
            .map_err(|e| Failure::Run(format!("{}: cannot be written: {e}", path.display())))
    }

    /// What is still to be measured, by cell.
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for cell in self.args.models.iter().flat_map(|model| self.cells(model)) {
            let there = |sequences: usize| {
                let of = |row: &GridRow| (row.ranks, row.sequences) == (cell.ranks, sequences);
                let at = |row: &GridRow| row.model == cell.model && row.link == cell.link.name();
                self.rows.iter().any(|row| of(row) && at(row))
            };
            let not: Vec<String> =
                self.args.sequences.iter().filter(|n| !there(**n)).map(usize::to_string).collect();
            if !not.is_empty() {
                missing.push(format!("{cell}, {} sequences", not.join(" and ")));
            }
        }
        missing
    }

    fn finish(&self, stopped: bool) -> Result<(), Failure> {
        let missing = self.missing();
        if !self.rows.is_empty() {
            let kept = self.keep();
            if self.args.out.is_none() || kept.is_err() {
                output::text(&self.document()?)?;
            }
            kept?;
        }
        if missing.is_empty() {
            return Ok(());
        }
        let mut text = String::from(if stopped { "stopped" } else { "not all could be measured" });
        let _ = write!(text, "; missing: {}", missing.join("; "));
        // Bad input, where nothing else was in the way.
        let refused = !stopped && self.failed.iter().all(|code| *code == Some(2));
        Err(if refused { Failure::Input(text) } else { Failure::Run(text) })
    }

    fn tables_of(&self, model: &str, folder: &Path) -> Result<Command, Failure> {
        let mut command = self.command(model, &self.args.ranks, folder)?;
        command.arg("--solve");
        command.args(["--time-limit", &format!("{}us", self.args.runs.time_limit.as_micros())]);
        Ok(command)
    }

    fn part_of(&self, cell: &Cell<'_>, folder: &Path) -> Result<Command, Failure> {
        let mut command = self.command(cell.model, &[cell.ranks], folder)?;
        command.args(["--links", cell.link.name(), "--sequences", &list(&self.args.sequences)]);
        command.args(["-r", &self.args.runs.repeats.to_string()]);
        if self.args.no_auto {
            command.arg("--no-auto");
        }
        Ok(command)
    }

    /// This program, to do a part.
    fn command(&self, model: &str, ranks: &[usize], folder: &Path) -> Result<Command, Failure> {
        let args = self.args;
        let this = std::env::current_exe()
            .map_err(|e| Failure::Run(format!("no path of this program, which measures each cell: {e}")))?;
        let mut command = Command::new(this);
        command.args(["bench", "strategies", "--models", model, "--ranks", &list(ranks)]);
        command.args(["-n", &args.max_tokens.to_string(), "--seed", &args.runs.seed.to_string()]);
        command.arg("--cell-of").arg(folder);
        if args.quick {
            command.arg("--quick");
        }
        if args.ablations {
            command.arg("--ablations");
        } else {
            command.args(["--strategies", &list(&args.strategies)]);
            command.args(["--schedules", &list(&args.schedules)]);
            command.args(["--lingers", &list(&args.lingers)]);
            command.args(["--tables", &list(&args.tables)]);
        }
        if let Some(adapter) = &args.runs.adapter {
            command.args(["--adapter", adapter]);
        }
        Ok(command)
    }
}

/// Where a file is written before it takes the place of the one before it.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(".part");
    name.into()
}

/// As flags take several.
fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}
