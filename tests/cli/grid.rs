//! Grids of strategies that do not come to their end: what is finished is kept, and what is missing is told.

use crate::{command, exflow, text, tiny, utf8};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};

/// Two cells, of one and of two ranks.
const CELLS: [&str; 19] = [
    "--ranks",
    "1,2",
    "--sequences",
    "2",
    "--links",
    "local",
    "--strategies",
    "coherent",
    "--schedules",
    "rounds",
    "--tables",
    "round_robin",
    "--no-auto",
    "-n",
    "4",
    "-r",
    "1",
    "--time-limit",
    "100ms",
];

/// A grid of two cells on `model`.
fn start(model: &str, more: &[&str]) -> Child {
    let args = [&["bench", "strategies", "--models", model][..], &CELLS, more].concat();
    command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts")
}

/// Lets it run until it says that a cell begins, does something, and waits for its end; with its stdout and stderr.
fn until(mut grid: Child, cell: &str, then: impl FnOnce(u32)) -> (ExitStatus, String, String) {
    let mut stderr = BufReader::new(grid.stderr.take().expect("piped"));
    let mut told = String::new();
    while told.lines().last() != Some(cell) {
        assert!(stderr.read_line(&mut told).expect("reads") > 0, "it ended before {cell}: {told}");
    }
    then(grid.id());
    // Its end is also that of all processes that it started: they share its stderr.
    stderr.read_to_string(&mut told).expect("reads");
    let output = grid.wait_with_output().expect("it ends");
    (output.status, text(&output.stdout), told)
}

fn kill(signal: &str, process: u32) {
    let status = Command::new("kill").args([signal, &process.to_string()]).status().expect("kill starts");
    assert!(status.success(), "{process} was not there");
}

/// The world sizes of the rows.
fn ranks(json: &str) -> Vec<u64> {
    let rows: Value = serde_json::from_str(json).expect("one JSON document");
    rows.as_array().expect("a list").iter().map(|row| row["ranks"].as_u64().expect("a number")).collect()
}

#[test]
fn an_interrupted_grid_tells_what_is_finished() {
    let folder = tiny();
    let model = utf8(folder.path());
    let second = format!("{model}, 2 ranks, local");
    let grid = start(model, &["--format", "json"]);
    let (status, out, err) = until(grid, &second, |process| kill("-INT", process));
    assert_eq!(status.code(), Some(1), "{err}");
    assert_eq!(ranks(&out), [1], "{err}");
    let last = format!("error: stopped; missing: {second}, 2 sequences");
    assert_eq!(err.lines().last(), Some(&*last), "{err}");
    assert!(!err.contains("failed"), "{err}");
}

/// The process that another one has started last, as soon as there is one.
#[cfg(target_os = "linux")]
fn child_of(process: u32) -> u32 {
    let parent = |folder: &std::path::Path| {
        let stat = std::fs::read_to_string(folder.join("stat")).ok()?;
        let (_, behind_its_name) = stat.rsplit_once(") ")?;
        behind_its_name.split(' ').nth(1)?.parse::<u32>().ok()
    };
    for _ in 0..1000 {
        let processes = std::fs::read_dir("/proc").expect("a folder").flatten().map(|entry| entry.path());
        let mut children = processes.filter(|folder| parent(folder) == Some(process));
        if let Some(child) = children.next() {
            return child.file_name().and_then(|id| id.to_str()?.parse().ok()).expect("a number");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("{process} started nothing");
}

#[cfg(target_os = "linux")]
#[test]
fn a_cell_that_is_killed_is_named_and_the_others_run() {
    let folder = tiny();
    let model = utf8(folder.path());
    let file = folder.file("grid.md");
    let first = format!("{model}, 1 ranks, local");
    let grid = start(model, &["--format", "md", "--out", utf8(&file)]);
    let (status, out, err) = until(grid, &first, |process| kill("-KILL", child_of(process)));
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(err.contains(&format!("{first}: failed (signal: 9 (SIGKILL))")), "{err}");
    let missing = format!("missing: {first}, 2 sequences");
    assert_eq!(err.lines().last(), Some(&*format!("error: not all could be measured; {missing}")), "{err}");
    assert!(out.is_empty(), "{out}");
    let kept = std::fs::read_to_string(&file).expect("the file");
    assert!(kept.contains(&format!("### {model}, 2 ranks, 2 sequences, local")), "{kept}");
    assert!(kept.ends_with(&format!("M{}.\n", &missing[1..])), "{kept}");
}

#[test]
fn a_grid_that_cannot_be_kept_is_refused_before_it_is_measured() {
    let folder = tiny();
    let (model, nowhere) = (utf8(folder.path()), folder.file("nowhere").join("grid.json"));
    let output =
        exflow(&[&["bench", "strategies", "--models", model, "--out", utf8(&nowhere)], &CELLS[..]].concat());
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.starts_with(&format!("error: {}: cannot be written", nowhere.display())), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
}
