//! The README's own commands, run as they stand there.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every `sh` block of the README, in order. `make test` is what runs this test, so it is left out.
fn blocks() -> Vec<String> {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    let mut blocks = Vec::new();
    let mut rest = readme.as_str();
    while let Some(start) = rest.find("```sh\n") {
        let body = &rest[start + 6..];
        let end = body.find("```").expect("a block that ends");
        blocks.push(body[..end].to_string());
        rest = &body[end + 3..];
    }
    blocks.retain(|block| block.trim() != "make test");
    blocks
}

/// A `cargo` that hands `cargo run` to the programs that this very build made: the same sources and the same
/// words, without a second build of everything in another profile.
fn shim(folder: &Path) {
    let exflow = env!("CARGO_BIN_EXE_exflow");
    let examples = PathBuf::from(exflow).with_file_name("examples");
    let text = format!(
        "#!/bin/sh\n\
         real={cargo}\n\
         case \"$*\" in\n\
         'run --release --example '*) example={examples}/$4; shift 4;\n\
         [ \"${{1:-}}\" = -- ] && shift;\n\
         [ -x \"$example\" ] || \"$real\" build --quiet --example \"${{example##*/}}\";\n\
         exec \"$example\" \"$@\";;\n\
         'run --release -- '*) shift 3; exec {exflow} \"$@\";;\n\
         'run --release --bin exflow -- '*) shift 5; exec {exflow} \"$@\";;\n\
         *) exec \"$real\" \"$@\";;\n\
         esac\n",
        cargo = quoted(env!("CARGO")),
        examples = quoted(&examples.display().to_string()),
        exflow = quoted(exflow),
    );
    let path = folder.join("cargo");
    fs::write(&path, text).expect("the shim");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[test]
fn the_readme_has_its_two_commands_first() {
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    let demo = readme.find("```sh\nmake demo\n```").expect("make demo");
    let test = readme.find("```sh\nmake test\n```").expect("make test");
    assert!(demo < test);
    assert!(blocks().iter().all(|block| block.trim() != "make test"));
}

#[test]
fn every_command_of_the_readme_runs() {
    let blocks = blocks();
    assert!(blocks.len() >= 4, "the README's blocks are where this test looks");
    let folder = tempfile::tempdir().expect("a folder");
    shim(folder.path());
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap_or_default());
    for block in blocks {
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &block])
            .current_dir(root())
            .env("PATH", &path)
            .env_remove("CARGO") // make must find the shim
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL")
            .stdin(Stdio::null())
            .output()
            .expect("bash");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{block}\nstdout:\n{out}\nstderr:\n{err}");
        if block.trim() == "make demo" {
            check_demo(&out);
        }
    }
}

/// The demo ends with the address of its report, and the report and its files are there.
fn check_demo(out: &str) {
    let last = out.trim_end().lines().last().unwrap_or_default();
    let (_, address) =
        last.split_once("file://").unwrap_or_else(|| panic!("the report's address is last: {last}"));
    let report = Path::new(address);
    assert!(fs::read_to_string(report).expect("the report").contains("</html>"));
    for name in ["trace.npy", "affinity.npz", "placement.json"] {
        assert!(report.with_file_name(name).is_file(), "{name}");
    }
    for setting in ["vanilla, round_robin", "coherent, round_robin", "coherent, affinity"] {
        assert!(out.lines().any(|line| line.starts_with(setting)), "the table has {setting}:\n{out}");
    }
}
