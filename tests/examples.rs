//! Every example runs, and says what it is there to show.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// An example's program. `cargo test` makes them all before it runs tests; with `--test` alone they are made here.
fn program(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_exflow")).with_file_name("examples");
    let program = folder.join(name).with_extension(std::env::consts::EXE_EXTENSION);
    if !program.is_file() {
        let build = ["build", "--workspace", "--quiet", "--locked", "--example", name];
        let built = Command::new(env!("CARGO")).args(build).current_dir(env!("CARGO_MANIFEST_DIR")).status();
        assert!(built.expect("cargo").success(), "{name}");
    }
    program
}

fn said(name: &str, args: &[&str], stdin: &str) -> String {
    let mut child = Command::new(program(name))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    child.stdin.take().expect("stdin").write_all(stdin.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}:\n{out}\n{err}");
    out.into_owned()
}

#[test]
fn generate() {
    let out = said("generate", &["In the", "A good"], "");
    assert!(out.lines().any(|l| l.starts_with("[0]")) && out.lines().any(|l| l.starts_with("[1]")), "{out}");
    assert!(out.contains("1.00 exchanges per MoE layer"), "{out}");
}

#[test]
fn chat() {
    let out = said("chat", &[], "In the beginning\n\nThe king\n");
    assert!(out.lines().count() >= 2, "an answer to each turn: {out}");
}

#[test]
fn profile_and_place() {
    let out = said("profile_and_place", &[], "");
    let stays = |name: &str| -> f64 {
        let line = out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {out}"));
        line[name.len()..].split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
    };
    assert!(stays("by affinity") > 1.2 * stays("round_robin"), "{out}");
}

#[test]
fn compare_strategies() {
    let out = said("compare_strategies", &[], "");
    assert!(out.contains("both said the same: true"), "{out}");
    let exchanges =
        |name: &str| out.lines().find(|l| l.starts_with(name)).and_then(|l| l.split_whitespace().nth(2));
    assert_eq!((exchanges("vanilla"), exchanges("coherent")), (Some("2.00"), Some("1.00")), "{out}");
}

#[test]
fn embed_as_library() {
    let out = said("embed_as_library", &[], "");
    assert!(out.contains("6 requests finished, 1 given up"), "{out}");
}

#[test]
fn custom_placement() {
    let out = said("custom_placement", &[], "");
    assert!(out.contains("both said the same: true"), "{out}");
}

#[test]
fn replay_trace() {
    let out = said("replay_trace", &[], "");
    assert_eq!(out.lines().filter(|line| line.contains("by affinity")).count(), 3, "{out}");
}

#[test]
fn examples_are_short() {
    let mut open = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).expect("examples").map(|entry| entry.expect("an entry").path())
        {
            if entry.is_dir() {
                open.push(entry);
            } else if entry.extension().is_some_and(|e| e == "rs") {
                let lines = std::fs::read_to_string(&entry).expect("text").lines().count();
                assert!(lines < 120, "{}: {lines} lines", entry.display());
            }
        }
    }
}
