"""Tests that the parts of a prepared set belong together when a run opens it."""

import pytest

from llada_jax.config import Config, UserError
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.sets import find_sets
from llada_jax.text.tokenizer import load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

from .conftest import story, write_jsonl


def test_an_exchanged_tokenizer_is_noticed(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "text.jsonl", [story(i) for i in range(10)])
    folder = tmp_path / "set"
    prepare([source], folder, tokenizer=tokenizer_folder, sequence_length=32, workers=1, progress=False)
    config = Config(sequence_length=32)
    config.data.path = str(folder)
    found = find_sets(config, tmp_path / "run", None)
    assert found.tokenizer.sha256 == load_tokenizer(tokenizer_folder).sha256 == found.identity(config)["tokenizer"]
    train_tokenizer([story(i) for i in range(50, 99)], 400, folder / "tokenizer")  # of the same kind and size
    with pytest.raises(UserError, match="set/tokenizer is not the tokenizer that the set was prepared with"):
        find_sets(config, tmp_path / "run", None)
