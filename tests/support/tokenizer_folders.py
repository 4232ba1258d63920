"""Small tokenizer.json files of every kind, and what the tokenizers library makes of them."""

import json
from pathlib import Path

import tokenizers

WORDS = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "<s>": 4, "</s>": 5, "<mask>": 6}
PIECES = ("\u2581", "a", "b", "ab", "\u2581a", "\u2581ab", "f", "o", "x", "<", "s", ">", "\u2581<s>", "\n", "\u00e9")
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def added(literal, i, *flags):
    """Returns an entry of added_tokens; `flags` are the names of the properties that are true."""
    return {"id": i, "content": literal, **{flag: flag in flags for flag in FLAGS}}


def words(**model):
    """Returns a tokenizer.json whose tokens are words."""
    model = {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>", **model}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}


def unigram(scheme="always"):
    """Returns a tokenizer.json of pieces with scores, which puts a space in front of texts by the scheme."""
    vocab = [["<unk>", 0.0], *([piece, -1.0 - i / 10] for i, piece in enumerate(PIECES)), ["<s>", -0.5]]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": space, "decoder": space, "model": model}


def bytes_pairs(space=False, **model):
    """Returns a byte-level BPE; <s> is a piece that its merges make of text, <mask> one that they do not make."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["a b", "f o", "fo x", "\u0120 a", "\u0120a b", "< s", "<s >"]
    pieces = [*alphabet, *("".join(merge.split(" ")) for merge in merges), "<mask>"]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges, **model}
    level = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}


def front_and_behind(front=(), behind=()):
    """Returns a post_processor that writes the tokens (literal, id) in front of a text and behind it."""
    single = [{"SpecialToken": {"id": literal, "type_id": 0}} for literal, _ in front]
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    single += [{"SpecialToken": {"id": literal, "type_id": 0}} for literal, _ in behind]
    tokens = {literal: {"id": literal, "ids": [i], "tokens": [literal]} for literal, i in (*front, *behind)}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def write(folder: Path, content, **others):
    """Writes tokenizer.json and, for each keyword, a JSON file of this name beside it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {"tokenizer": content, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def library(folder: Path) -> tokenizers.Tokenizer:
    """Returns what the tokenizers library itself reads."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
