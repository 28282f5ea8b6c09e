#!/usr/bin/env python3
"""Logits of llama.cpp for given ids, or how far two files of logits are apart.

    tests/peers/logits.py make SOURCE BUILD MODEL.gguf IDS OUT.npy [--vulkan]
    tests/peers/logits.py compare REFERENCE OTHER     (.npy or exflow's .npz)

SOURCE is the unpacked package of llama-cpp-python, whose bindings are used with the libraries of BUILD. `compare` prints
the mean and the largest Kullback-Leibler divergence of the reference from the other, in nats over the positions, and the
share of positions whose likeliest token is the same.
"""

import os
import sys
import types

import numpy as np


def make(source, build, model, ids, out, vulkan):
    os.environ["LLAMA_CPP_LIB_PATH"] = os.path.join(build, "bin")
    # The package's own start imports much that only its server needs.
    package = types.ModuleType("llama_cpp")
    package.__path__ = [os.path.join(source, "llama_cpp")]
    sys.modules["llama_cpp"] = package
    from llama_cpp import llama_cpp as c

    ids = [int(id) for id in ids.split(",")]
    c.llama_backend_init()
    asked = c.llama_model_default_params()
    asked.n_gpu_layers = 99 if vulkan else 0
    loaded = c.llama_model_load_from_file(model.encode(), asked)
    if not loaded:
        sys.exit(f"{model}: llama.cpp does not load it")
    asked = c.llama_context_default_params()
    asked.n_ctx, asked.n_batch, asked.n_ubatch = len(ids), len(ids), len(ids)
    # Keys and values in f32, as exflow has them; its attention in blocks would round them.
    asked.type_k, asked.type_v, asked.flash_attn_type = c.GGML_TYPE_F32, c.GGML_TYPE_F32, c.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = c.llama_init_from_model(loaded, asked)
    batch = c.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, id in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = id, at, 1, 0, 1
    if c.llama_decode(context, batch) != 0:
        sys.exit(f"{model}: llama.cpp does not run it")
    width = c.llama_vocab_n_tokens(c.llama_model_get_vocab(loaded))
    rows = [np.ctypeslib.as_array(c.llama_get_logits_ith(context, at), (width,)).copy() for at in range(len(ids))]
    np.save(out, np.stack(rows))


def read(path):
    values = np.load(path)
    return (values["logits"] if path.endswith(".npz") else values).astype(np.float64)


def compare(reference, other):
    def logs(values):
        values = values - values.max(axis=1, keepdims=True)
        return values - np.log(np.exp(values).sum(axis=1, keepdims=True))

    p, q = logs(read(reference)), logs(read(other))
    each = (np.exp(p) * (p - q)).sum(axis=1)
    same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    print(f"{each.mean():.1e} (largest {each.max():.1e}), {100 * same:.0f} % the same likeliest token")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--vulkan"]
    if len(arguments) == 6 and arguments[0] == "make":
        make(*arguments[1:], vulkan="--vulkan" in sys.argv)
    elif len(arguments) == 3 and arguments[0] == "compare":
        compare(*arguments[1:])
    else:
        sys.exit(__doc__)
