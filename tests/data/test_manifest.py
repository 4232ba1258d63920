import dataclasses
import json

import pytest

from llada_jax.config import UserError
from llada_jax.data.manifest import Manifest, Shard, Source, Split, load_manifest

SPLIT = Split(2, 15, 40, 1, (Shard("train-00000.arrayrecord", 2, 100, "ab" * 32),))
MANIFEST = Manifest(
    tokenizer_kind="sentencepiece",
    tokenizer_sha256="cd" * 32,
    tokenizer_size=300,
    vocab_size=384,
    bos_id=1,
    eos_id=2,
    mask_id=296,
    start_header_id=297,
    end_header_id=298,
    eot_id=299,
    sequence_length=8,
    dtype="uint16",
    validation_fraction=0.5,
    validation_hash="rule",
    validation_below=2**63,
    train=SPLIT,
    validation=Split(0, 0, 0, 0, ()),
    sources=(Source("a.txt", 1, 1, 15, 40),),
)


def test_round_trip(tmp_path):
    (tmp_path / "manifest.json").write_text(MANIFEST.to_json())
    loaded = load_manifest(tmp_path)
    assert loaded == MANIFEST
    assert loaded.sha256 == MANIFEST.sha256
    assert loaded.split("train") == SPLIT


def test_identity_covers_the_shards():
    shard = dataclasses.replace(SPLIT.shards[0], sha256="00" * 32)
    other = dataclasses.replace(MANIFEST, train=dataclasses.replace(SPLIT, shards=(shard,)))
    assert other.sha256 != MANIFEST.sha256


def test_absent(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="not a prepared set"):
            load_manifest(folder)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "train": 3}'])
def test_damaged(tmp_path, damage):
    (tmp_path / "manifest.json").write_text(damage)
    with pytest.raises(UserError, match="is damaged"):
        load_manifest(tmp_path)


def test_field_too_many_or_few(tmp_path):
    fields = json.loads(MANIFEST.to_json())
    for changed in ({**fields, "new": 1}, {k: v for k, v in fields.items() if k != "dtype"}):
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="is damaged"):
            load_manifest(tmp_path)


def test_other_version(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 2, "whatever": 1}')
    with pytest.raises(UserError, match="format 2, but this version of llada_jax reads format 1"):
        load_manifest(tmp_path)
