//! What runs a model: text, plans, perplexity, and the way from text to a placement.

use crate::common::root;
use crate::common::tiny::Tiny;
use crate::{command, exflow, succeeded, text, tiny, utf8};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::process::Stdio;

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
        let predicted: Vec<f64> =
            settings.iter().filter_map(|s| s["prediction"]["tokens_per_s"].as_f64()).collect();
        assert!(predicted.len() == 12 && predicted.iter().all(|rate| *rate > 0.0), "{predicted:?}");
        // Those that were tried come first, by what is expected by both; the others by what they are predicted to make.
        let tried = settings.iter().filter(|s| !s["tried_tokens_per_s"].is_null()).count();
        let expected: Vec<f64> =
            settings.iter().filter_map(|s| s["expected_tokens_per_s"].as_f64()).collect();
        assert!(tried != 1 && expected.len() == 12, "{settings:?}");
        assert!(expected[..tried].is_sorted_by(|a, b| a >= b), "{expected:?}");
        assert_eq!(expected[tried..], predicted[tried..], "no trial, no other expectation");
        let (first, rest) = predicted.split_at(tried);
        assert!(settings[..tried].iter().all(|s| !s["tried_tokens_per_s"].is_null()), "{settings:?}");
        assert!(rest.is_sorted_by(|a, b| a >= b), "{predicted:?}");
        assert!(first.iter().all(|rate| *rate >= rest[0]), "{predicted:?}");
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
