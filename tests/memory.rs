//! How much memory of the host a load takes, and that steps take none.

mod common;

use common::tiny::Tiny;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// The most memory that a process has, in bytes, which loads `model` in `ranks` ranks and makes `steps` tokens, where the system tells.
fn peak(model: &Path, ranks: &str, steps: &str, more: &[&str]) -> Option<u64> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_exflow"))
        .args(["bench", "model", "-p", "2", "-n", steps, "-r", "1", "--ep-size", ranks, "-m"])
        .arg(model)
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    let status = format!("/proc/{}/status", child.id());
    let mut most = None;
    while child.try_wait().expect("a child").is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with("VmHWM:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        most = most.max(kilobytes.map(|kb| kb << 10));
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(child.wait().expect("a child").success());
    most
}

#[test]
fn a_load_takes_little_more_than_what_it_loads() {
    let adapter = exflow::engine::devices().into_iter().next().expect("an adapter");
    // Elsewhere what is on the device is no memory of the host's.
    if adapter.kind != "cpu" {
        return;
    }
    let small = Tiny { hidden: 256, inner: 64, experts: 2, layers: 4, ..Tiny::default() }.write();
    let large = Tiny { hidden: 256, inner: 1024, experts: 32, layers: 4, ..Tiny::default() };
    let weights = (4 * large.layers * large.experts * 2 * large.hidden * large.inner) as u64;
    let large = large.write();
    for (ranks, more, held) in
        [("1", &[][..], weights), ("2", &[], weights), ("1", &["--dtype", "f16"], weights / 2)]
    {
        // Compiling takes memory too; once done, drivers find kernels on disk.
        for model in [&small, &large] {
            peak(model.path(), ranks, "1", more);
        }
        // A device of each rank has memory of its own.
        let Some(without) = peak(small.path(), ranks, "1", more) else { return };
        let taken = peak(large.path(), ranks, "1", more).expect("as before").saturating_sub(without);
        assert!(taken > held, "{ranks} ranks, {more:?}: {taken} bytes hold {held}");
        // A rank's window on the file is 32 MiB.
        let most = held + held / 5 + ranks.parse::<u64>().expect("a number") * (32 << 20);
        assert!(taken < most, "{ranks} ranks, {more:?}: {taken} of {most} bytes for {held} of weights");
    }
}

// A driver that compiles a kernel anew at a step keeps what it compiled: lavapipe does that for values of uniforms, where it thinks that
// it gains (`shaders/wgsl/shared/product.wgsl`). 100 steps of it took 160 to 330 MiB; steps as they should be take none.
#[test]
fn steps_take_no_memory() {
    let fixtures = Path::new("tests/parity/fixtures");
    let mut models: Vec<_> =
        fs::read_dir(fixtures).expect("fixtures").map(|entry| entry.expect("a fixture").path()).collect();
    models.push("examples/models/gpt-moe-16e".into());
    let held: [&[&str]; 4] =
        [&[], &["--dtype", "f16"], &["--quant", "q8_0"], &["--quant", "q8_0", "--numerics", "fast"]];
    for model in models {
        // Weights in other types have kernels of their own, the same for every model of an activation.
        let of_many = ["olmoe", "gpt_oss", "gpt-moe-16e"].iter().any(|name| model.ends_with(name));
        for more in &held[..if of_many { held.len() } else { 1 }] {
            let Some(few) = peak(&model, "1", "20", more) else { return };
            let many = peak(&model, "1", "120", more).expect("as before");
            assert!(
                many < few + (48 << 20),
                "{} {more:?}: {few} bytes, {many} with 100 steps more",
                model.display()
            );
        }
    }
}
