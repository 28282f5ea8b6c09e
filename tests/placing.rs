//! `exflow place` and `exflow simulate` on routes of invented models: no weights, no GPU.

use exflow::placement::{Affinity, Generator, PlacementTable, RoutingTrace};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

struct Study {
    folder: tempfile::TempDir,
}

impl Study {
    /// `t.npy` and `a.npz`: 6 layers of 16 experts, 6,000 tokens.
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let study = Self { folder };
        let trace = Generator::new(6, 16, 1).trace(6000, 1, 2);
        study.write(&trace, "t.npy", "a.npz");
        study
    }

    fn write(&self, trace: &RoutingTrace, npy: &str, npz: &str) {
        trace.save_npy(&self.at(npy)).expect("trace");
        Affinity::from_trace(trace, 16).expect("counts").save_npz(&self.at(npz)).expect("affinity");
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, line: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exflow"));
        command.args(line.split_whitespace()).current_dir(self.folder.path());
        command.output().expect("the command starts")
    }

    fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}:\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(line)).expect("one JSON document")
    }

    fn refused(&self, line: &str, named: &[&str]) {
        let output = self.run(line);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}:\n{err}");
        assert!(err.lines().count() <= 4 && !err.contains("panicked"), "{line}:\n{err}");
        named.iter().for_each(|word| assert!(err.contains(word), "{line}: no {word:?} in\n{err}"));
    }

    fn table(&self, name: &str) -> PlacementTable {
        PlacementTable::load(&self.at(name)).expect("a table")
    }
}

#[test]
fn tables_are_scored_on_what_was_not_profiled() {
    let study = Study::new();
    let out = study.ok("place --trace t.npy --ranks 4 --time-limit 1s --out p.json");
    assert!(out.contains("scored on 1200 tokens that were not profiled"), "{out}");
    for name in ["this table", "linear", "round_robin", "random", "load_only"] {
        assert!(out.lines().any(|line| line.starts_with(name)), "{name}:\n{out}");
    }
    assert!(!out.contains("too small"), "{out}");
    let summary = study.json("place --affinity a.npz --ranks 4 --time-limit 1s --out p.json --format json");
    let rate = |name: &str| summary["held_out"]["scores"][name]["stay_rate"].as_f64().expect("a rate");
    assert!(rate("this_table") > rate("round_robin") + 0.1, "{summary}");
    study.write(&Generator::new(6, 16, 1).trace(150, 1, 3), "few.npy", "few.npz");
    let out = study.ok("place --trace few.npy --experts 16 --ranks 4 --time-limit 1s --out p.json");
    assert!(out.contains("too small") && out.contains("tokens would do"), "{out}");
    let balances = summary["balances"].as_array().expect("a list");
    let crossings = |at: usize| balances[at]["crossings_per_token"].as_f64().expect("a number");
    // The wider choice is never the worse one where it was solved; on unseen tokens a little may be lost.
    assert!(crossings(1) < 1.02 * crossings(0), "layers left off ranks cross no more: {summary}");
    assert_eq!(balances[0]["ranks_per_layer"], 4.0);
    let held = study
        .ok("place --trace few.npy --experts 16 --held-out t.npy --ranks 4 --time-limit 1s --out p.json");
    assert!(held.contains("scored on 6000 tokens"), "{held}");
}

#[test]
fn profiles_merge_and_mix() {
    let study = Study::new();
    study.write(&Generator::new(6, 16, 1).trace(2000, 9, 9), "o.npy", "other.npz");
    let cost = |line: &str| {
        let line =
            format!("place {line} --ranks 4 --time-limit 300ms --threads 1 --out p.json --format json");
        study.json(&line)["baselines"]["round_robin"].as_f64().expect("a cost")
    };
    let (one, other) = (cost("--affinity a.npz"), cost("--affinity other.npz"));
    assert!((cost("--affinity a.npz other.npz") - one - other).abs() < 1e-6);
    // Equal weights: each counts as half of all 8,000 tokens.
    let mixed = cost("--affinity a.npz other.npz --mix 1 1");
    let expected = one * 4000.0 / 6000.0 + other * 4000.0 / 2000.0;
    assert!((mixed / expected - 1.0).abs() < 0.01, "{mixed} {expected}");
    study.refused("place --affinity a.npz other.npz --mix 1 --ranks 4 --out p.json", &["--mix", "give one"]);
    study.refused("place --affinity a.npz other.npz --mix 1 0 --ranks 4 --out p.json", &["--mix"]);
}

#[test]
fn options_reach_the_solver() {
    let study = Study::new();
    let place = |more: &str| {
        study.ok(&format!("place --affinity a.npz --ranks 4 --time-limit 500ms --out p.json {more}"))
    };
    let total = place("--balance total");
    assert!(total.contains("ranks that hold each layer"), "{total}");
    assert!(place("--spare-slots 1").contains("copies in spare slots"));
    assert!(!study.table("p.json").replicas.is_empty());
    place("--spare-slots 1 --no-replicas");
    assert!(study.table("p.json").replicas.is_empty());
    place("--weights transitions=0,load=1 --load-bound 1.1");
    let objective = study.table("p.json").objective.expect("it is in the table");
    assert_eq!((objective.transitions, objective.wrap, objective.load), (0.0, 1.0, 1.0));
    for (more, named) in [
        ("--weights moves=1", "transitions=1"),
        ("--weights load=-1", "load"),
        ("--balance some", "slots"),
        ("--load-bound 0.3", "1 or more"),
        ("--expert-mb nan", "--expert-mb"),
    ] {
        study.refused(&format!("place --affinity a.npz --ranks 4 --out p.json {more}"), &[named]);
    }
}

#[test]
fn other_programs_formats_go_in_and_out() {
    let study = Study::new();
    study.ok("place --affinity a.npz --ranks 4 --time-limit 300ms --out p.json");
    study.ok("place --table p.json --ranks 4 --out p.csv");
    study.ok("place --table p.csv --experts 16 --ranks 4 --out back.json");
    assert_eq!(study.table("back.json").assignment, study.table("p.json").assignment);
    study.ok("place --table p.json --ranks 4 --out s.json --out-format sglang");
    let scored = study.ok("place --table s.json --experts 16 --ranks 4 --trace t.npy --out back.json");
    assert!(scored.contains("scored on 6000 tokens"), "{scored}");
    let sets = |table: &PlacementTable, l: u16| {
        (0..4)
            .map(|r| table.experts_of(exflow::placement::LayerId(l), exflow::placement::Rank(r)))
            .collect::<Vec<_>>()
    };
    assert!((0..6).all(|l| sets(&study.table("back.json"), l) == sets(&study.table("p.json"), l)));
    fs::write(study.at("c.json"), r#"{"logical_count": [[9, 1, 1, 1], [1, 1, 9, 1]]}"#).expect("write");
    study.ok("place --affinity c.json --ranks 2 --time-limit 300ms --out load.json");
    assert_eq!(study.table("load.json").cost, Some(20.0), "9+1 beside 1+1, twice");
    study.refused("place --table p.csv --ranks 4 --out x.json", &["--experts"]);
    study.refused("place --table p.csv --experts 7 --ranks 4 --out x.json", &["whole layers"]);
    study.refused("place --ranks 4 --out x.json", &["--affinity"]);
    study.refused("place --table p.json --ranks 3 --affinity a.npz --out x.json", &["ranks"]);
}

#[test]
fn a_trace_is_replayed_and_swept() {
    let study = Study::new();
    study.ok("place --affinity a.npz --ranks 4 --time-limit 1s --out p.json");
    let rows = study.json(
        "simulate --trace t.npy --placement p.json round_robin --latency 1ms --gbit-per-s 10 --format json",
    );
    let row = |placement: &str, strategy: &str| {
        let rows = rows.as_array().expect("a list");
        rows.iter().find(|r| r["placement"] == placement && r["strategy"] == strategy).expect("a row").clone()
    };
    let number = |row: &Value, key: &str| row[key].as_f64().expect("a number");
    let (solved, rr, vanilla) =
        (row("p.json", "coherent"), row("round_robin", "coherent"), row("p.json", "vanilla"));
    assert!(number(&solved, "stay_rate") > number(&rr, "stay_rate") + 0.1);
    assert_eq!((number(&solved, "exchanges_per_layer"), number(&vanilla, "exchanges_per_layer")), (1.0, 2.0));
    // Latency rules: six layers of one and of two exchanges of a millisecond.
    assert!(
        (number(&solved, "rounds_ms") - 6.0).abs() < 0.3
            && (number(&vanilla, "rounds_ms") - 12.0).abs() < 0.6
    );
    assert!(number(&solved, "flow_ms") < number(&rr, "flow_ms"));
    study.ok("simulate --trace t.npy --sweep-ranks 2,4 --time-limit 300ms --report sweep.html");
    let page = fs::read_to_string(study.at("sweep.html")).expect("the report");
    assert!(page.contains("<svg") && page.contains("id=\"data\""));
    fs::write(
        study.at("c.toml"),
        "ranks = [{host='a'},{host='a'},{host='b'},{host='b'}]\n[link.host]\nlatency_us=5\ngbit_per_s=100\n\
         [link.network]\nlatency_us=500\ngbit_per_s=1\n",
    )
    .expect("write");
    let rows = study.json(
        "simulate --trace t.npy --placement p.json --topology c.toml --strategy coherent --format json",
    );
    assert!(number(&rows[0], "host_stay_rate") > number(&rows[0], "stay_rate"));
    study.refused("simulate --trace t.npy --placement round_robin", &["--ranks"]);
    study.refused("simulate --trace t.npy --placement p.json --batch 0", &["batch"]);
    study.refused("simulate --trace none.npy --ranks 2", &["none.npy"]);
    study.refused("simulate --trace t.npy --ranks 2 --gbit-per-s 0", &["--gbit-per-s"]);
    study.refused("simulate --trace t.npy --placement p.json --topology none.toml", &["none.toml"]);
}

#[test]
fn a_report_draws_whatever_it_is_given() {
    let study = Study::new();
    study.ok("place --affinity a.npz --ranks 4 --time-limit 500ms --threads 1 --out p.json");
    let table = study.table("p.json");
    let (first, last) = (table.history[0], table.history[table.history.len() - 1]);
    assert!(
        first.seconds <= last.seconds && first.cost >= last.cost && first.lower_bound <= last.lower_bound
    );
    assert_eq!((Some(last.cost), Some(last.lower_bound)), (table.cost, table.lower_bound));
    let rows = study.ok("simulate --trace t.npy --placement p.json round_robin --format json");
    fs::write(study.at("rows.json"), rows).expect("write");
    let out = study.ok("report a.npz p.json t.npy rows.json --out r.html --title one<page");
    assert!(out.contains("r.html"), "{out}");
    let page = fs::read_to_string(study.at("r.html")).expect("the page");
    assert_eq!(
        page.matches("by-rank").count() - page.matches(".by-rank").count(),
        5,
        "a map for each pair of layers"
    );
    for part in ["How the placement was found", "Who sends to whom", "rank of every expert", "one&lt;page"] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("http") && !page.contains("NaN"));
    let start = page.find("id=\"data\">").expect("data") + 10;
    let data: Value =
        serde_json::from_str(&page[start..start + page[start..].find("</script>").expect("its end")])
            .expect("JSON");
    assert_eq!(data["placement"]["history"].as_array().expect("moments").len(), table.history.len());
    study.ok("place --table p.json --ranks 4 --out p.csv");
    study.ok("report p.csv a.npz --out r.html");
    study.ok("report t.npy --experts 16 --out r.html");
    fs::write(study.at("odd.json"), "{\"a\": 1}").expect("write");
    study.refused("report odd.json --out r.html", &["odd.json", "give a trace"]);
    study.refused("report none.npz --out r.html", &["none.npz"]);
    study.refused("report p.csv --out r.html", &["--experts"]);
    study.write(&Generator::new(3, 16, 1).trace(500, 1, 3), "three.npy", "three.npz");
    study.refused("report a.npz three.npy --out r.html", &["three.npy", "one model"]);
    study.refused("report --out r.html", &["FILE"]);
}

#[test]
fn the_papers_claims_are_checked_on_what_there_is() {
    let study = Study::new();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/gpt-moe-16e");
    let out = study.ok(&format!("report --study -m {model} --time-limit 50ms --out s.html"));
    for line in [
        "pass  affinity is real",
        "pass  training evolution",
        "pass  stay rate",
        "open  lossless",
        "open  throughput",
    ] {
        assert!(out.contains(line), "{line}:\n{out}");
    }
    let page = fs::read_to_string(study.at("s.html")).expect("the page");
    assert!(page.contains("Checks from the paper") && page.contains("not measured"));
    let data = study.json("report --study t.npy --time-limit 50ms --out s.html --format json");
    let checks = data["checks"].as_array().expect("checks");
    assert!(checks.len() == 15 && checks.iter().any(|check| check["pass"] == true), "{data}");
    study.refused("report --study --out s.html", &["nothing to study"]);
    study.refused("report --study -m nowhere --out s.html", &["nowhere"]);
}
