//! Weights that are cut, lie, are no numbers, or belong to another model.

use crate::common::tiny::Folder;
use crate::files::{WEIGHTS, broken, edit_json, fixture, tensor, with_tensors};
use crate::runs::{generate, refused};
use crate::tiny;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

#[test]
fn weights_that_are_cut_or_lie() {
    let sound = fs::read(tiny().write().file(WEIGHTS)).expect("read");
    let header = u64::from_le_bytes(sound[..8].try_into().expect("eight bytes")) as usize;
    let with_length = |length: u64| [&length.to_le_bytes()[..], &sound[8..]].concat();
    let with_header = |edit: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&sound[8..8 + header]).expect("a JSON header");
        edit(&mut value);
        let text = value.to_string();
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &sound[8 + header..]].concat()
    };
    let name = "h.1.moe.w1";
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("four bytes", sound[..4].to_vec()),
        ("cut in the header", sound[..header / 2].to_vec()),
        ("cut in the data", sound[..sound.len() - 1].to_vec()),
        ("cut to the header", sound[..8 + header].to_vec()),
        ("a header of 2^62 bytes", with_length(1 << 62)),
        ("a header of 2^64 - 1 bytes", with_length(u64::MAX)),
        ("a header past the end", with_length(sound.len() as u64)),
        ("a header that is no JSON", [&8u64.to_le_bytes()[..], b"garbage!"].concat()),
        ("offsets past the end", with_header(&|h| h[name]["data_offsets"] = json!([0, 1u64 << 62]))),
        ("offsets in reverse", with_header(&|h| h[name]["data_offsets"] = json!([64, 0]))),
        (
            "a shape that overflows",
            with_header(&|h| h[name]["shape"] = json!([1u64 << 40, 1u64 << 40, 1u64 << 40])),
        ),
        (
            "offsets that overlap",
            with_header(&|h| {
                h[name]["data_offsets"] = h["h.0.moe.w1"]["data_offsets"].clone();
            }),
        ),
        (
            "bytes that are nobody's",
            with_header(&|h| drop(h.as_object_mut().map(|h| h.remove("lm_head.weight")))),
        ),
        ("a shape of more than its bytes", with_header(&|h| h[name]["shape"][0] = json!(5))),
        (
            "a type that is not one of weights",
            with_header(&|h| {
                let shape = h[name]["shape"].clone();
                h[name] = json!({"dtype": "I32", "shape": shape, "data_offsets": h[name]["data_offsets"]});
            }),
        ),
        ("a header that is nested deeply", {
            let text = [b"[".repeat(200_000), b"]".repeat(200_000)].concat();
            [&(text.len() as u64).to_le_bytes()[..], &text].concat()
        }),
        ("a type that is none", with_header(&|h| h[name]["dtype"] = json!("F99"))),
    ];
    for (what, bytes) in cases {
        let folder = broken(|folder| fs::write(folder.file(WEIGHTS), bytes).expect("write"));
        refused(what, &generate(folder.path(), &["--prompt-ids", "1"]), &[WEIGHTS]);
    }
    // A header that the file has room for, but that nobody would read.
    let folder = broken(|folder| {
        let file = fs::OpenOptions::new().write(true).open(folder.file(WEIGHTS)).expect("opens");
        file.set_len(1 << 31).expect("a file with a hole");
        let mut file = file;
        std::io::Write::write_all(&mut file, &(90u64 << 20).to_le_bytes()).expect("writes");
    });
    refused("a header of 90 MiB", &generate(folder.path(), &["--prompt-ids", "1"]), &[WEIGHTS, "header"]);
}

/// The bytes of a tensor of a file, changed where they stand.
fn edit_bytes(path: &Path, tensor: &str, edit: impl FnOnce(&mut [u8])) {
    let mut bytes = fs::read(path).expect("reads");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let value: Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let at = |i: usize| 8 + header + value[tensor]["data_offsets"][i].as_u64().expect("offsets") as usize;
    edit(&mut bytes[at(0)..at(1)]);
    fs::write(path, bytes).expect("writes");
}

#[test]
fn values_that_are_no_numbers_in_every_type() {
    let last = |bytes: &mut [u8], value: &[u8]| {
        let at = bytes.len() - value.len();
        bytes[at..].copy_from_slice(value);
    };
    let layer = |part: &str| format!("model.layers.1.{part}");
    let cases: Vec<(&str, &str, String, Vec<u8>)> = vec![
        ("olmoe_gqa_f16", WEIGHTS, layer("mlp.experts.7.down_proj.weight"), vec![0x00, 0x7c]), // infinity
        ("olmoe_gqa_f16", WEIGHTS, layer("self_attn.q_norm.weight"), vec![0x01, 0x7e]),
        ("deepseek_v3_yarn_fp8", WEIGHTS, layer("mlp.experts.2.up_proj.weight"), vec![0x7f]),
        (
            "deepseek_v3_yarn_fp8",
            WEIGHTS,
            layer("self_attn.kv_b_proj.weight_scale_inv"),
            f32::NAN.to_le_bytes().to_vec(),
        ),
        (
            "deepseek_v3_yarn_fp8",
            WEIGHTS,
            layer("mlp.gate.e_score_correction_bias"),
            f32::INFINITY.to_le_bytes().to_vec(),
        ),
        ("gpt_oss_mxfp4", WEIGHTS, layer("mlp.experts.down_proj_scales"), vec![255]),
        ("gpt_oss_mxfp4", WEIGHTS, layer("self_attn.sinks"), f32::NAN.to_le_bytes().to_vec()),
        ("qwen2_moe", WEIGHTS, layer("mlp.shared_expert_gate.weight"), f32::NAN.to_le_bytes().to_vec()),
    ];
    for (name, file, tensor, value) in cases {
        let folder =
            fixture(name, |folder| edit_bytes(&folder.join(file), &tensor, |bytes| last(bytes, &value)));
        refused(
            &tensor,
            &generate(folder.path(), &["--prompt-ids", "3", "--ep-size", "2"]),
            &[WEIGHTS, &tensor],
        );
    }
}

#[test]
fn weights_that_a_config_has_no_place_for() {
    for (name, key, value, tensor) in [
        ("mixtral", "num_hidden_layers", json!(2), "model.layers.2."),
        ("qwen3_moe_dense", "attention_bias", json!(false), "_proj.bias"),
        ("phimoe", "lm_head_bias", json!(false), "lm_head.bias"),
    ] {
        let folder =
            fixture(name, |folder| edit_json(&folder.join("config.json"), |c| c[key] = value.clone()));
        let output = generate(folder.path(), &["--prompt-ids", "3"]);
        refused(&format!("{name}: {key} = {value}"), &output, &[WEIGHTS, tensor, "config.json"]);
    }
}

#[test]
fn tensors_that_are_wrong() {
    let refuse = |what: &str, folder: &Folder, named: &[&str]| {
        for ranks in ["1", "2"] {
            let output = generate(folder.path(), &["--prompt-ids", "1", "--ep-size", ranks]);
            refused(&format!("{what}, {ranks} ranks"), &output, named);
        }
    };
    for name in ["wte.weight", "h.1.attn.c_attn.bias", "h.0.moe.w2", "ln_f.bias", "lm_head.weight"] {
        let folder = with_tensors(|tensors| tensors.retain(|t| t.name != name));
        refuse("a missing tensor", &folder, &[WEIGHTS, name]);
    }
    for (name, shape) in [
        ("h.1.moe.w1", vec![4, 32, 48]), // [E, H, I]: as many values, the wrong way round
        ("h.0.attn.c_attn.weight", vec![32, 96]),
        ("wpe.weight", vec![32, 16]),
        ("h.0.moe.b1", vec![4 * 48]),
    ] {
        let folder = with_tensors(|tensors| tensor(tensors, name).shape = shape);
        refuse("a wrong shape", &folder, &[WEIGHTS, name]);
    }
    for (name, at, bad) in [
        ("h.1.moe.w2", 3 * 48 * 32 + 5, f32::NAN), // in the last expert only
        ("h.0.moe.gate.weight", 7, f32::INFINITY),
        ("wte.weight", 256 * 32, f32::NAN), // in a row that no prompt here reads
        ("ln_f.weight", 0, f32::NEG_INFINITY),
    ] {
        let folder = with_tensors(|tensors| tensor(tensors, name).values[at] = bad);
        refuse("a value that is no number", &folder, &[WEIGHTS, name]);
    }
}
