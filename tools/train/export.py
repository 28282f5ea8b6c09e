"""Write the model bundle from a checkpoint, and measure the exported model.

    python export.py --run run --tokenizer tokenizer.json --out bundle \
        --corpus corpus.json

Writes config.json, model.safetensors (bf16), tokenizer.json, reference.json
and, of a finished run, routing_history.npz.  With --corpus it also prints the
figures of the model card: all of them are those of the bf16-rounded weights,
computed in float32.
"""

import argparse
import json
import os
import shutil

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import data
import routing
from model import Model

PROMPTS = ["And it came to pass", "This function returns", "The best way to"]
SAMPLES = ["And the king said", "In Rust, a function", "A good friend"]


@torch.no_grad()
def reference(model, bpe, prompt, count=24):
    """Greedy continuation of a prompt; PROMPTS are such that no EOS comes."""
    ids = bpe.encode(prompt).ids
    length, margins = len(ids), []
    for _ in range(count):
        logits, _, _ = model(torch.tensor([ids]))
        top = logits[0, -1].topk(2)
        margins.append(round((top.values[0] - top.values[1]).item(), 5))
        ids = ids + [top.indices[0].item()]
    # The choices of every token but the last, which was never an input.
    _, choices, _ = model(torch.tensor([ids[:-1]]))
    return {"prompt": prompt, "prompt_ids": ids[:length],
            "continuation_ids": ids[length:], "top2_margin": margins,
            "text": bpe.decode(ids), "experts": choices[:, 0].tolist()}


@torch.no_grad()
def generate(model, bpe, prompt, temperature, seed, limit=300):
    """(text, whether it ended with EOS)"""
    generator = torch.Generator().manual_seed(seed)
    eos = bpe.token_to_id(data.EOS)
    ids = bpe.encode(prompt).ids
    while len(ids) < limit:
        logits = model(torch.tensor([ids]))[0][0, -1]
        if temperature == 0:
            token = logits.argmax().item()
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1,
                                      generator=generator).item()
        if token == eos:
            return bpe.decode(ids), True
        ids.append(token)
    return bpe.decode(ids), False


def blocks(windows, size=4):
    """Two halves of held-out windows, in alternating blocks of `size`."""
    side = (torch.arange(len(windows)) // size) % 2
    return windows[side == 0], windows[side == 1]


def report(model, bpe, corpus, ranks=4):
    held_out = data.held_out_windows(bpe, corpus, model.config.n_positions)
    total = tokens = 0
    load, result = 0, {"loss": {}, "tokens": {}}
    for source, windows in held_out.items():
        one = routing.measure(model, windows)
        count = windows[:, 1:].numel()
        result["loss"][source] = one.loss
        result["tokens"][source] = count
        total, tokens, load = total + one.loss * count, tokens + count, load + one.load
    result["loss"]["all"], result["tokens"]["all"] = total / tokens, tokens
    result["max_over_mean"] = (load.max(1) / load.mean(1)).tolist()
    result["min_over_mean"] = (load.min(1) / load.mean(1)).tolist()

    halves = [blocks(windows) for windows in held_out.values()]
    learn, score = (routing.measure(model, torch.cat(half)) for half in zip(*halves))
    layers, experts = load.shape
    stay = {}
    for name, place in {
        "round-robin": routing.round_robin(layers, experts, ranks),
        "load only": routing.by_load(learn.load, ranks),
        "affinity": routing.by_affinity(learn.transitions, ranks),
        "affinity with wrap": routing.by_affinity(learn.transitions, ranks, learn.wrap),
    }.items():
        rank_load = np.stack([np.bincount(p, weights=l, minlength=ranks)
                              for p, l in zip(place, score.load)])
        stay[name] = {
            "stay": routing.stay_rate(place, score.transitions),
            "stay_with_wrap": routing.stay_rate(place, score.transitions, score.wrap),
            "stay_learned_half": routing.stay_rate(place, learn.transitions),
            "per_layer": [routing.stay_rate(place[l:l + 2], score.transitions[l:l + 1])
                          for l in range(layers - 1)],
            "rank_max_over_mean": (rank_load.max(1) / rank_load.mean(1)).max(),
        }
    result["stay"] = stay
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--corpus", help="also measure on its held-out text")
    parser.add_argument("--samples", type=int, default=0, metavar="SEEDS",
                        help="also print generated text, with so many seeds")
    args = parser.parse_args()
    torch.set_num_threads(1)

    state = torch.load(os.path.join(args.run, "checkpoint.pt"), weights_only=False)
    bpe = Tokenizer.from_file(args.tokenizer)
    model = Model(state["config"])
    rounded = {name: tensor.to(torch.bfloat16).contiguous()
               for name, tensor in state["model"].items()}
    model.load_state_dict({name: t.float() for name, t in rounded.items()})
    model.eval()

    os.makedirs(args.out, exist_ok=True)

    def write(name, value):
        with open(os.path.join(args.out, name), "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1 if name == "config.json" else None)
            file.write("\n")

    write("config.json", model.config.to_json())
    write("reference.json", {
        "about": "greedy continuations by the bf16-rounded weights in float32; "
                 "experts[layer][position] is the chosen expert",
        "step": state["step"],
        "cases": [reference(model, bpe, prompt) for prompt in PROMPTS]})
    weights = os.path.join(args.out, "model.safetensors")
    save_file(rounded, weights, metadata={"format": "pt"})
    os.chmod(weights, 0o644)
    target = os.path.join(args.out, "tokenizer.json")
    if os.path.abspath(args.tokenizer) != os.path.abspath(target):
        shutil.copyfile(args.tokenizer, target)
    if state["step"] == state["args"]["steps"]:
        state["history"].save(os.path.join(args.out, "routing_history.npz"))

    print(f"step {state['step']}, {state['seconds'] / 60:.1f} minutes")
    if args.corpus:
        with open(args.corpus, encoding="utf-8") as file:
            print(json.dumps(report(model, bpe, json.load(file)), indent=1))
    for seed in range(args.samples):
        for prompt in SAMPLES:
            for temperature in ([0, 0.8] if seed == 0 else [0.8]):
                text, ended = generate(model, bpe, prompt, temperature, seed)
                print(f"--- temperature {temperature} seed {seed} "
                      f"{'EOS' if ended else 'cut off'}\n{text}")


if __name__ == "__main__":
    main()
