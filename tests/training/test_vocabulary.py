"""Tests runs that start from a published folder whose vocabulary is full, or whose files disagree on special ids."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from array_record.python.array_record_module import ArrayRecordReader
from paths import PARITY

from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.data import sets as prepared_sets
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.rows import decode_row
from llada_jax.formats import workdir
from llada_jax.text.agreement import resolve_ids
from llada_jax.text.tokenizer import find_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer
from llada_jax.training import start


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Returns a published folder with 512 rows: 511 tokens, EOS among them, and MASK. The chat needs three more."""
    folder = tmp_path_factory.mktemp("full") / "model"
    shutil.copytree(PARITY / "gqa", folder)
    tokenizer = train_tokenizer([Path(start.__file__).read_text() * 2], 515, folder)
    assert (tokenizer.own_size, tokenizer.size, tokenizer.eos_id, tokenizer.mask_id) == (511, 515, 2, 511)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 511, "eos_token_id": 2}))
    return folder


def changed(full, tmp_path, **fields):
    folder = shutil.copytree(full, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def prepare_text(corpus, path, tokenizer):
    return prepare([corpus], path, tokenizer=str(tokenizer), sequence_length=32, workers=1, progress=True)


def begun(folder, path, tmp_path):
    """Returns the model's config of a run that starts from the folder, after all checks before the first step."""
    config = tiny.get_config()
    config.init_from, config.model.layers, config.data.path = str(folder), 0, str(path)
    for name in ("width", "heads", "kv_heads", "feed_forward"):
        setattr(config.model, name, type(config.model).__dataclass_fields__[name].default)
    begin = start.decide(config, tmp_path / "run")
    config.model = begin.architecture(config.model)
    begin.check(config)
    sets = prepared_sets.find_sets(config, tmp_path / "run", None)
    resolve_ids(config.model, sets.tokenizer, source=begin.source)
    begin.check(config, sets)
    prepared_sets.open_training(config, sets.paths)
    return config.model


def test_a_full_vocabulary_is_trained_further(full, corpus, tmp_path):
    prepare_text(corpus, tmp_path / "set", full)
    model = begun(full, tmp_path / "set", tmp_path)
    assert (model.vocab_size, model.token_count, model.mask_id, model.eos_id, model.eot_id) == (512, 512, 511, 2, None)


@pytest.mark.parametrize("prepared", ["before", "by text", "by chat"])
def test_what_a_tokenizer_says_is_told_once_at_the_start_of_a_run(full, corpus, tmp_path, capsys, prepared):
    folder = changed(full, tmp_path)
    (folder / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    config = tiny.get_config()
    config.init_from = str(folder)
    if prepared == "before":
        prepare_text(corpus, tmp_path / "set", folder)
        config.data.path = str(tmp_path / "set")
    elif prepared == "by text":
        config.data.input, config.data.tokenizer = str(corpus), str(folder)
    else:
        lines = [{"prompt": f"How much is {i}?", "response": "Much."} for i in range(60)]
        (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config.data.input, config.diffusion.objective = str(tmp_path / "chat.jsonl"), "sft"
        config.sequence_length = 128
    capsys.readouterr()
    for _ in range(2):  # a second start finds the set that the first one has prepared
        begin = start.decide(config, tmp_path / "run")
        prepared_sets.find_sets(config, tmp_path / "run", begin.earlier, begin.told)
        assert capsys.readouterr().err.count("clean_up_tokenization_spaces") == 1


def test_data_has_the_eos_of_the_model_and_this_is_told(full, corpus, tmp_path, capsys):
    folder = changed(full, tmp_path, eos_token_id=9)
    manifest = prepare_text(corpus, tmp_path / "set", folder)
    assert "EOS is 9 in the model's config.json, but 2 (<|endoftext|>) in the tok" in capsys.readouterr().err
    assert (manifest.eos_id, manifest.mask_id) == (9, 511)
    model = begun(folder, tmp_path / "set", tmp_path)
    assert (model.eos_id, model.end_ids) == (9, (2,))
    # With a tokenizer alone nobody can know this before the run starts.
    find_tokenizer(folder).save(tmp_path / "tokenizer")
    prepare_text(corpus, tmp_path / "other", tmp_path / "tokenizer")
    with pytest.raises(UserError, match=rf"EOS is 9 in {folder} .*but the data was prepared with 2: prepare it again"):
        begun(folder, tmp_path / "other", tmp_path)


def test_sets_of_different_models_are_not_mixed(full, corpus, tmp_path):
    folder = changed(full, tmp_path, eos_token_id=9)
    prepare_text(corpus, tmp_path / "one", full)
    prepare_text(corpus, tmp_path / "two", folder)
    with pytest.raises(UserError, match="two was prepared with eos_id=9, but .*one with 2: prepare both with the same"):
        begun(full, f"{tmp_path}/one,{tmp_path}/two", tmp_path)


def test_mask_on_a_token_of_text(full, corpus, tmp_path, capsys):
    i = max(find_tokenizer(full).encode("the quiet"))
    folder = changed(full, tmp_path, mask_token_id=i)
    manifest = prepare_text(corpus, tmp_path / "set", folder)
    assert f"MASK is {i}, which is also the token of ordinary text" in capsys.readouterr().err
    assert manifest.mask_id == i and begun(folder, tmp_path / "set", tmp_path).mask_id == i
    records = [
        r for shard in manifest.train.shards for r in ArrayRecordReader(str(tmp_path / "set" / shard.name)).read_all()
    ]
    rows = [decode_row(record, manifest.dtype, manifest.sequence_length).tokens for record in records]
    assert i not in np.concatenate(rows)


@pytest.mark.slow
def test_a_run_on_a_full_vocabulary(full, corpus, run, tmp_path):
    prepare_text(corpus, tmp_path / "set", full)
    default = {f"model__{name}": value for name, value in dict(
        layers=0, width=4096, heads=32, kv_heads=32, feed_forward=12288
    ).items()}  # fmt: skip
    settings = dict(init_from=str(full), data__path=str(tmp_path / "set"), steps=2, validation__rows=0)
    assert run(tmp_path / "run", **settings, **default) == entry_point.FINISHED
    assert workdir.read_config(tmp_path / "run")[0].model.token_count == 512
