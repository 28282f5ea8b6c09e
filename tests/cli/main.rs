//! The built command, as its users meet it: what goes where, and with which exit code.

mod bench;
#[path = "../common/mod.rs"]
mod common;
#[cfg(unix)]
mod grid;
mod models;

use common::tiny::{Folder, Tiny};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const VERBS: [&str; 17] = [
    "worker",
    "devices",
    "eval",
    "generate",
    "logits",
    "profile",
    "place",
    "bench",
    "selftest",
    "simulate",
    "report",
    "cert",
    "serve",
    "doctor",
    "plan",
    "completions",
    "man",
];

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exflow"));
    command.args(args).stdin(Stdio::null());
    command
}

fn exflow(args: &[&str]) -> Output {
    command(args).output().expect("the command starts")
}

fn succeeded(args: &[&str]) -> (String, String) {
    let output = exflow(args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{args:?}:\n{err}");
    (out, err)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn tiny() -> Folder {
    Tiny { layers: 2, experts: 4, seed: 9, ..Tiny::default() }.write()
}

#[test]
fn every_verb_helps_with_an_example() {
    let (help, _) = succeeded(&["--help"]);
    for verb in VERBS {
        assert!(help.contains(verb), "{verb} is listed");
        let (help, err) = succeeded(&[verb, "--help"]);
        assert!(help.contains("Example:") && help.contains("exflow"), "{verb}:\n{help}");
        assert!(err.is_empty());
    }
    assert!(succeeded(&["--version"]).0.starts_with("exflow "));
}

#[test]
fn wrong_usage_is_told_in_four_lines() {
    for args in [
        &[][..],
        &["fly"],
        &["generate"],
        &["generate", "--model"],
        &["generate", "-m", "x", "-p", "a", "--prompt-ids", "1"],
        &["generate", "-m", "x", "-p", "a", "--ep-size", "0"],
        &["generate", "-m", "x", "-p", "a", "--temp", "-1"],
        &["generate", "-m", "x", "-p", "a", "-n", "many"],
        &["generate", "-m", "x", "-p", "a", "--combine", "maybe"],
        &["logits", "-m", "x", "--prompt-ids", "1"],
        &["profile", "-m", "x", "--text", "a.txt"],
        &["place", "--ranks", "2", "--out", "p.json"],
        &["place", "--trace", "a.npy", "--affinity", "b.npz", "--ranks", "2", "--out", "p.json"],
        &["place", "--affinity", "b.npz", "--out", "p.json"],
        &["place", "--affinity", "b.npz", "--ranks", "2", "--time-limit", "soon", "--out", "p.json"],
        &["bench", "-m", "x", "-r", "0"],
    ] {
        let output = exflow(args);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}:\n{err}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!((1..=4).contains(&err.lines().count()), "{args:?}:\n{err}");
        assert!(err.starts_with("error: "), "{args:?}:\n{err}");
    }
}

#[test]
fn devices_in_both_formats() {
    let (out, _) = succeeded(&["devices"]);
    assert!(out.starts_with("0: "), "{out}");
    let (out, _) = succeeded(&["devices", "--format", "json"]);
    let value: Value = serde_json::from_str(&out).expect("one JSON document");
    assert!(value["devices"][0]["name"].is_string());
}

#[test]
fn compiled_kernels_are_kept_and_a_broken_file_is_made_anew() {
    let caches = tempfile::tempdir().expect("a folder");
    let run = |args: &[&str]| {
        let output = command(args).env("XDG_CACHE_HOME", caches.path()).output().expect("exflow runs");
        assert!(output.status.success(), "{args:?}:\n{}", text(&output.stderr));
        text(&output.stdout)
    };
    let kept = || {
        let value: Value =
            serde_json::from_str(&run(&["devices", "--format", "json"])).expect("one JSON document");
        value["devices"][0]["compiled_kernels"].clone()
    };
    let before = kept();
    let Some(path) = before["path"].as_str() else { return }; // an interface that offers nothing of the kind
    assert!(before["bytes"].is_null() && Path::new(path).starts_with(caches.path()), "{before}");
    let model = tiny();
    let generate = || run(&["generate", "-m", utf8(model.path()), "--prompt-ids", "1,2,3", "-n", "4"]);
    let first = generate();
    let bytes = std::fs::read(path).expect("a file");
    assert_eq!(kept()["bytes"], bytes.len());
    std::fs::write(path, &bytes[..bytes.len() / 2]).expect("writes");
    assert_eq!(generate(), first);
    assert_eq!(std::fs::read(path).expect("a file").len(), bytes.len());
    assert_eq!(generate(), first);
}

#[test]
fn what_was_measured_is_what_runs() {
    let caches = tempfile::tempdir().expect("a folder");
    let run = |args: &[&str]| {
        let output = command(args).env("XDG_CACHE_HOME", caches.path()).output().expect("exflow runs");
        assert!(output.status.success(), "{args:?}:\n{}", text(&output.stderr));
        text(&output.stdout)
    };
    let kernels = || {
        let value: Value = serde_json::from_str(&run(&["devices", "--format", "json"])).expect("JSON");
        value["devices"][0]["kernels"].clone()
    };
    let rules = kernels();
    assert_eq!(rules["measured"], false);
    let path = rules["path"].as_str().expect("a place for the file").to_owned();
    assert!(Path::new(&path).starts_with(caches.path()) && !Path::new(&path).exists());
    let told = run(&["devices", "--tune", "f32"]);
    assert!(
        told.contains("as measured here, by rules for f16, mx4, mx4_fast, q4, q4_fast, q8, q8_fast"),
        "{told}"
    );
    assert_eq!(kernels()["measured"], true);

    // Other choices than the rules' and than any measured one, by hand: the launches follow them, the text stays.
    let model = tiny();
    let launches = |name: &str, more: &[&str]| -> (String, BTreeSet<String>) {
        let trace = caches.path().join(name);
        let args = ["generate", "-m", utf8(model.path()), "--prompt-ids", "1,2,3", "-n", "4", "--trace-out"];
        let out = run(&[&args[..], &[utf8(&trace)], more].concat());
        let events: Value = serde_json::from_slice(&fs::read(&trace).expect("a trace")).expect("JSON");
        let all = events.as_array().expect("events").iter().map(|event| &event["args"]);
        let linear = all.filter(|args| args["kernel"].as_str().is_some_and(|name| name.contains("linear")));
        let of = |args: &Value| {
            let told = ["tile", "subgroup", "texture", "rows"].map(|name| args[name].to_string());
            told.join(" ").replace('"', "")
        };
        (out, linear.map(of).collect())
    };
    let fast = ["--quant", "q8_0", "--numerics", "fast"];
    let (measured, _) = launches("measured.json", &[]);
    let (rounded, _) = launches("rounded.json", &fast);
    let mut file: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    file["weights"]["f32"] = serde_json::json!({
        "textures": false, "subgroups": false,
        "linear": [{ "rows": 1, "tile": 4 }], "experts": [{ "rows": 1, "tile": 8 }],
    });
    file["weights"]["q8_fast"] = serde_json::json!({
        "textures": false, "subgroups": false,
        "linear": [{ "rows": 1, "tile": 2, "as_f32": true }], "experts": [{ "rows": 1, "tile": 4 }],
    });
    fs::write(&path, file.to_string()).expect("writes");
    for (more, before, launch) in
        [(&[][..], &measured, "4 false false F32"), (&fast, &rounded, "2 false false BytesAsF32")]
    {
        let (forced, linear) = launches("forced.json", more);
        assert_eq!(forced, *before, "the same text");
        assert!(linear.iter().all(|of| of == launch), "{linear:?}"); // none where the device has no clock
    }
    let told = run(&["devices"]);
    assert!(told.contains("f32      buffers, plain; rows in a tile: 4 up to 1"), "{told}");
    assert!(
        told.contains("q8_fast  buffers, plain; rows in a tile: 2 as f32 up to 1; of experts: 4 up to 1")
    );

    // A file about another driver is told of and passed over.
    file["subject"]["driver"] = "another".into();
    fs::write(&path, file.to_string()).expect("writes");
    assert!(run(&["devices"]).contains("is ignored: measured with another version of its driver"));
    assert_eq!((kernels()["measured"].clone(), launches("stale.json", &[]).0), (false.into(), measured));
}

#[test]
fn completions_and_manual_know_every_verb() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (out, err) = succeeded(&["completions", shell]);
        assert!(VERBS.iter().all(|verb| out.contains(verb)) && err.is_empty(), "{shell}");
    }
    assert!(succeeded(&["man"]).0.contains(".TH exflow 1"));
    let folder = tempfile::tempdir().expect("a folder");
    succeeded(&["man", "--out", utf8(folder.path())]);
    for verb in VERBS {
        let page = fs::read_to_string(folder.path().join(format!("exflow-{verb}.1"))).expect(verb);
        assert!(page.contains("Example:"), "{verb}");
    }
}

#[test]
fn doctor_checks_this_machine() {
    let held = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let port = held.local_addr().expect("an address").port().to_string();
    let output = exflow(&["doctor", "--format", "json", "--port", &port, "--identity", "nowhere"]);
    assert_eq!(output.status.code(), Some(1), "a port that is taken is a failure");
    let value: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    let verdict = |name: &str| {
        let checks = value["checks"].as_array().expect("checks");
        checks.iter().find(|c| c["name"] == name).unwrap_or_else(|| panic!("{name}: {value}"))["verdict"]
            .clone()
    };
    for name in ["driver", "device", "ranks"] {
        assert_eq!(verdict(name), "ok", "{value}");
    }
    assert_eq!((verdict("port"), verdict("identity")), ("failed".into(), "failed".into()));
}

#[test]
fn a_file_gives_flags_and_logs_and_traces_go_where_they_are_told() {
    let folder = tiny();
    let (config, trace) = (folder.file("exflow.toml"), folder.file("trace.json"));
    let flags = format!(
        "model = {:?}\nep-size = 2\n[generate]\nmax-tokens = 3\nignore-eos = true\n",
        utf8(folder.path())
    );
    fs::write(&config, flags).expect("writes");
    let args = ["generate", "--config", utf8(&config), "--prompt-ids", "1,2", "--format", "json"];
    let (out, _) = succeeded(&[&args[..], &["--trace-out", utf8(&trace)]].concat());
    let value: Value = serde_json::from_str(&out).expect("one JSON document");
    assert_eq!(value["sequences"][0]["output_ids"].as_array().map(Vec::len), Some(3));
    assert_eq!(value["stats"]["ranks"], 2);
    let spans: Value = serde_json::from_str(&fs::read_to_string(&trace).expect("a trace")).expect("JSON");
    for name in ["step", "layer", "dispatch", "arrive"] {
        assert!(spans.as_array().expect("events").iter().any(|span| span["name"] == name), "{name}");
    }
    let (_, err) = succeeded(&[
        "generate",
        "--config",
        utf8(&config),
        "--prompt-ids",
        "1",
        "--log",
        "debug",
        "--log-format",
        "json",
    ]);
    for line in err.lines().filter(|line| line.starts_with('{')) {
        assert!(serde_json::from_str::<Value>(line).is_ok_and(|line| line["level"].is_string()), "{line}");
    }
    fs::write(&config, "modle = 'x'").expect("writes");
    let output = exflow(&args);
    let err = text(&output.stderr);
    assert!(output.status.code() == Some(2) && err.contains("modle") && err.contains("exflow.toml"), "{err}");
}
