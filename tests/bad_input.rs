//! Bad input through the command: exit code 2, a few lines that name what is wrong, where, and what to do.

mod common;

use common::tiny::{Folder, Stored, Tensor, Tiny, store};
use serde_json::{Value, json};
use std::fs;
#[cfg(target_os = "linux")]
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

const WEIGHTS: &str = "model.safetensors";

/// What a refusal may take of memory.
const MOST_MEMORY: u64 = 1 << 30;

fn exflow(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exflow"));
    let child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    finish(child.expect("the command starts"))
}

/// The child's output; its peak of memory is within bounds, whatever it was given.
#[cfg(target_os = "linux")]
fn finish(mut child: Child) -> Output {
    use std::os::unix::process::ExitStatusExt;
    let read = |from: Option<Box<dyn Read + Send>>| {
        let mut from = from.expect("a pipe");
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).map(|_| bytes).expect("reads")
        })
    };
    let stdout = read(child.stdout.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
    let stderr = read(child.stderr.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both point to memory of this frame; the child is ours, and nobody else waits for it.
    let waited = unsafe { libc::wait4(child.id() as libc::pid_t, &raw mut status, 0, usage.as_mut_ptr()) };
    assert_eq!(waited, child.id() as libc::pid_t, "the child ends");
    // SAFETY: zeroed, which is a value of it, and filled in by the call above.
    let peak = 1024 * unsafe { usage.assume_init() }.ru_maxrss as u64;
    let (stdout, stderr) = (stdout.join().expect("stdout"), stderr.join().expect("stderr"));
    assert!(peak < MOST_MEMORY, "{peak} bytes of memory:\n{}", String::from_utf8_lossy(&stderr));
    Output { status: std::process::ExitStatus::from_raw(status), stdout, stderr }
}

#[cfg(not(target_os = "linux"))]
fn finish(child: Child) -> Output {
    child.wait_with_output().expect("the command ends")
}

fn generate(model: &Path, more: &[&str]) -> Output {
    let model = model.to_str().expect("a UTF-8 path");
    exflow(&[&["generate", "-m", model, "-n", "2", "--temp", "0"], more].concat())
}

fn tiny() -> Tiny {
    Tiny { layers: 2, experts: 4, positions: 16, seed: 5, ..Tiny::default() }
}

/// Refused as bad input: code 2, nothing on stdout, at most four lines that hold each of `named`.
fn refused(what: &str, output: &Output, named: &[&str]) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{what}: exit code; stderr:\n{err}");
    assert!(!err.contains("panicked"), "{what}:\n{err}");
    assert!(out.is_empty(), "{what}: stdout is for results:\n{out}");
    let lines = err.lines().filter(|line| !line.trim().is_empty()).count();
    assert!((1..=4).contains(&lines), "{what}: {lines} lines on stderr:\n{err}");
    for word in named {
        assert!(err.contains(word), "{what}: stderr does not name {word:?}:\n{err}");
    }
    let remedies = [
        "add ",
        "build ",
        "check ",
        "choose ",
        "convert ",
        "copy ",
        "create ",
        "delete ",
        "download ",
        "expected ",
        "export ",
        "fetch ",
        "fix ",
        "give ",
        "install ",
        "keep ",
        "lower ",
        "make ",
        "must ",
        "needs ",
        "pass ",
        "profile ",
        "put ",
        "re-export ",
        "remove ",
        "rename ",
        "repair ",
        "replace ",
        "run ",
        "runs: ",
        "save ",
        "set ",
        "shorten ",
        "solve ",
        "split ",
        "supported",
        "try ",
        "use ",
        "write ",
    ];
    let lower = err.to_lowercase();
    assert!(remedies.iter().any(|word| lower.contains(word)), "{what}: stderr says no remedy:\n{err}");
}

/// A sound folder, then one thing in it broken by `edit`.
fn broken(edit: impl FnOnce(&Folder)) -> Folder {
    let folder = tiny().write();
    edit(&folder);
    folder
}

fn with_tensors(edit: impl FnOnce(&mut Vec<Tensor>)) -> Folder {
    broken(|folder| {
        let mut tensors = tiny().tensors();
        edit(&mut tensors);
        store(&folder.file(WEIGHTS), Stored::F32, &tensors);
    })
}

fn with_config(key: &str, value: Value) -> Folder {
    broken(|folder| {
        folder.edit_config(|config| {
            config.insert(key.to_string(), value);
        });
    })
}

fn tensor<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|t| t.name == name).expect("a tensor of the model")
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

/// The folder of a fixture of tests/parity, copied, with `edit` applied.
fn fixture(name: &str, edit: impl FnOnce(&Path)) -> tempfile::TempDir {
    let from = common::root().join("tests/parity/fixtures").join(name);
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(from).expect("the fixture") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copy");
    }
    edit(folder.path());
    folder
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).expect("reads")).expect("JSON");
    edit(&mut value);
    fs::write(path, value.to_string()).expect("writes");
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
fn configurations_of_published_families_that_cannot_be() {
    for (name, key, value) in [
        ("mixtral", "num_experts_per_tok", json!(0)),
        ("mixtral", "num_experts_per_tok", json!(-1)),
        ("mixtral", "num_experts_per_tok", json!(6)),
        ("mixtral", "num_attention_heads", json!(0)),
        ("mixtral", "num_key_value_heads", json!(3)),
        ("mixtral", "hidden_act", json!("relu")),
        ("mixtral", "rms_norm_eps", json!("x")),
        ("olmoe", "clip_qkv", json!(-3.0)),
        ("qwen3_moe", "head_dim", json!(7)),
        ("qwen3_moe", "mlp_only_layers", json!("all")),
        ("qwen3_moe", "mlp_only_layers", json!([0, 1, 2])),
        ("phimoe", "num_experts_per_tok", json!(3)),
        ("gpt_oss", "swiglu_limit", json!(0)),
        ("gpt_oss", "layer_types", json!(["full_attention"])),
        ("deepseek_v3", "kv_lora_rank", json!(4096)),
        ("deepseek_v3", "n_group", json!(3)),
        ("deepseek_v3", "topk_group", json!(0)),
    ] {
        let folder =
            fixture(name, |folder| edit_json(&folder.join("config.json"), |c| c[key] = value.clone()));
        // A name that the engine reports by another spelling of the key is all the same to the reader.
        let named = if key == "mlp_only_layers" && value.is_array() { "num_hidden_layers" } else { key };
        let what = format!("{name}: {key} = {value}");
        refused(&what, &generate(folder.path(), &["--prompt-ids", "3"]), &["config.json", named]);
    }
    for (kind, names) in
        [("spiral", "rope_type"), ("longrope", "short_factor"), ("llama3", "low_freq_factor")]
    {
        let folder = fixture("mixtral", |folder| {
            edit_json(&folder.join("config.json"), |c| {
                c["rope_parameters"] = json!({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0});
            });
        });
        refused(kind, &generate(folder.path(), &["--prompt-ids", "3"]), &["config.json", names]);
    }
    // A config that does not belong to the weights.
    for (name, key, value, tensor) in [
        ("mixtral", "num_local_experts", json!(7), "block_sparse_moe"),
        ("qwen2_moe", "shared_expert_intermediate_size", json!(20), "shared_expert"),
        ("deepseek_v2", "qk_rope_head_dim", json!(8), "self_attn"),
        ("gpt_oss_mxfp4", "intermediate_size", json!(64), "_blocks"),
        ("mixtral", "num_hidden_layers", json!(4), "model.layers.3."),
    ] {
        let folder =
            fixture(name, |folder| edit_json(&folder.join("config.json"), |c| c[key] = value.clone()));
        refused(key, &generate(folder.path(), &["--prompt-ids", "3"]), &["safetensors", tensor]);
    }
    let folder = Tiny { positions: 64, ..tiny() }.write();
    let long = generate(folder.path(), &["--prompt-ids", &["3"; 40].join(","), "-c", "16"]);
    refused("more than the cache", &long, &["--ctx-size", "KV cache"]);
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

#[test]
fn configurations_that_cannot_be() {
    for key in [
        "model_type",
        "vocab_size",
        "n_positions",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "num_experts",
        "top_k",
    ] {
        let folder = broken(|folder| {
            folder.edit_config(|config| {
                config.remove(key);
            });
        });
        refused(
            &format!("no {key}"),
            &generate(folder.path(), &["--prompt-ids", "1"]),
            &["config.json", key],
        );
    }
    for (key, value) in [
        ("n_head", json!(-4)),
        ("n_head", json!(0)),
        ("n_head", json!(5)), // 32 is no multiple of it
        ("n_head", json!("four")),
        ("n_layer", json!(0)),
        ("n_embd", json!(0)),
        ("vocab_size", json!(0)),
        ("n_positions", json!(0)),
        ("n_inner", json!(1.5)),
        ("num_experts", json!(0)),
        ("num_experts", json!(-1)),
        ("top_k", json!(0)),
        ("top_k", json!(5)), // of four experts
        ("layer_norm_epsilon", json!("small")),
        ("layer_norm_epsilon", json!(-1.0)),
        ("eos_token_id", json!("end")),
        ("model_type", json!("gpt_moo")),
    ] {
        let folder = with_config(key, value.clone());
        let output = generate(folder.path(), &["--prompt-ids", "1"]);
        refused(&format!("{key} = {value}"), &output, &["config.json", key]);
    }
    // Sizes far beyond the weights: refused, whichever of the two files is blamed, before anything is allocated.
    for key in ["n_layer", "n_embd", "n_inner", "vocab_size", "n_positions", "num_experts"] {
        for value in [1u64 << 20, 1 << 40, 1 << 62, u64::MAX] {
            let output = generate(with_config(key, json!(value)).path(), &["--prompt-ids", "1"]);
            refused(&format!("{key} = {value}"), &output, &[]);
            let err = String::from_utf8_lossy(&output.stderr);
            assert!(err.contains("config.json") || err.contains(WEIGHTS), "{key} = {value}: {err}");
        }
    }
    refused(
        "an unknown model type names itself",
        &generate(with_config("model_type", json!("gpt_moo")).path(), &["--prompt-ids", "1"]),
        &["gpt_moo", "gpt_moe"],
    );
    for text in ["", "{", "[]", "null", "{\"model_type\": \"gpt_moe\"} {}"] {
        let folder = broken(|folder| fs::write(folder.file("config.json"), text).expect("write"));
        refused(
            &format!("config {text:?}"),
            &generate(folder.path(), &["--prompt-ids", "1"]),
            &["config.json"],
        );
    }
}

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
