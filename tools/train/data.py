"""Tokenizer, token streams and windows."""

import os
import random

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"

# How often a source's documents occur in the training stream.
REPEATS = {"fortunes": 2}


def tokenizer(path, corpus, vocab_size):
    """The tokenizer at `path`; trained from the corpus if there is none.

    Training a BPE is not reproducible run to run, so reuse the shipped file
    when the model shall be the same.
    """
    if os.path.exists(path):
        return Tokenizer.from_file(path)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        (text for sides in corpus.values() for text in sides["train"]), trainer)
    bpe.save(path)
    return bpe


def encode(bpe, documents):
    """Token ids of each document, EOS at its end."""
    eos = bpe.token_to_id(EOS)
    return [np.array(e.ids + [eos], dtype=np.int64)
            for e in bpe.encode_batch(documents)]


def training_stream(bpe, corpus, seed):
    """All training documents, shuffled; and where each of them starts."""
    documents = []
    for source, sides in corpus.items():
        documents += encode(bpe, sides["train"]) * REPEATS.get(source, 1)
    random.Random(seed).shuffle(documents)
    starts = np.cumsum([0] + [len(d) for d in documents[:-1]])
    return np.concatenate(documents), starts


def held_out_windows(bpe, corpus, length):
    """{source: ids [W, length + 1]}: the held-out documents, cut in windows."""
    windows = {}
    for source, sides in corpus.items():
        stream = np.concatenate(encode(bpe, sides["held_out"]))
        count = (len(stream) - 1) // length
        windows[source] = torch.from_numpy(np.stack(
            [stream[i * length:i * length + length + 1] for i in range(count)]))
    return windows


def sample(stream, starts, batch, length, positions, rng):
    """Random windows: (ids [B, length + 1], positions [B, length]).

    A quarter of the windows begin with a document or the EOS before it, so
    that the first positions see beginnings as they do in use.  Windows
    shorter than the context are placed at a random offset in it, so that
    every position embedding is trained.
    """
    last = len(stream) - length - 1
    begin = rng.integers(0, last + 1, batch)
    at_document = rng.random(batch) < 0.25
    document = starts[rng.integers(1, len(starts), batch)] - rng.integers(0, 2, batch)
    begin = np.where(at_document, np.minimum(document, last), begin)
    ids = np.stack([stream[b:b + length + 1] for b in begin])
    offset = rng.integers(0, positions - length + 1, batch)
    return (torch.from_numpy(ids),
            torch.from_numpy(offset[:, None] + np.arange(length)[None]))
