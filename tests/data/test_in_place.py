"""Reads sets where they lie in a bucket: an emulator of Cloud Storage, with faults on the way."""

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from bucket import rule
from runs import train_on

from llada_jax.cli import machine_errors
from llada_jax.config import UserError
from llada_jax.data.manifest import MANIFEST_FILE, load_manifest
from llada_jax.data.read.chat import held_out_answers
from llada_jax.data.read.pipeline import validation_rows
from llada_jax.data.row_index import ENTRY
from llada_jax.storage import ranges, retries

from . import test_chat, test_pipeline
from .conftest import read_split
from .test_shards import open_files

ROWS = r"^GET .*\.arrayrecord"


@pytest.fixture(scope="module")
def text(tmp_path_factory, tokenizer_folder) -> str:
    return test_pipeline.make_set(tmp_path_factory.mktemp("text") / "a", tokenizer_folder, range(60))


@pytest.fixture(scope="module")
def chat(tmp_path_factory, tokenizer_folder) -> str:
    lines = [test_chat.talk(1 + i % 3, i) for i in range(40)]
    return test_chat.make_set(tmp_path_factory.mktemp("chat"), tokenizer_folder, lines)


@pytest.fixture
def quick(monkeypatch):
    """Makes retries come soon, and few."""
    monkeypatch.setattr(retries, "POLICY", retries.Policy(tries=8, first_wait=0.01, longest_wait=0.05))
    monkeypatch.setattr(ranges, "TIMEOUT", 1.0)
    monkeypatch.setattr(ranges, "LONG_TIMEOUT", 2.0)


def without_indices(bucket, folder: str, prefix: str) -> None:
    """Uploads a set as it was prepared before there were row indices."""
    bucket.upload(folder, prefix)
    manifest = load_manifest(folder)
    splits = {
        name: dataclasses.replace(
            split, shards=tuple(dataclasses.replace(shard, index_sha256="") for shard in split.shards)
        )
        for name, split in (("train", manifest.train), ("validation", manifest.validation))
    }
    old = dataclasses.replace(manifest, **splits)
    assert "index_sha256" not in old.to_json() and old.sha256 == manifest.sha256
    bucket.write(f"{prefix}/{MANIFEST_FILE}", old.to_json().encode())
    for name in bucket.names(prefix):
        if name.endswith(".rows"):
            bucket.delete(name)


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("old", [False, True])
def test_text_is_that_of_the_local_set(bucket, text, tmp_path, old):
    without_indices(bucket, text, "set") if old else bucket.upload(text, "set")
    bucket.reset()
    local = test_pipeline.open_data([text, text], (3, 1), random_length_every=3)
    data = test_pipeline.open_data([f"{bucket.url}/set"] * 2, (3, 1), random_length_every=3, cache=str(tmp_path))
    assert data.hashes == local.hashes and not bucket.count(ROWS), "no shard is read when a run starts"
    for step in (7, 0, 40, 3):
        same(data.batch(step, range(8)), local.batch(step, range(8)))
        same(data.batch(step, [5, 2]), local.batch(step, [5, 2]))
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == len(load_manifest(text).train.shards) and all(
        name.endswith(".rows.offsets" if old else ".rows") for name in files
    )
    bucket.reset()
    again = test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path))
    batches = zip(again.iterate(2, range(8)), test_pipeline.open_data([text]).iterate(2, range(8)), strict=False)
    for _ in range(5):
        (at, ours), (step, theirs) = next(batches)
        assert at == step
        same(ours, theirs)
    assert not bucket.count(r"\.rows"), "the indices of the first start are found again"
    assert all(re.search(r"bytes=\d+-\d+$", what) for what, *_ in bucket.state()["requests"] if ".arrayrecord" in what)
    held_out = [f(path, 8, 32, 512, *rest) for f, path, rest in (
        (validation_rows, [text], ()), (validation_rows, [f"{bucket.url}/set"], (str(tmp_path),))
    )]  # fmt: skip
    for ours, theirs in zip(*held_out, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_row_is_one_request(bucket, text, tmp_path):
    bucket.upload(text, "set")
    data = test_pipeline.open_data([f"{bucket.url}/set"], batch_size=64, copies=2, cache=str(tmp_path))
    data.batch(0, range(64))  # copies row indices
    bucket.reset()
    bucket.faults(latency=0.05)
    data.batch(1, range(64))
    assert bucket.count(ROWS) == 32, "two equal rows are read once"
    assert 4 <= bucket.state()["most_in_flight"] <= ranges.IN_FLIGHT
    kept = sorted(tmp_path.rglob("*.rows"))[0]
    content = kept.read_bytes()
    kept.write_bytes(content[:-3])  # as after a full disk
    again = test_pipeline.open_data([f"{bucket.url}/set"], batch_size=64, copies=2, cache=str(tmp_path))
    same(again.batch(0, range(64)), data.batch(0, range(64)))
    assert kept.read_bytes() == content


def test_nothing_stays_open_and_only_indices_are_kept_however_many_shards_there_are(bucket, tokenizer_folder, tmp_path):
    made = test_pipeline.make_set(tmp_path / "many", tokenizer_folder, range(120), shard_rows=1)
    bucket.upload(made, "set")
    shards = load_manifest(made).train.shards
    assert len(shards) > 150
    before = open_files()
    rows = test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path / "cache"))._sets[0]
    order, ours, seen = np.random.default_rng(0).permutation(len(shards)), [], set()
    for start in range(0, len(order), 10):
        ours += rows.read(order[start : start + 10])
        if start >= 2 * ranges.IN_FLIGHT:  # by now all connections are open
            seen.add(open_files())
    assert max(seen) - min(seen) <= 2 and max(seen) - before < 50  # 2: connections that are replaced
    theirs = test_pipeline.open_data([made])._sets[0].read(order)
    assert all((a.tokens == b.tokens).all() and a[1:] == b[1:] for a, b in zip(ours, theirs, strict=True))
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) == len(shards) and {path.stat().st_size for path in kept} == {2 * ENTRY.itemsize}


@pytest.mark.parametrize("old", [False, True])
def test_conversations_are_those_of_the_local_set(bucket, chat, tmp_path, old):
    without_indices(bucket, chat, "set") if old else bucket.upload(chat, "set")
    local = test_chat.open_chat([chat])
    data = test_chat.open_chat([f"{bucket.url}/set"], cache=str(tmp_path))
    for step in (9, 0, 4):
        same(data.batch(step, range(4)), local.batch(step, range(4)))
    held_out = (
        held_out_answers([chat], 8, 256, 512),
        held_out_answers([f"{bucket.url}/set"], 8, 256, 512, str(tmp_path)),
    )
    for ours, theirs in zip(*held_out, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_storage_that_fails_in_between(bucket, text, tmp_path, quick):
    bucket.upload(text, "set")
    # One flip at most: a row that is flipped twice counts as damaged. Each hang takes a second.
    kinds = [("status", {"status": 503}), ("status", {"status": 429}), ("reset", {}), ("cut", {}), ("lost", {}),
             ("hang", {"times": 1}), ("flip", {"match": ROWS, "times": 1})]  # fmt: skip
    bucket.faults([rule(kind, rate=0.05, **values) for kind, values in kinds])
    data = test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path))
    local = test_pipeline.open_data([text])
    for (step, batch), _ in zip(data.iterate(0, range(8)), range(15), strict=False):
        same(batch, local.batch(step, range(8)))
    assert {kind for _, _, kind in bucket.state()["requests"]} >= {"status", "reset", "cut", "lost", "hang"}


def test_a_storage_that_stays_away(bucket, text, tmp_path, quick):
    bucket.upload(text, "set")
    data = test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path))
    batches = data.iterate(0, range(8))
    next(batches)
    bucket.reachable(False)
    with pytest.raises(retries.StorageFailed, match="failed 8 times in .*Could not connect") as caught:
        for _ in range(20):
            next(batches)
    batches.close()
    assert machine_errors.machine_error(caught.value) is caught.value and "\n" not in str(caught.value)
    assert re.fullmatch(rf"{bucket.url}/set/train-\d+\.(arrayrecord|rows)", caught.value.filename)
    with pytest.raises(retries.StorageFailed):
        test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path))


def test_a_flipped_byte_is_named(bucket, text, tmp_path):
    bucket.upload(text, "set")
    shard = load_manifest(text).train.shards[1]
    entries = np.frombuffer((Path(text) / shard.name.replace(".arrayrecord", ".rows")).read_bytes(), ENTRY)
    start, stop = entries["offset"][5:7].tolist()
    content = bytearray((Path(text) / shard.name).read_bytes())
    content[stop - 3] ^= 4
    bucket.write(f"set/{shard.name}", bytes(content))
    data = test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path))
    rows = data._sets[0]
    before = load_manifest(text).train.shards[0].rows
    expected = read_split(Path(text), load_manifest(text), "train")
    for row in (4, 6):
        np.testing.assert_array_equal(rows[before + row].tokens, expected[before + row].tokens)
    with pytest.raises(UserError, match=f"^{bucket.url}/set/{shard.name}, row 5, is damaged: ") as caught:
        rows.read([before + 4, before + 5])
    assert "\n" not in str(caught.value) and start < stop


def test_a_row_of_another_preparation_is_not_taken_for_its_own(bucket, text, tmp_path):
    """A row that is whole, but not the one that the index was made for."""
    manifest = load_manifest(text)
    shard = manifest.train.shards[0]
    name = shard.name.replace(".arrayrecord", ".rows")
    entries = np.frombuffer((Path(text) / name).read_bytes(), ENTRY).copy()
    entries["checksum"][5] ^= 1
    shards = (dataclasses.replace(shard, index_sha256=hashlib.sha256(entries.tobytes()).hexdigest()),)
    train = dataclasses.replace(manifest.train, shards=shards + manifest.train.shards[1:])
    bucket.upload(text, "set")
    bucket.write(f"set/{name}", entries.tobytes())
    bucket.write(f"set/{MANIFEST_FILE}", dataclasses.replace(manifest, train=train).to_json().encode())
    rows = test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path))._sets[0]
    bucket.reset()
    bucket.faults([rule("flip", match=ROWS, times=1)])
    assert len(rows.read([4])) == 1 and bucket.count(ROWS) == 2  # damaged on the way: read once more
    with pytest.raises(UserError, match=f"{shard.name}, row 5, is damaged: it does not have the checksum of the row"):
        rows.read([5])


def test_what_is_wrong_with_a_set(bucket, text, tmp_path):
    def opened():
        return test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path))

    bucket.upload(text, "set")
    with pytest.raises(UserError, match=f"^{bucket.url}/none is not a prepared set"):
        test_pipeline.open_data([f"{bucket.url}/none"])
    with pytest.raises(UserError, match="parts of objects can be read in gs and s3 only"):
        ranges.Folder("az://bucket/set")
    name = "set/train-00001.rows"
    content = bucket.read(name)
    bucket.write(name, content[:-30] + bytes(30))
    with pytest.raises(UserError, match="train-00001.rows is not what the manifest says: copy it there again"):
        [opened().batch(step, range(8)) for step in range(9)]
    bucket.delete(name)
    with pytest.raises(UserError, match="train-00001.rows is missing: copy the whole folder there"):
        opened()
    bucket.write(name, content)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: .*set config.data.cache to use another"):
        test_pipeline.open_data([f"{bucket.url}/set"], cache=str(tmp_path / "file")).batch(0, range(8))
    name = "set/train-00001.arrayrecord"
    content = bucket.read(name)
    data = opened()
    bucket.delete(name)
    with pytest.raises(UserError, match="train-00001.arrayrecord is missing: copy the whole folder there"):
        [data.batch(step, range(8)) for step in range(9)]
    with pytest.raises(UserError, match="train-00001.arrayrecord is missing"):
        opened()
    bucket.write(name, content[:1000])
    with pytest.raises(UserError, match="train-00001.arrayrecord (is shorter than it was|ends before byte)"):
        [data.batch(step, range(8)) for step in range(9)]
    bucket.faults([rule("status", status=403)])
    with pytest.raises(UserError, match="no access"):
        data.batch(0, range(8))


def test_a_run_reads_in_place_and_is_resumed(bucket, tmp_path, capsys, quick):
    from llada_jax.data.prepare.prepare_text import prepare

    corpus = tiny.write_corpus(tmp_path / "corpus.jsonl", 500)
    prepare([corpus], tmp_path / "set", train_tokenizer=320, sequence_length=32, workers=1, shard_rows=50,
            progress=False)  # fmt: skip
    without_indices(bucket, str(tmp_path / "set"), "set")
    bucket.faults([rule("status", rate=0.02), rule("reset", rate=0.02)])

    def run(path: str, workdir: Path, steps: int) -> int:
        config = tiny.get_config()
        config.steps, config.validation.every, config.sampling.prompts = steps, 0, ()
        config.data.path, config.data.cache = path, str(tmp_path / "cache")
        return train_on(1, config, workdir)

    assert run(str(tmp_path / "set"), tmp_path / "local", 12) == 0
    capsys.readouterr()
    assert run(f"{bucket.url}/set", tmp_path / "bucket", 6) == 0
    said = capsys.readouterr()
    assert "rows are read in place" in said.out + said.err and "no row indices" in said.out + said.err
    assert not list((tmp_path / "cache").rglob("*.arrayrecord")), "no shard is copied"
    assert run(f"{bucket.url}/set", tmp_path / "bucket", 12) == 0
    ours, theirs = tiny.records(tmp_path / "bucket"), tiny.records(tmp_path / "local")
    assert [r for r in ours if r["step"] in (9, 12)] == [r for r in theirs if r["step"] in (9, 12)]
