//! The built command, as its users meet it: what goes where, and with which exit code.

mod common;

use common::root;
use common::tiny::{Folder, Tiny};
use serde_json::Value;
use std::fs;
use std::io::Read;
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
fn generate_in_both_formats() {
    let folder = tiny();
    let model = utf8(folder.path());
    let base =
        ["generate", "-m", model, "--prompt-ids", "1,2,3", "4,5", "-n", "3", "--temp", "0", "--ignore-eos"];
    let (out, err) = succeeded(&[&base[..], &["--format", "json", "--ep-size", "2"]].concat());
    let value: Value = serde_json::from_str(&out).expect("one JSON document");
    let sequences = value["sequences"].as_array().expect("sequences");
    assert_eq!(sequences.len(), 2);
    for sequence in sequences {
        assert_eq!(sequence["output_ids"].as_array().map(Vec::len), Some(3));
        assert_eq!(sequence["finish_reason"], "length");
        assert!(sequence["text"].is_string() && sequence["prompt_ids"].is_array());
    }
    assert_eq!(value["stats"]["ranks"], 2);
    for class in ["dispatch", "combine", "kv", "ids", "control"] {
        assert!(value["stats"]["bytes"][class].is_u64(), "{class}");
    }
    assert!(err.contains("round_robin"), "the placement in use is printed:\n{err}");
    let wide = ["--ep-size", "4", "--prefill", "replicated", "--domain", "pair", "--format", "json"];
    let (out, _) = succeeded(&[&base[..], &wide].concat());
    let other: Value = serde_json::from_str(&out).expect("one JSON document");
    let said = |value: &Value| [0, 1].map(|s| value["sequences"][s]["output_ids"].clone());
    assert_eq!(said(&other), said(&value), "where work is done changes no token");
    assert_eq!(
        (&other["stats"]["prefill"], &other["stats"]["domain"]),
        (&"replicated".into(), &"pair".into())
    );
    assert_eq!(other["stats"]["kv_peak_bytes"].as_array().map(Vec::len), Some(4));
    let summed =
        exflow(&[&base[..], &["--ep-size", "2", "--prefill", "replicated", "--combine", "sum"]].concat());
    assert_eq!(summed.status.code(), Some(2), "{}", text(&summed.stderr));
    assert!(text(&summed.stderr).contains("--combine exact"));
    let (out, err) = succeeded(&base);
    assert!(err.contains("K/V at most") && err.contains("tokens fit"), "{err}");
    assert!(out.lines().all(|line| line.starts_with("[0]") || line.starts_with("[1]")), "{out}");
    assert!(err.contains("tokens/s"), "{err}");
}

#[test]
fn a_plan_predicts_every_setting_and_auto_runs_the_best() {
    let folder = Tiny { layers: 3, experts: 4, seed: 9, ..Tiny::default() }.write();
    let (model, out_file) = (utf8(folder.path()), folder.path().join("measured.toml"));
    let plan = ["plan", "-m", model, "--ep-size", "2", "--time-limit", "100ms"];
    let asked = ["--sequences", "1,3", "--check", "8", "--topology-out", utf8(&out_file)];
    let (out, _) = succeeded(&[&plan[..], &asked, &["--format", "json"]].concat());
    let plans: Value = serde_json::from_str(&out).expect("one JSON document");
    assert!(plans["measurements"]["links"][0][1]["latency_s"].as_f64().expect("a latency") > 0.0);
    let loads = plans["measurements"]["loads"].as_array().expect("trials");
    assert_eq!(loads.len(), 8, "two strategies and schedules, with one sequence and with three");
    assert!(loads.iter().all(|load| load["tokens_per_s"].as_f64() > Some(0.0)), "{loads:?}");
    for (plan, sequences) in plans["plans"].as_array().expect("plans").iter().zip([1, 3]) {
        let settings = plan["settings"].as_array().expect("settings");
        assert_eq!(settings.len(), 12, "two strategies and schedules, three tables");
        let rates: Vec<f64> =
            settings.iter().filter_map(|s| s["prediction"]["tokens_per_s"].as_f64()).collect();
        assert!(rates.len() == 12 && rates.is_sorted_by(|a, b| a >= b) && rates[11] > 0.0, "{rates:?}");
        assert_eq!((&plan["choice"], &plan["sequences"]), (&settings[0], &sequences.into()));
        assert!(plan["measured_tokens_per_s"].as_f64().expect("a measurement") > 0.0);
    }
    let topology = exflow::placement::Topology::load(&out_file).expect("a topology");
    assert!(topology.len() == 2 && topology.cost[1] > 0.0);
    let (text, _) = succeeded(&[&plan[..], &["--sequences", "2"]].concat());
    assert!(text.contains("->") && text.contains("trial, 2 at once: coherent in flow"), "{text}");

    let base =
        ["generate", "-m", model, "--prompt-ids", "1,2,3", "-n", "6", "--format", "json", "--ep-size", "2"];
    let ids = |more: &[&str]| {
        let (out, err) = succeeded(&[&base[..], more].concat());
        let value: Value = serde_json::from_str(&out).expect("one JSON document");
        (value["sequences"][0]["output_ids"].clone(), value["stats"]["schedule"].clone(), err)
    };
    let (expected, ..) = ids(&[]);
    let (said, _, err) = ids(&["--strategy", "auto"]);
    assert_eq!(said, expected);
    assert!(err.contains("auto, 1 at once: ") && err.contains("predicted"), "{err}");
    let (said, schedule, _) = ids(&["--strategy", "auto", "--schedule", "flow"]);
    assert_eq!((said, schedule), (expected, "flow".into()), "a schedule that was asked for is kept");
    for wrong in [&["--ep-size", "1"][..], &["--ep-size", "2", "--sequences", "0"]] {
        let output = exflow(&[&["plan", "-m", model][..], wrong].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn eval_in_both_formats() {
    let model = utf8(&root().join("examples/models/gpt-moe-16e")).to_owned();
    let folder = tempfile::tempdir().expect("a folder");
    let readme = fs::read_to_string(root().join("README.md")).expect("reads");
    fs::write(folder.path().join("text"), readme.chars().take(1200).collect::<String>()).expect("writes");
    let text = utf8(&folder.path().join("text")).to_owned();
    let base = ["eval", "-m", &model, "--text", &text, "--dtype", "f16", "--window", "64"];
    let (out, _) = succeeded(&[&base[..], &["--against", "f32", "--format", "json"]].concat());
    let value: Value = serde_json::from_str(&out).expect("one JSON document");
    let number = |of: &str, key: &str| value[of][key].as_f64().unwrap_or_else(|| panic!("{of}.{key}"));
    // Text of another kind than it was trained on, but English: far from chance, which is 1,000.
    assert!((5.0..300.0).contains(&number("prediction", "perplexity")));
    assert!(number("prediction", "tokens") > 200.0);
    // bf16 on disk: rounding to f16 changes a little.
    assert!(
        (0.0..1e-4).contains(&number("divergence", "mean_kl")) && number("divergence", "same_top") > 0.98
    );
    let (out, _) = succeeded(&base);
    assert!(out.starts_with("perplexity ") && !out.contains("divergence"), "{out}");
}

#[test]
fn a_reader_that_has_enough_is_no_failure() {
    let folder = tiny();
    let mut child = command(&["generate", "-m", utf8(folder.path()), "-p", "a", "-n", "60", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().expect("stderr").read_to_string(&mut err).expect("UTF-8");
    let status = child.wait().expect("it ends");
    assert!(status.success() && !err.contains("panicked") && !err.contains("error"), "{err}");
}

#[test]
fn from_text_to_a_placement_in_use() {
    let folder = tiny();
    let (model, text, trace, affinity, table, dump) = (
        folder.path().to_path_buf(),
        folder.file("text.txt"),
        folder.file("trace.npy"),
        folder.file("affinity.npz"),
        folder.file("placement.json"),
        folder.file("logits.npz"),
    );
    fs::write(&text, "Some words to route.\n".repeat(30)).expect("write");
    let model = utf8(&model);
    succeeded(&[
        "profile",
        "-m",
        model,
        "--text",
        utf8(&text),
        "--trace",
        utf8(&trace),
        "--affinity",
        utf8(&affinity),
    ]);
    for (flag, file) in [("--trace", &trace), ("--affinity", &affinity)] {
        let args = [
            "place",
            flag,
            utf8(file),
            "--ranks",
            "2",
            "--time-limit",
            "1s",
            "--threads",
            "1",
            "--out",
            utf8(&table),
        ];
        let (out, _) = succeeded(&args);
        assert!(out.contains("stay rate") && out.contains("round_robin"), "{out}");
    }
    let (out, _) = succeeded(&[
        "place",
        "--affinity",
        utf8(&affinity),
        "--ranks",
        "2",
        "--time-limit",
        "1s",
        "--out",
        utf8(&table),
        "--format",
        "json",
    ]);
    let summary: Value = serde_json::from_str(&out).expect("one JSON document");
    assert!(summary["score"]["stay_rate"].is_f64() && summary["cost"].is_f64(), "{summary}");
    let (out, err) = succeeded(&[
        "generate",
        "-m",
        model,
        "--prompt-ids",
        "1,2",
        "-n",
        "2",
        "--ep-size",
        "2",
        "--placement",
        utf8(&table),
        "--format",
        "json",
    ]);
    assert!(err.contains("placement.json"), "{err}");
    assert!(serde_json::from_str::<Value>(&out).is_ok());
    succeeded(&["logits", "-m", model, "--prompt-ids", "1,2,3", "--out", utf8(&dump), "--feed", "decode"]);
    assert!(fs::metadata(&dump).expect("the archive").len() > 0);
}

#[test]
fn bench_in_its_three_formats() {
    let folder = tiny();
    let report = folder.file("report");
    let base = [
        "bench",
        "-m",
        utf8(folder.path()),
        "--ep-size",
        "2",
        "-n",
        "4",
        "-r",
        "1",
        "--transport",
        "local",
        "--own-text",
        "8",
        "--time-limit",
        "1s",
        "-p",
        "one",
        "two",
    ];
    let (out, err) = succeeded(&[&base[..], &["--report", utf8(&report)]].concat());
    for setting in ["vanilla, round_robin", "coherent, round_robin", "coherent, affinity"] {
        assert!(out.lines().any(|line| line.starts_with(setting)), "{out}");
    }
    assert!(err.contains("file://") && report.join("report.html").is_file(), "{err}");
    let (out, _) = succeeded(&[&base[..], &["--format", "md"]].concat());
    assert!(out.starts_with("| setting |"), "{out}");
    let (out, _) = succeeded(&[&base[..], &["--format", "json"]].concat());
    let value: Value = serde_json::from_str(&out).expect("one JSON document");
    assert_eq!(value["settings"].as_array().map(Vec::len), Some(3));
    assert_eq!(value["same_tokens"], true);
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

#[test]
fn the_grid_of_strategies_holds_the_cells_that_were_asked_for() {
    let folder = tiny();
    let model = utf8(folder.path());
    let grid =
        ["bench", "strategies", "--models", model, "--ranks", "2", "--sequences", "3", "--links", "local"];
    let (out, _) = succeeded(
        &[
            &grid[..],
            &[
                "--tables",
                "round_robin,replicas",
                "-n",
                "6",
                "-r",
                "1",
                "--time-limit",
                "100ms",
                "--format",
                "json",
            ],
        ]
        .concat(),
    );
    let rows: Value = serde_json::from_str(&out).expect("JSON");
    let rows = rows.as_array().expect("a list");
    assert_eq!(rows.len(), 9, "two strategies, schedules and tables, and what the planner picked");
    assert_eq!(rows.iter().filter(|row| row["strategy"] == "auto").count(), 1);
    for row in rows {
        assert_eq!((&row["model"], &row["ranks"], &row["link"]), (&model.into(), &2.into(), &"local".into()));
        for figure in [
            "tokens_per_s",
            "predicted_tokens_per_s",
            "ttft_ms",
            "tpot_p50_ms",
            "tpot_p99_ms",
            "crossings_per_token",
        ] {
            assert!(row[figure].as_f64().expect(figure) > 0.0, "{figure}: {row}");
        }
        for class in ["dispatch", "combine", "kv", "ids", "control"] {
            assert!(row["bytes_per_token"][class].is_number(), "{class}: {row}");
        }
        let time = |cause: &str| row["token_time"][cause].as_f64().expect(cause);
        let causes = ["dispatch_ms", "combine_ms", "context_ms", "ids_ms", "queue_ms"];
        assert!(time("compute_ms") > 0.0 && causes.iter().all(|cause| time(cause) >= 0.0), "{row}");
        let waits = row["exchanges_per_layer"].as_f64().expect("a number");
        match (row["strategy"].as_str(), row["schedule"].as_str()) {
            (Some("vanilla"), Some("rounds")) => assert_eq!(waits, 2.0),
            (Some("coherent"), Some("rounds")) => assert_eq!(waits, 1.0),
            _ => assert!((0.0..=2.0).contains(&waits), "{waits}"),
        }
    }
    let few = ["--ablations", "--no-auto", "-n", "4", "-r", "1", "--time-limit", "100ms", "--format", "json"];
    let (out, _) = succeeded(&[&grid[..], &few].concat());
    let rows: Value = serde_json::from_str(&out).expect("JSON");
    let names: Vec<&str> =
        rows.as_array().expect("a list").iter().filter_map(|r| r["ablation"].as_str()).collect();
    let parts = ["+ overlap", "+ flow", "+ wrap", "+ replicas"];
    assert_eq!(names[..4], ["baseline", "coherence alone", "placement alone", "both"]);
    assert_eq!(names[4..], parts);
    for wrong in [
        &["--ranks", "0"][..],
        &["--ablations", "--tables", "chain"],
        &["--links", "moon"],
        &["--sequences", "0"],
        &["--models", "nowhere"],
    ] {
        let output = exflow(&[&["bench", "strategies"][..], wrong].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
}
