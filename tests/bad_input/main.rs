//! Bad input through the command: exit code 2, a few lines that name what is wrong, where, and what to do.

#[path = "../common/mod.rs"]
mod common;
mod configs;
mod files;
mod requests;
mod runs;
mod weights;

use common::tiny::Tiny;
use runs::generate;
use serde_json::{Value, json};

/// Of which each folder here has one thing broken.
fn tiny() -> Tiny {
    Tiny { layers: 2, experts: 4, positions: 16, seed: 5, ..Tiny::default() }
}

#[test]
fn the_sound_folder_is_accepted() {
    let folder = tiny().write();
    let output = generate(folder.path(), &["--prompt-ids", "1,2,3", "--ep-size", "2", "--format", "json"]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{err}");
    let result: Value = serde_json::from_slice(&output.stdout).expect("stdout is one JSON document");
    assert_eq!(result["sequences"][0]["prompt_ids"], json!([1, 2, 3]));
    assert_eq!(result["sequences"][0]["output_ids"].as_array().map(Vec::len), Some(2));
    assert_eq!(result["sequences"][0]["finish_reason"], "length");
    assert!(result["stats"].is_object());
}
