#!/usr/bin/env python3
"""Writes the reference model of the comparisons: OLMoE in small, random weights from a seed, the same numbers as a
Hugging Face folder and (with the `gguf` package) as GGUF files.

    pip install numpy safetensors gguf
    tests/peers/make_model.py FOLDER [--seed 0] [--gguf]

Matrices hold numbers that f16 represents, so that F32 and F16 files are the same model.
"""

import argparse
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, LAYERS, HEADS, EXPERTS, TOP_K, VOCAB, CONTEXT = 512, 512, 8, 8, 16, 4, 8192, 4096

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": False,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "clip_qkv": None,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": None,
}


def weights(seed):
    """(Hugging Face name, array) of every tensor, always in the same order."""
    random = np.random.Generator(np.random.PCG64(seed))

    def matrix(rows, columns, scale=1.0):
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale / columns**0.5)
        return values.astype(np.float16).astype(np.float32)

    def norm():
        return (1 + 0.1 * random.standard_normal(HIDDEN, dtype=np.float32)).astype(np.float32)

    # Rows of unit size, and a head that spreads logits by about 2.5.
    yield "model.embed_tokens.weight", matrix(VOCAB, HIDDEN, HIDDEN**0.5)
    for layer in range(LAYERS):
        under = f"model.layers.{layer}"
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"]:
            yield f"{under}.self_attn.{part}.weight", matrix(HIDDEN, HIDDEN)
        yield f"{under}.self_attn.q_norm.weight", norm()
        yield f"{under}.self_attn.k_norm.weight", norm()
        yield f"{under}.input_layernorm.weight", norm()
        yield f"{under}.post_attention_layernorm.weight", norm()
        yield f"{under}.mlp.gate.weight", matrix(EXPERTS, HIDDEN, 2.0)
        for expert in range(EXPERTS):
            for part in ["gate_proj", "up_proj", "down_proj"]:
                yield f"{under}.mlp.experts.{expert}.{part}.weight", matrix(INNER, HIDDEN, 2.0)
    yield "model.norm.weight", norm()
    yield "lm_head.weight", matrix(VOCAB, HIDDEN, 2.5)


def write_gguf(path, tensors, half):
    import gguf

    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def add(name, values):
        is_matrix = values.ndim > 1 and "ffn_gate_inp" not in name
        writer.add_tensor(name, values.astype(np.float16) if half and is_matrix else values)

    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    add("output_norm.weight", tensors["model.norm.weight"])
    add("output.weight", tensors["lm_head.weight"])
    plain = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }
    for layer in range(LAYERS):
        under = f"model.layers.{layer}"
        for name, part in plain.items():
            add(f"blk.{layer}.{name}.weight", tensors[f"{under}.{part}.weight"])
        for name, part in [("ffn_gate_exps", "gate_proj"), ("ffn_up_exps", "up_proj"), ("ffn_down_exps", "down_proj")]:
            each = [tensors[f"{under}.mlp.experts.{expert}.{part}.weight"] for expert in range(EXPERTS)]
            add(f"blk.{layer}.{name}.weight", np.stack(each))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", action="store_true", help="model-f32.gguf and model-f16.gguf as well")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(weights(args.seed))
    (args.folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(tensors, args.folder / "model.safetensors")
    if args.gguf:
        write_gguf(args.folder / "model-f32.gguf", tensors, half=False)
        write_gguf(args.folder / "model-f16.gguf", tensors, half=True)


if __name__ == "__main__":
    main()
