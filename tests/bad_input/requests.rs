//! Prompts, worlds, tables and profiles that do not fit the model.

use crate::common::tiny::{Folder, Tiny};
use crate::runs::{exflow, generate, refused};
use crate::tiny;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

#[test]
fn prompts_that_do_not_fit() {
    let folder = tiny().write();
    let ids = |n: usize| vec!["7"; n].join(",");
    let (long, first) = (ids(17), ids(3));
    refused("an id past the vocabulary", &generate(folder.path(), &["--prompt-ids", "1,257"]), &["257"]);
    refused("a large id", &generate(folder.path(), &["--prompt-ids", "4294967295"]), &["4294967295", "257"]);
    refused("an id that is none", &generate(folder.path(), &["--prompt-ids", "1,x"]), &["x"]);
    refused("a negative id", &generate(folder.path(), &["--prompt-ids=-1"]), &["-1"]);
    refused("a long prompt", &generate(folder.path(), &["--prompt-ids", &long]), &["17", "16"]);
    refused(
        "a long second prompt",
        &generate(folder.path(), &["--prompt-ids", &first, "--prompt-ids", &long, "--ep-size", "2"]),
        &["17", "16"],
    );
    refused("a long text", &generate(folder.path(), &["-p", "seventeen letters"]), &["17", "16"]);
    refused("no prompt", &generate(folder.path(), &[]), &["prompt"]);
    let out = folder.file("x.npz");
    let model = folder.path().to_str().expect("UTF-8");
    let logits = |ids: &str| {
        exflow(&["logits", "-m", model, "--prompt-ids", ids, "--out", out.to_str().expect("UTF-8")])
    };
    refused("logits of an id past the vocabulary", &logits("257"), &["257"]);
    refused("logits of a long prompt", &logits(&long), &["17", "16"]);
    assert!(!out.exists(), "a refused run leaves no file");
}

#[test]
fn worlds_and_tables_that_do_not_fit() {
    let folder = tiny().write();
    let run = |more: &[&str]| generate(folder.path(), &[&["--prompt-ids", "1"], more].concat());
    refused("more ranks than experts", &run(&["--ep-size", "5"]), &["5", "4"]);
    refused("no ranks", &run(&["--ep-size", "0"]), &["ep-size"]);
    refused("a strategy that is none", &run(&["--strategy", "chatty"]), &["chatty", "vanilla", "coherent"]);
    refused("a transport that is none", &run(&["--transport", "pigeon"]), &["pigeon", "local", "quic"]);

    let table = folder.file("table.json");
    let with_table = |ranks: &str| run(&["--ep-size", ranks, "--placement", table.to_str().expect("UTF-8")]);
    refused("no table", &with_table("2"), &["table.json"]);
    for text in ["", "{", "[]", "{}", "null", "{\"version\": 99}"] {
        fs::write(&table, text).expect("write");
        refused(&format!("table {text:?}"), &with_table("2"), &["table.json"]);
    }

    let sound = sound_table(&folder, &table, 2);
    let output = with_table("2");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    refused("a table of another world size", &with_table("3"), &["table.json", "2", "3"]);

    #[allow(clippy::type_complexity, reason = "a table that lives for one test")]
    let edited: [(&str, &dyn Fn(&mut Value)); 4] = [
        ("a layer too few", &|t| drop(rows(t).pop())),
        ("an expert too few", &|t| drop(rows(t)[1].as_array_mut().expect("a layer").pop())),
        ("a rank past the world", &|t| rows(t)[0][2] = json!(2)),
        ("a rank that is none", &|t| rows(t)[0][2] = json!(-1)),
    ];
    for (what, edit) in edited {
        let mut value = sound.clone();
        edit(&mut value);
        fs::write(&table, value.to_string()).expect("write");
        refused(what, &with_table("2"), &["table.json"]);
    }

    // Another model: of another shape, and of the same shape with other weights.
    for other in [Tiny { layers: 3, ..tiny() }, Tiny { experts: 5, ..tiny() }, Tiny { seed: 6, ..tiny() }] {
        sound_table(&other.write(), &table, 2);
        refused("a table of another model", &with_table("2"), &["table.json", "model"]);
    }
}

fn rows(table: &mut Value) -> &mut Vec<Value> {
    table["assignment"].as_array_mut().expect("an assignment per layer")
}

/// Profiles a model and places it, through the command.
fn sound_table(folder: &Folder, table: &Path, ranks: usize) -> Value {
    let (text, affinity) = (folder.file("text.txt"), folder.file("affinity.npz"));
    fs::write(&text, "Some words to route.\n".repeat(20)).expect("write");
    let utf8 = |path: &Path| path.to_str().expect("UTF-8").to_string();
    let (model, text, affinity, out) = (utf8(folder.path()), utf8(&text), utf8(&affinity), utf8(table));
    let trace = utf8(&folder.file("trace.npy"));
    for args in [
        &["profile", "-m", &model, "--text", &text, "--trace", &trace, "--affinity", &affinity][..],
        &[
            "place",
            "--affinity",
            &affinity,
            "--ranks",
            &ranks.to_string(),
            "--time-limit",
            "1s",
            "--out",
            &out,
        ],
    ] {
        let output = exflow(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&fs::read(table).expect("the table")).expect("JSON")
}

#[test]
fn profiles_that_do_not_fit() {
    let folder = tiny().write();
    let path = |name: &str| folder.file(name).to_str().expect("UTF-8").to_string();
    let model = folder.path().to_str().expect("UTF-8");
    let (trace, affinity, missing, out) = (path("t.npy"), path("a.npz"), path("missing.txt"), path("p.json"));
    let profile =
        exflow(&["profile", "-m", model, "--text", &missing, "--trace", &trace, "--affinity", &affinity]);
    refused("a missing text", &profile, &["missing.txt"]);
    let place = |flag: &str, file: &str| exflow(&["place", flag, file, "--ranks", "2", "--out", &out]);
    refused("a missing affinity", &place("--affinity", &affinity), &["a.npz"]);
    refused("a missing trace", &place("--trace", &trace), &["t.npy"]);
    fs::write(&affinity, "no archive").expect("write");
    fs::write(&trace, b"\x93NUMPY\x01\x00\xff\xff{").expect("write");
    refused("an affinity that is no archive", &place("--affinity", &affinity), &["a.npz"]);
    refused("a trace that is cut", &place("--trace", &trace), &["t.npy"]);
    assert!(!Path::new(&out).exists(), "a refused run leaves no file");
}

#[test]
fn an_affinity_for_a_loss_that_cannot_be_used() {
    let folder = tiny().write();
    let file = folder.file("other.npz");
    exflow::placement::Affinity::zeros(5, 3).save_npz(&file).expect("write");
    let (other, missing) = (file.to_str().expect("UTF-8"), folder.file("none.npz"));
    let run = |more: &[&str]| generate(folder.path(), &[&["--prompt-ids", "1,2"], more].concat());
    let certificates = folder.file("certificates");
    let certificates = certificates.to_str().expect("UTF-8");
    for args in [&["cert", "init", certificates][..], &["cert", "issue", certificates, "--rank", "0"]] {
        assert!(exflow(args).status.success());
    }
    let group =
        ["--rank", "0", "--world-size", "2", "--leader", "127.0.0.1:7447", "--identity", certificates];
    let in_group = |file: &str| run(&[&group[..], &["--lost-affinity", file]].concat());
    refused("affinity of one process", &run(&["--lost-affinity", other]), &["--lost-affinity", "loses none"]);
    refused("an affinity that is missing", &in_group(missing.to_str().expect("UTF-8")), &["none.npz"]);
    refused(
        "an affinity of another shape",
        &in_group(other),
        &["5 MoE layers with 3 experts", "exflow profile"],
    );
}
