"""Train the demo model on one CPU core.

    python train.py --corpus corpus.json --tokenizer tokenizer.json --out run

Steps are cut in two parts with the same number of tokens per step: the first
half (--short-part) at a short context, the rest at the full one.  A checkpoint
(which `--resume` continues from) and the routing history go to --out.
"""

import argparse
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
import routing
from model import Config, Model


def learning_rate(step, args):
    """Linear warm-up, flat, then a cosine from the change of context on."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    begin = int(args.short_part * args.steps)
    if step < begin:
        return args.lr
    done = (step - begin) / max(1, args.steps - begin)
    return args.lr * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))


def history_steps(total):
    steps = {0, total} | {total * i // 10 for i in range(1, 10)}
    step = 25
    while step < total:
        steps.add(step)
        step *= 2
    return steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--stop", type=int, help="stop early, after this step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048, help="per step")
    parser.add_argument("--short", type=int, default=128, help="short context")
    parser.add_argument("--short-part", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--balance", type=float, default=0.02)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--precision", default="highest",
                        help="of float32 products: highest, high or medium")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(args.precision)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    os.makedirs(args.out, exist_ok=True)

    with open(args.corpus, encoding="utf-8") as file:
        corpus = json.load(file)
    bpe = data.tokenizer(args.tokenizer, corpus, args.vocab)
    stream, starts = data.training_stream(bpe, corpus, args.seed)
    config = Config(vocab_size=bpe.get_vocab_size(),
                    bos_token_id=bpe.token_to_id(data.EOS),
                    eos_token_id=bpe.token_to_id(data.EOS))
    held_out = data.held_out_windows(bpe, corpus, config.n_positions)
    # The fixed sample of the routing history: 12 windows of each source.
    fixed = torch.cat([w[:: max(1, len(w) // 12)][:12] for w in held_out.values()])
    print(f"{len(stream) / 1e6:.2f} M training tokens, held-out windows "
          f"{ {k: len(v) for k, v in held_out.items()} }, "
          f"history sample {fixed[:, 1:].numel()} tokens", flush=True)

    model = Model(config)
    decay = [p for n, p in model.named_parameters()
             if p.dim() >= 2 and not n.endswith((".b1", ".b2"))
             and not n.startswith(("wte", "wpe"))]
    chosen = {id(p) for p in decay}
    plain = [p for p in model.parameters() if id(p) not in chosen]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=args.decay),
         dict(params=plain, weight_decay=0.0)],
        lr=args.lr, betas=(0.9, 0.95), fused=True)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")

    history = routing.History()
    first, seconds = 0, 0.0
    checkpoint = os.path.join(args.out, "checkpoint.pt")
    if args.resume:
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = state["rng"]
        history = state["history"]
        first, seconds = state["step"], state["seconds"]

    def save(step):
        torch.save(dict(model=model.state_dict(), config=config, step=step,
                        optimizer=optimizer.state_dict(), history=history,
                        rng=rng.bit_generator.state, seconds=seconds,
                        args=vars(args)), checkpoint + ".new")
        os.replace(checkpoint + ".new", checkpoint)

    record = history_steps(args.steps)
    begin, since, losses = time.time(), time.time(), []
    for step in range(first, args.steps + 1):
        if step in record or step % 200 == 0 or step == args.stop:
            result = routing.measure(model, fixed)
            if step in record:
                history.add(step, result)
            load = result.load
            now = time.time()
            print(f"step {step} lr {learning_rate(step, args):.5f} train "
                  f"{np.mean(losses) if losses else float('nan'):.3f} held-out "
                  f"{result.loss:.3f} max/mean "
                  + " ".join(f"{x:.2f}" for x in load.max(1) / load.mean(1))
                  + f" | {(now - since) / max(1, len(losses)) * 1e3:.0f} ms/step",
                  flush=True)
            since, losses = now, []
        if step > first and (step % 400 == 0 or step in (args.steps, args.stop)):
            seconds += time.time() - begin
            begin = time.time()
            save(step)
        if step in (args.steps, args.stop):
            break

        short = step < args.short_part * args.steps
        length = args.short if short else config.n_positions
        ids, positions = data.sample(stream, starts, args.tokens // length,
                                     length, config.n_positions, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        logits, _, balance = model(ids[:, :-1], positions)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    history.save(os.path.join(args.out, "routing_history.npz"))
    print(f"{seconds / 60:.1f} minutes")


if __name__ == "__main__":
    main()
