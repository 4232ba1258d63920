"""Makes small texts for the tests, and a tokenizer that is trained on them."""

import gzip
import json
import random
from pathlib import Path

import pytest
from prefixing import train_prefixing

from llada_jax.data.manifest import TOKENIZER_FOLDER, Manifest
from llada_jax.data.rows import decode_row
from llada_jax.text.tokenizer import load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

WORDS = ["the", "a", "small", "quiet", "green", "fox", "engine", "child", "river", "walked", "sang", "and", "never"]


def story(seed: int, words: int = 40) -> str:
    """Returns a document that no other seed gives."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 12))) for _ in range(words // 8 + 1)]
    return f"Story {seed}\n" + ".\n".join(lines) + "\u00e9\u2581\t.\n"


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({key: text}) + "\n")
    return str(path)


def read_split(folder: Path, manifest: Manifest, split: str) -> list:
    """Returns all rows of a split, in order."""
    from array_record.python.array_record_module import ArrayRecordReader

    rows = []
    for shard in manifest.split(split).shards:
        reader = ArrayRecordReader(str(folder / shard.name))
        records = reader.read_all()
        assert len(records) == shard.rows
        rows += [decode_row(record, manifest.dtype, manifest.sequence_length) for record in records]
    return rows


def split_documents(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """Returns the texts that the rows of a split hold, decoded with the tokenizer of the set."""
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    ids: list[int] = []
    for row in read_split(folder, manifest, split):
        ids += row.tokens[: row.length].tolist()
    documents: list[list[int]] = [[]]
    for i in ids:
        if i == manifest.eos_id:
            documents.append([])
        else:
            documents[-1].append(i)
    assert documents.pop() == []  # EOS ends the last document too
    return [tokenizer.decode(document) for document in documents]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([story(i) for i in range(1000, 1100)], 400, folder)
    return str(folder)


@pytest.fixture(scope="session")
def prefixing_model(tmp_path_factory) -> str:
    """Returns the path of a SentencePiece model that puts a space before every text, as most published models do."""
    path = tmp_path_factory.mktemp("prefixing") / "prefixing.model"
    return str(train_prefixing((story(i) for i in range(1000, 1100)), path))
