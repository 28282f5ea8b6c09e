//! Configurations that cannot be.

use crate::common::tiny::Tiny;
use crate::files::{WEIGHTS, broken, edit_json, fixture, with_config};
use crate::runs::{generate, refused};
use crate::tiny;
use serde_json::json;
use std::fs;

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
