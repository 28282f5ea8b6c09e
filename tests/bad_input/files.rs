//! Model folders with one thing broken, and what becomes of files that are missing, cut, huge or misleading.

use crate::common::{
    self,
    tiny::{Folder, Stored, Tensor, store},
};
use crate::runs::{generate, refused};
use crate::tiny;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

pub(crate) const WEIGHTS: &str = "model.safetensors";

/// A sound folder, then one thing in it broken by `edit`.
pub(crate) fn broken(edit: impl FnOnce(&Folder)) -> Folder {
    let folder = tiny().write();
    edit(&folder);
    folder
}

pub(crate) fn with_tensors(edit: impl FnOnce(&mut Vec<Tensor>)) -> Folder {
    broken(|folder| {
        let mut tensors = tiny().tensors();
        edit(&mut tensors);
        store(&folder.file(WEIGHTS), Stored::F32, &tensors);
    })
}

pub(crate) fn with_config(key: &str, value: Value) -> Folder {
    broken(|folder| {
        folder.edit_config(|config| {
            config.insert(key.to_string(), value);
        });
    })
}

pub(crate) fn tensor<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|t| t.name == name).expect("a tensor of the model")
}

/// The folder of a fixture of tests/parity, copied, with `edit` applied.
pub(crate) fn fixture(name: &str, edit: impl FnOnce(&Path)) -> tempfile::TempDir {
    let from = common::root().join("tests/parity/fixtures").join(name);
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(from).expect("the fixture") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copy");
    }
    edit(folder.path());
    folder
}

pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).expect("reads")).expect("JSON");
    edit(&mut value);
    fs::write(path, value.to_string()).expect("writes");
}

#[test]
fn files_that_are_missing() {
    let nowhere = tiny().write().path().join("nowhere");
    refused("no folder", &generate(&nowhere, &["--prompt-ids", "1"]), &[nowhere.to_str().expect("UTF-8")]);
    for (name, prompt) in [
        ("config.json", ["--prompt-ids", "1"]),
        (WEIGHTS, ["--prompt-ids", "1"]),
        ("tokenizer.json", ["-p", "text"]),
    ] {
        let folder = broken(|folder| fs::remove_file(folder.file(name)).expect("remove"));
        let output = generate(folder.path(), &prompt);
        refused(name, &output, &[folder.path().to_str().expect("UTF-8"), name]);
    }
    let folder = tiny().write();
    let file = generate(&folder.file("config.json"), &["--prompt-ids", "1"]);
    refused("a file for a folder", &file, &["config.json"]);
    let folder = broken(|folder| fs::write(folder.file("tokenizer.json"), "{}").expect("write"));
    refused("an empty tokenizer", &generate(folder.path(), &["-p", "text"]), &["tokenizer.json"]);
}

#[test]
fn shards_that_lead_astray() {
    const INDEX: &str = "model.safetensors.index.json";
    let with_shard = |file: &str| {
        fixture("mixtral_sharded_bf16", |folder| {
            edit_json(&folder.join(INDEX), |index| {
                index["weight_map"]["model.norm.weight"] = json!(file);
            });
        })
    };
    for file in ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""] {
        let folder = with_shard(file);
        refused(
            file,
            &generate(folder.path(), &["--prompt-ids", "3"]),
            &[INDEX, "not a file of this folder"],
        );
    }
    let folder = with_shard("model-00099-of-00099.safetensors");
    refused(
        "absent",
        &generate(folder.path(), &["--prompt-ids", "3"]),
        &["model-00099-of-00099.safetensors"],
    );
    let folder = with_shard("model-00001-of-00008.safetensors");
    let output = generate(folder.path(), &["--prompt-ids", "3"]);
    refused("a tensor elsewhere", &output, &[INDEX, "model.norm.weight"]);
    for broken in ["", "[]", "{\"weight_map\":{}}", "{\"weight_map\":{\"a\":7}}"] {
        let folder = fixture("mixtral_sharded_bf16", |folder| {
            fs::write(folder.join(INDEX), broken).expect("writes");
        });
        refused(broken, &generate(folder.path(), &["--prompt-ids", "3"]), &[INDEX]);
    }
}

#[test]
fn files_that_are_huge_or_nested_deeply() {
    let deep = [b"[".repeat(300_000), b"]".repeat(300_000)].concat();
    let nested = [b"{\"a\":".repeat(60_000), b"1".to_vec(), b"}".repeat(60_000)].concat();
    for (name, prompt) in [("config.json", ["--prompt-ids", "1"]), ("tokenizer.json", ["-p", "text"])] {
        for text in [&deep, &nested] {
            let folder = broken(|folder| fs::write(folder.file(name), text).expect("write"));
            refused(&format!("a deep {name}"), &generate(folder.path(), &prompt), &[name]);
        }
        let folder = broken(|folder| {
            let file = fs::File::create(folder.file(name)).expect("creates");
            file.set_len(8 << 30).expect("a file with a hole");
        });
        refused(&format!("a huge {name}"), &generate(folder.path(), &prompt), &[name, "too large"]);
    }
    for text in [deep, nested] {
        let folder = fixture("mixtral_sharded_bf16", |folder| {
            fs::write(folder.join("model.safetensors.index.json"), &text).expect("writes");
        });
        refused("a deep index", &generate(folder.path(), &["--prompt-ids", "3"]), &["index.json"]);
    }
}

#[test]
fn tokenizers_with_ids_past_the_vocabulary() {
    let small = |folder: &Folder, edit: &dyn Fn(&mut Value)| edit_json(&folder.file("tokenizer.json"), edit);
    let refuse = |what: &str, edit: &dyn Fn(&mut Value)| {
        let folder = broken(|folder| small(folder, edit));
        let output = generate(folder.path(), &["-p", "text"]);
        refused(what, &output, &["tokenizer.json", "vocab_size"]);
        // Ids can be given all the same.
        assert!(generate(folder.path(), &["--prompt-ids", "1"]).status.success(), "{what}");
    };
    refuse("a token past the vocabulary", &|t| t["model"]["vocab"]["zebra"] = json!(257));
    refuse("an added token past the vocabulary", &|t| {
        let added = json!({"id": 300, "content": "<new>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        t["added_tokens"].as_array_mut().expect("a list").push(added);
    });
    refuse("a template with an id past the vocabulary", &|t| {
        t["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [9999], "tokens": ["<s>"]}}});
    });
}
