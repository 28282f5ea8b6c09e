//! `exflow bench` and its grid of strategies.

use crate::{exflow, succeeded, tiny, utf8};
use serde_json::Value;

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
    let auto = rows.iter().find(|row| row["strategy"] == "auto").expect("the planner's pick");
    let (picked, beside) = (&auto["table"], &auto["beside_best"]);
    let best = beside["setting"].as_str().expect("a setting").split(", ").collect::<Vec<_>>();
    let is_best = *picked == format!("{} {}", best[0], best[2]).as_str() && auto["schedule"] == best[1];
    let same = beside["same"].as_bool().expect("same or another");
    assert!(same || !is_best, "tables of two names may be one: {auto}");
    let [low, high] = [0, 1].map(|side| beside["quartiles"][side].as_f64().expect("a quartile"));
    assert!(0.0 < low && low <= high && beside["ratio"].as_f64() > Some(0.0), "{beside}");
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
        let causes = ["dispatch_ms", "combine_ms", "context_ms", "ids_ms", "queue_ms", "linger_ms"];
        assert!(time("compute_ms") > 0.0 && causes.iter().all(|cause| time(cause) >= 0.0), "{row}");
        let waits = row["exchanges_per_layer"].as_f64().expect("a number");
        match (row["strategy"].as_str(), row["schedule"].as_str()) {
            (Some("vanilla"), Some("rounds")) => assert_eq!(waits, 2.0),
            (Some("coherent"), Some("rounds")) => assert_eq!(waits, 1.0),
            _ => assert!((0.0..=2.0).contains(&waits), "{waits}"),
        }
    }
    let few = ["--ablations", "--quick", "--no-auto", "-n", "4", "--time-limit", "100ms", "--format", "json"];
    let (out, _) = succeeded(&[&grid[..], &few].concat());
    let rows: Value = serde_json::from_str(&out).expect("JSON");
    let names: Vec<&str> =
        rows.as_array().expect("a list").iter().filter_map(|r| r["ablation"].as_str()).collect();
    let parts = ["+ overlap", "+ peer by peer", "+ halves", "+ flow", "+ wrap", "+ linger", "+ replicas"];
    assert_eq!(names[..4], ["baseline", "coherence alone", "placement alone", "both"]);
    assert_eq!(names[4..], parts);
    for wrong in [
        &["--ranks", "0"][..],
        &["--ablations", "--tables", "chain"],
        &["--lingers", "1s"],
        &["--links", "moon"],
        &["--sequences", "0"],
        &["--models", "nowhere"],
    ] {
        let output = exflow(&[&["bench", "strategies"][..], wrong].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn what_requests_notice_of_a_move() {
    let folder = tiny();
    let base = ["bench", "moves", "-m", utf8(folder.path()), "--ep-size", "2", "-n", "40", "-r", "2"];
    for schedule in ["rounds", "flow"] {
        let more = ["--schedule", schedule, "--sequences", "3"];
        let (out, _) = succeeded(&[&base[..], &more, &["--format", "json"]].concat());
        let value: Value = serde_json::from_str(&out).expect("one JSON document");
        assert_eq!(value["schedule"], schedule);
        for kind in ["without", "with"] {
            // 39 gaps of each of three sequences but for the first 8, of two runs.
            assert_eq!(value[kind]["count"], 2 * 3 * (39 - 8), "{value}");
        }
        assert!(value["moving"]["count"].as_u64().is_some_and(|count| count > 0), "{value}");
        let of = |kind: &str, figure: &str| value[kind][figure].as_f64().expect(figure);
        for kind in ["without", "with", "moving"] {
            assert!(of(kind, "p50_ms") > 0.0 && of(kind, "longest_ms") <= of(kind, "worst_ms"), "{value}");
        }
        assert!(value["experts"].as_u64() > Some(0) && value["move_ms"].as_f64() > Some(0.0), "{value}");
    }
    let (out, _) = succeeded(&[&base[..], &["--placement", "linear", "--to", "round_robin"]].concat());
    assert!(out.contains("| while experts moved |") && out.contains("tokens were told while"), "{out}");
    let wrongs = [&["--placement", "linear"][..], &["--to", "nowhere.json"], &["--sequences", "0"]];
    for wrong in wrongs {
        let output = exflow(&[&base[..], wrong].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
}
