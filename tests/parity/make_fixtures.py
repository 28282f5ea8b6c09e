#!/usr/bin/env python3
"""Tiny random models of every family and variant, made and run by transformers on the CPU in float32.

Writes tests/parity/fixtures/NAME/ with a Hugging Face folder (config.json, safetensors) and expected.npz: `prompt` ids,
`logits` [T, V], for each MoE layer l `experts.l` [T, K] and `router_weights.l` [T, K] (largest weight first) and
`margins.l` [T] (smallest distance of scores that decides the choice or its order), `greedy` (24 tokens that continue the
prompt) and `greedy_margins`. tests/parity/long/NAME/ holds models for texts past 4,096 positions.

    python3 -m venv .venv && .venv/bin/pip install torch transformers numpy safetensors
    .venv/bin/python tests/parity/make_fixtures.py [NAME ...]
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

OUT = pathlib.Path(__file__).parent / "fixtures"
PROMPT = 13
GREEDY = 24
VOCAB = 131
SPREAD = 2.5

BASE = dict(vocab_size=VOCAB, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
            pad_token_id=0)
QWEN = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=22, intermediate_size=50)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=18, q_lora_rank=None, qk_nope_head_dim=10, qk_rope_head_dim=6,
              v_head_dim=9, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, moe_intermediate_size=15,
              intermediate_size=46, first_k_dense_replace=1)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)


def rope(**parameters):
    return dict(rope_parameters=dict(dict(rope_theta=10000.0), **parameters))


LONG = rope(rope_type="longrope", original_max_position_embeddings=8, short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.5, 2.0, 3.0, 4.0])

# name: (model_type, config, how the folder is changed after it was saved)
FIXTURES = {
    "mixtral": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=29), []),
    "mixtral_window": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, sliding_window=6,
                                       head_dim=12), ["published"]),
    "mixtral_sharded_bf16": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24),
                             ["bf16", "sharded", "published"]),
    "olmoe": ("olmoe", dict(num_experts=8, num_experts_per_tok=3, intermediate_size=21, num_key_value_heads=4), []),
    "olmoe_gqa_f16": ("olmoe", dict(num_experts=8, num_experts_per_tok=3, intermediate_size=21, norm_topk_prob=True),
                      ["f16", "published"]),
    "qwen3_moe": ("qwen3_moe", dict(QWEN, head_dim=10, norm_topk_prob=True), []),
    "qwen3_moe_dense": ("qwen3_moe", dict(QWEN, head_dim=12, num_hidden_layers=4, mlp_only_layers=[0], decoder_sparse_step=2,
                                          attention_bias=True), ["published"]),
    "qwen3_moe_tied": ("qwen3_moe", dict(QWEN, head_dim=9 * 2, tie_word_embeddings=True, use_sliding_window=True,
                                         sliding_window=5), []),
    "qwen2_moe": ("qwen2_moe", dict(QWEN, shared_expert_intermediate_size=19), []),
    "qwen2_moe_window": ("qwen2_moe", dict(QWEN, shared_expert_intermediate_size=33, use_sliding_window=True, sliding_window=4,
                                           max_window_layers=2, mlp_only_layers=[1], norm_topk_prob=True), ["published"]),
    "granitemoe": ("granitemoe", dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=25,
                                      embedding_multiplier=6.0, attention_multiplier=0.2, residual_multiplier=0.3,
                                      logits_scaling=3.0, tie_word_embeddings=True), []),
    "phimoe": ("phimoe", dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=25, attention_bias=True,
                              lm_head_bias=True), []),
    "phimoe_longrope": ("phimoe", dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=25, attention_bias=True,
                                       lm_head_bias=True, hidden_size=32,
                                       rope_parameters=dict(LONG["rope_parameters"], short_mscale=1.2, long_mscale=1.3)), []),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=6, num_experts_per_tok=3, intermediate_size=20, head_dim=10, sliding_window=6,
                                rope_parameters=dict(YARN, truncate=False)), []),
    "gpt_oss_mxfp4": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, head_dim=8,
                                      hidden_size=64, sliding_window=7, rope_parameters=dict(YARN, truncate=False)), ["mxfp4"]),
    "deepseek_v2": ("deepseek_v2", dict(LATENT), []),
    "deepseek_v2_groups": ("deepseek_v2", dict(LATENT, q_lora_rank=14, topk_method="group_limited_greedy", n_group=4, topk_group=2,
                                               routed_scaling_factor=2.0, attention_bias=True,
                                               rope_parameters=dict(YARN, mscale=0.8, mscale_all_dim=0.6)), ["published"]),
    "deepseek_v3": ("deepseek_v3", dict(LATENT, q_lora_rank=14, n_shared_experts=1, n_group=4, topk_group=2,
                                        routed_scaling_factor=1.7), []),
    "deepseek_v3_yarn_fp8": ("deepseek_v3", dict(LATENT, q_lora_rank=16, n_shared_experts=1, n_group=2, topk_group=1,
                                                 num_experts_per_tok=2, rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0)),
                             ["fp8"]),
    "rope_linear": ("qwen3_moe", dict(QWEN, head_dim=8, **rope(rope_type="linear", factor=3.0)), []),
    "rope_dynamic": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, head_dim=8, **rope(rope_type="dynamic", factor=2.0)), ["published"]),
    "rope_llama3": ("olmoe", dict(num_experts=8, num_experts_per_tok=2, intermediate_size=21, num_key_value_heads=4, hidden_size=32,
                                  **rope(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                         original_max_position_embeddings=16)), []),
    "rope_longrope_short": ("qwen3_moe", dict(QWEN, head_dim=8, rope_parameters=dict(LONG["rope_parameters"],
                                                                                      original_max_position_embeddings=48)), []),
    "rope_longrope": ("qwen3_moe", dict(QWEN, head_dim=8, **LONG), ["published"]),
    "rope_yarn": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24, head_dim=16,
                                  rope_parameters=YARN), ["published"]),
    # Its greedy text outgrows the original context, where transformers makes all keys anew.
    "phimoe_longrope_grows": ("phimoe", dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=25, attention_bias=True,
                                             lm_head_bias=True, hidden_size=32,
                                             rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=20,
                                                                  short_factor=[1.0 + 0.1 * i for i in range(4)],
                                                                  long_factor=[1.5 + 0.7 * i for i in range(4)],
                                                                  short_mscale=1.1, long_mscale=1.4)), ["published"]),
    # Longer than max_position_embeddings, which is what a dynamic base is for.
    "rope_dynamic_past": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=14, head_dim=8,
                                          max_position_embeddings=16, **rope(rope_type="dynamic", factor=4.0)), ["published"]),
    # Limits that act on one value in five or so.
    "olmoe_clip": ("olmoe", dict(num_experts=8, num_experts_per_tok=3, intermediate_size=21, clip_qkv=1.3), ["published"]),
    "gpt_oss_limit": ("gpt_oss", dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=20, head_dim=10, sliding_window=4,
                                      swiglu_limit=1.1), []),
}
PROMPTS = {"rope_dynamic_past": 23}
# Whose greedy tokens are decided clearly.
SEEDS = {"phimoe_longrope_grows": 74}


def randomise(model, seed):
    """Weights wide enough that every part shows in the logits and routers decide clearly."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1.0 + 0.2 * noise)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * noise)
            elif tensor.ndim == 1 or name.endswith("bias") or "sinks" in name:
                tensor.copy_(0.3 * noise)
            elif "embed" in name:
                tensor.copy_(noise)
            elif "gate.weight" in name or "router" in name:
                tensor.copy_(noise * 3.0 / tensor.shape[-1] ** 0.5)
            else:
                # Fused experts of gpt_oss are [E, in, out], everything else [..., out, in].
                fan = tensor.shape[-2] if "gpt_oss" in type(model).__module__ and "experts" in name else tensor.shape[-1]
                tensor.copy_(noise / fan ** 0.5)


def round_weights(model, changes):
    """What a narrower type on disk will hold, so that the reference is the same weights in f32."""
    for name, tensor in model.named_parameters():
        with torch.no_grad():
            if "bf16" in changes:
                tensor.copy_(tensor.to(torch.bfloat16).float())
            if "f16" in changes:
                tensor.copy_(tensor.to(torch.float16).float())


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_mxfp4(matrix):
    """[..., K] to blocks [..., K/32, 16] and scales [..., K/32]; and what they stand for."""
    groups = matrix.reshape(*matrix.shape[:-1], -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True) / 6.0)) + 1
    scaled = groups / 2.0**exponent
    code = (scaled.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
    value = FP4[code] * torch.sign(scaled) * 2.0**exponent
    nibble = (code + 8 * (scaled < 0)).to(torch.uint8)
    blocks = nibble[..., ::2] | nibble[..., 1::2] << 4
    return blocks, (exponent.squeeze(-1) + 127).to(torch.uint8), value.reshape(matrix.shape)


def quantise(model, changes):
    """Rounds what will be stored in 4 or 8 bits and returns the tensors to store, by name, in place of others."""
    stored = {}
    if "mxfp4" in changes:
        for layer, block in enumerate(model.model.layers):
            for part in ["gate_up_proj", "down_proj"]:
                tensor = getattr(block.mlp.experts, part)
                blocks, scales, value = to_mxfp4(tensor.detach().transpose(1, 2).contiguous())
                with torch.no_grad():
                    tensor.copy_(value.transpose(1, 2))
                name = f"model.layers.{layer}.mlp.experts.{part}"
                stored[name] = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return stored


FP8_BLOCK = [8, 16]


def to_fp8(folder, reference):
    """Stores projections and experts in 8 bits with a scale per block, and gives `reference` the same values."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        tensor = tensors[name]
        if tensor.ndim != 2 or not name.endswith("_proj.weight") and "kv_a_proj" not in name:
            continue
        rows, columns = tensor.shape
        scales = torch.zeros(-(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]))
        low = torch.zeros_like(tensor, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * FP8_BLOCK[0], (i + 1) * FP8_BLOCK[0]), slice(j * FP8_BLOCK[1], (j + 1) * FP8_BLOCK[1]))
                scales[i, j] = tensor[part].abs().max() / 448.0
                low[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn)
                tensor[part] = low[part].float() * scales[i, j]
        reference[name] = tensor.clone()
        tensors[name] = low
        tensors[name + "_scale_inv"] = scales
    save_file(tensors, path, metadata={"format": "pt"})


def published(config):
    """The spelling of folders on the Hub: rope_theta, rope_scaling, torch_dtype, num_experts."""
    parameters = config.pop("rope_parameters", None) or {}
    theta = parameters.pop("rope_theta", None)
    if theta is not None:
        config["rope_theta"] = theta
    kind = parameters.get("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else dict(parameters, type=kind)
    config["torch_dtype"] = config.pop("dtype", "float32")
    if config["model_type"].startswith(("qwen", "olmoe")) and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config.pop("layer_types", None)


def scores_of(model, logits):
    """What the choice of experts is made on."""
    if model.config.model_type == "deepseek_v3":
        return torch.sigmoid(logits)
    return logits


def margins(model, layer, logits, chosen):
    """Per token, the distance by which the choice would change: last chosen to best not chosen, and between chosen."""
    scores = scores_of(model, logits)
    gate = getattr(getattr(model.model.layers[layer], "mlp", None), "gate", None)
    correction = getattr(gate, "e_score_correction_bias", None)
    choice = scores if correction is None else scores + correction
    out = []
    for t in range(logits.shape[0]):
        picked = choice[t, chosen[t]]
        rest = np.setdiff1d(np.arange(choice.shape[1]), chosen[t])
        ordered = torch.sort(scores[t, chosen[t]]).values
        between = (ordered[1:] - ordered[:-1]).min() if len(ordered) > 1 else torch.tensor(1.0)
        groups = getattr(model.config, "n_group", None)
        outside = (picked.min() - choice[t, rest].max()).abs() if not groups else torch.tensor(0.02)
        out.append(float(min(outside, between)))
    return np.array(out, np.float32)


def run(model, ids):
    """Logits of every position and, per MoE layer, what its router said."""
    seen = {}

    def keep(layer):
        def hook(module, inputs, output):
            seen[layer] = output

        return hook

    hooks = []
    for layer, block in enumerate(model.model.layers):
        mlp = getattr(block, "mlp", None) or getattr(block, "block_sparse_moe", None)
        router = getattr(mlp, "router", None) or getattr(mlp, "gate", None)
        if router is not None and not isinstance(router, type(getattr(mlp, "gate_proj", None))):
            hooks.append(router.register_forward_hook(keep(layer)))
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].float()
    for hook in hooks:
        hook.remove()
    return logits, seen


def routed(model, output):
    """(logits [T, E], weights [T, K], experts [T, K]), largest weight first, from whatever a router returns."""
    tensors = [t for t in output if torch.is_tensor(t)]
    experts = next(t for t in tensors if t.dtype in (torch.int64, torch.int32))
    count, k = model.config.num_experts_per_tok, experts.shape[-1]
    floats = [t for t in tensors if t.is_floating_point()]
    weights = next(t for t in floats if t.shape == experts.shape)
    logits = next((t for t in floats if t.shape[-1] != k), None)
    order = torch.argsort(weights, dim=-1, descending=True, stable=True)
    return logits, torch.gather(weights, -1, order), torch.gather(experts, -1, order)


def make(name, number):
    kind, settings, changes = FIXTURES[name]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    config = transformers.AutoConfig.for_model(kind, **dict(BASE, **settings))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, 100 + number)
    ids = torch.randint(3, VOCAB, (PROMPTS.get(name, PROMPT),), generator=torch.Generator().manual_seed(number)).tolist()
    # The head's scale gives logits their spread.
    spread = run(model, ids)[0].std().item()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(SPREAD / spread)
    round_weights(model, changes)
    stored = quantise(model, changes)
    model.config.torch_dtype = torch.float32
    if "bf16" in changes or "f16" in changes:
        kind = torch.bfloat16 if "bf16" in changes else torch.float16
        copy = transformers.AutoModelForCausalLM.from_config(config)
        copy.load_state_dict(model.state_dict())
        copy.to(kind).save_pretrained(folder, max_shard_size="20KB" if "sharded" in changes else "1GB")
    else:
        model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if stored:
        path = folder / "model.safetensors"
        tensors = {n: t for n, t in load_file(path).items() if n not in stored}
        for parts in stored.values():
            tensors.update(parts)
        save_file(tensors, path, metadata={"format": "pt"})
    config_json = json.loads((folder / "config.json").read_text())
    config_json.pop("transformers_version", None)
    if "fp8" in changes:
        reference = load_file(folder / "model.safetensors")
        to_fp8(folder, reference)
        temporary = folder / "reference"
        temporary.mkdir()
        save_file(reference, temporary / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(folder / "config.json", temporary)
        model = transformers.AutoModelForCausalLM.from_pretrained(temporary, attn_implementation="eager", experts_implementation="eager").float().eval()
        shutil.rmtree(temporary)
        config_json["quantization_config"] = dict(quant_method="fp8", weight_block_size=FP8_BLOCK)
    if "published" in changes:
        published(config_json)
    (folder / "config.json").write_text(json.dumps(config_json, indent=1, sort_keys=True) + "\n")

    logits, seen = run(model, ids)
    expected = dict(prompt=np.array(ids, np.int32), logits=logits.numpy().astype(np.float32))
    smallest = 9.9
    for layer, output in sorted(seen.items()):
        router_logits, weights, experts = routed(model, output)
        expected[f"experts.{layer}"] = experts.numpy().astype(np.int32)
        expected[f"router_weights.{layer}"] = weights.numpy().astype(np.float32)
        if router_logits is None:
            expected[f"margins.{layer}"] = np.full(len(ids), 0.01, np.float32)
        else:
            expected[f"margins.{layer}"] = margins(model, layer, router_logits.float(), experts.numpy())
        smallest = min(smallest, expected[f"margins.{layer}"].min())
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=GREEDY, use_cache=True, output_logits=True,
                         return_dict_in_generate=True, pad_token_id=0)
    greedy = out.sequences[0, len(ids):].tolist()
    best = [torch.topk(step[0], 2).values for step in out.logits]
    greedy_margins = [float(b[0] - b[1]) for b in best]
    expected["greedy"] = np.array(greedy, np.int32)
    expected["greedy_margins"] = np.array(greedy_margins, np.float32)
    np.savez_compressed(folder / "expected.npz", **expected)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size / 1e3:.0f} kB, MoE layers {sorted(seen)}, spread {logits.std():.2f}, "
          f"smallest router margin {smallest:.4f}, smallest greedy margin {min(greedy_margins):.4f}")


# Texts past 4,096 positions: only the last rows of the logits are kept.
LONG_OUT = pathlib.Path(__file__).parent / "long"
LONG_PROMPT = 4400
LONG_ROWS = 6
SMALL = dict(hidden_size=24, num_hidden_layers=2, max_position_embeddings=8192)
LONG_TEXTS = {
    "gpt_oss": ("gpt_oss", dict(SMALL, num_local_experts=4, num_experts_per_tok=2, intermediate_size=16, head_dim=8, sliding_window=128,
                                rope_parameters=dict(YARN, original_max_position_embeddings=1024, factor=8.0, truncate=False))),
    "deepseek_v3": ("deepseek_v3", dict(LATENT, **SMALL, q_lora_rank=12, n_shared_experts=1, n_group=2, topk_group=1,
                                        num_experts_per_tok=2, rope_parameters=dict(YARN, original_max_position_embeddings=1024,
                                                                                    factor=8.0, mscale=1.0, mscale_all_dim=1.0))),
}


def make_long(name, number):
    kind, settings = LONG_TEXTS[name]
    folder = LONG_OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    config = transformers.AutoConfig.for_model(kind, **dict(BASE, **settings))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, 300 + number)
    ids = torch.randint(3, VOCAB, (LONG_PROMPT,), generator=torch.Generator().manual_seed(number)).tolist()
    spread = run(model, ids[:64])[0].std().item()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SPREAD / spread)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model.generation_config.eos_token_id = None
    logits = run(model, ids)[0]
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=GREEDY, output_logits=True,
                         return_dict_in_generate=True, pad_token_id=0)
    best = [torch.topk(step[0], 2).values for step in out.logits]
    expected = dict(prompt=np.array(ids, np.int32), logits=logits[-LONG_ROWS:].numpy().astype(np.float32),
                    greedy=np.array(out.sequences[0, len(ids):].tolist(), np.int32),
                    greedy_margins=np.array([float(b[0] - b[1]) for b in best], np.float32))
    np.savez_compressed(folder / "expected.npz", **expected)
    print(f"long/{name}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB, "
          f"smallest greedy margin {expected['greedy_margins'].min():.4f}")


if __name__ == "__main__":
    for number, name in enumerate(LONG_TEXTS):
        if f"long/{name}" in sys.argv[1:] or not sys.argv[1:]:
            make_long(name, number)
    wanted = sys.argv[1:] or list(FIXTURES)
    for number, name in enumerate(FIXTURES):
        if name in wanted:
            make(name, SEEDS.get(name, number))
