#!/usr/bin/env python3
"""Tiny tokenizers of four styles, trained on the lines below, and what the tokenizers library says of texts and ids.

Writes tests/parity/tokenizers/STYLE.json, a tokenizer.json, and STYLE.cases.json: `texts` with `ids` (special tokens
around them), `plain` ids (none) and `decoded`; `broken` lists of ids, whose bytes are no UTF-8 as a rule, with `decoded`.
Training is not the same from run to run (ties), so both files are kept.

    python3 -m venv .venv && .venv/bin/pip install tokenizers
    .venv/bin/python tests/parity/make_tokenizers.py
"""

import json
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

OUT = pathlib.Path(__file__).parent / "tokenizers"

LINES = """The ranks hold the experts, and the experts hold the words that they were taught.
It's what we'd say: they've gone, I'm here, you're there, he'll come, that's all.
for (int i = 0; i < 1024; ++i) { sum += x[i] * y[i]; }  // 3.14159, 2,718,281
Über den Wäldern läuft ein Weg; où est-il? Ça va. El niño comió piñones. Žluťoučký kůň.
Зима пришла рано, и снег лёг на поля. Το φως είναι γρήγορο.
今天天气很好,我们去公园散步。日本語の文章はここにあります。東京は大きい。한국어 문장도 있습니다.
שלום עולם، مرحبا بالعالم. नमस्ते दुनिया।
Faces 😀 😃 🙂, a family 👨‍👩‍👧‍👦, a flag 🇪🇺, a hand 👍🏽, a heart ❤️.
x\ty\n\n\n  indented\r\n    more    blanks   here""".split("\n")
LINES = [line.replace("\\t", "\t").replace("\\n", "\n").replace("\\r", "\r") for line in LINES]

TEXTS = LINES + [
    "", " ", "  ", "\n", "\t", "a", " a", "a ", "  a  b  ", "\r\n\r\n", "word\n\n\nword", "1234567", "3 14 159 2653",
    "don't DON'T o'clock '' 'll", "ünïcödé e\u0301 é", "\u00a0no\u00a0break\u2003wide\u3000ideographic",
    "emoji🏳️‍🌈at the end 🦀", "🦀🦀🦀", "\U0001f1e9\U0001f1ea", "漢字かな交じり文、全角!?", "한글과 漢字 mixed 混合 text",
    "null \0 bell \x07 escape \x1b[0m delete \x7f", "\ufeffbyte order mark", "\u200bzero\u200dwidth\u2060", "\ufffd as such",
    "<s>not special</s>", "<|endoftext|>", "tail of blanks    ", "CamelCase snake_case kebab-case", "math ∑ ∫ √ ≤ → ∞ ½ ²",
    "long " * 20, "\U0010ffff\ue000", "ﬁ ligature Å Å", "١٢٣ १२३ 一二三", "a\u0300\u0301\u0302\u0303b",
]


def gpt2():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.train_from_iterator(LINES * 4, trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"], show_progress=False))
    return t


def qwen():
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.train_from_iterator(LINES * 4, trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return t


def llama():
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.train_from_iterator(LINES[:4] * 4, trainers.BpeTrainer(
        vocab_size=620, special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)], limit_alphabet=90,
        show_progress=False))
    # As published, the bytes are ordinary tokens, and the three special ones are added ones.
    data = json.loads(t.to_str())
    data["added_tokens"] = [a for a in data["added_tokens"] if not a["content"].startswith("<0x")]
    t = Tokenizer.from_str(json.dumps(data))
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return t


def deepseek():
    t = Tokenizer(models.BPE())
    words = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(LINES * 4, trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    t.add_special_tokens([begin, end])
    t.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    t.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, t.token_to_id(begin))])
    return t


def broken(t, seed):
    """Ids drawn at random, and texts cut within their characters."""
    random.seed(seed)
    lists = [[random.randrange(3, t.get_vocab_size()) for _ in range(random.randrange(1, 12))] for _ in range(60)]
    for text in ["日本語", "🦀 crab 🦀", "né à Å"]:
        ids = t.encode(text, add_special_tokens=False).ids
        lists += [ids[i:j] for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)]
    # Bytes alone: lead bytes without their rest, rests without their lead, a whole character between.
    names = t.get_vocab()
    if "<0xE4>" in names:
        byte = {b: names[f"<0x{b:02X}>"] for b in range(256)}
    else:
        letters = {letter: names[letter] for letter in pre_tokenizers.ByteLevel.alphabet()}
        table = byte_letters()
        byte = {b: letters[table[b]] for b in range(256)}
    for data in [b"\xe4", b"\xe4\xb8", b"\xe4\xb8\xad", b"a\xe4", b"a\xe4b", b"\xf0\x9f\xa6\x80\xf0\x9f", b"\xff\xfe", b"\x80abc",
                 b"\xed\xa0\x80", b"\xc0\xaf", b"\xe4\xb8\xe4\xb8\xad", b"\xf0\x9f\xa6", bytes(range(128, 160)),
                 "中文🦀".encode(), b"A\xc3", b"\xc3\xa9\xc3"]:
        lists.append([byte[b] for b in data])
    return lists


def byte_letters():
    """Byte-level BPE's letter of each byte: itself where it is printable, else the next letter from U+0100 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {**{b: chr(b) for b in own}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def main():
    OUT.mkdir(exist_ok=True)
    for number, make in enumerate([gpt2, qwen, llama, deepseek]):
        t = make()
        t.save(str(OUT / f"{make.__name__}.json"), pretty=False)
        t = Tokenizer.from_file(str(OUT / f"{make.__name__}.json"))
        texts = []
        for text in TEXTS:
            ids = t.encode(text).ids
            texts.append(dict(text=text, ids=ids, plain=t.encode(text, add_special_tokens=False).ids, decoded=t.decode(ids)))
        lists = [dict(ids=ids, decoded=t.decode(ids)) for ids in broken(t, number)]
        cases = dict(vocab=t.get_vocab_size(), texts=texts, broken=lists)
        (OUT / f"{make.__name__}.cases.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")
        print(f"{make.__name__}: {t.get_vocab_size()} tokens, {len(texts)} texts, {len(lists)} lists of ids")


if __name__ == "__main__":
    main()
