import collections
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from paths import ROOT

from llada_jax.config import Config, UserError
from llada_jax.data.manifest import load_manifest
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.read import pipeline
from llada_jax.data.read.pipeline import TrainingData, validation_rows
from llada_jax.data.rows import SplitWriter, decode_row
from llada_jax.data.sets import open_training

from .conftest import read_split, story, write_jsonl

T, VOCAB, BATCH = 32, 512, 8


def make_set(folder: Path, tokenizer: str, documents: range, **options) -> str:
    folder.mkdir(parents=True)
    source = write_jsonl(folder / "text.jsonl", [story(i) for i in documents])
    settings = {"sequence_length": T, "workers": 1, "shard_rows": 40, "progress": False, "validation_fraction": 0.1}
    prepare([source], folder / "set", tokenizer=tokenizer, **{**settings, **options})
    return str(folder / "set")


@pytest.fixture(scope="module")
def sets(tmp_path_factory, tokenizer_folder) -> list[str]:
    folder = tmp_path_factory.mktemp("sets")
    ranges = (range(60), range(60, 90), range(90, 110))
    return [make_set(folder / str(i), tokenizer_folder, documents) for i, documents in enumerate(ranges)]


def open_data(paths, weights=(), **options) -> TrainingData:
    defaults = {"seed": 3, "batch_size": BATCH, "sequence_length": T, "random_length_every": 0, "vocab_size": VOCAB}
    return TrainingData(paths, weights, **{**defaults, **options})


def take(data: TrainingData, count: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens and lengths of rows `start` to `start + count` of the run."""
    steps = range(start // BATCH, -(-(start + count) // BATCH))
    batches = [data.batch(step, range(BATCH)) for step in steps]
    skip = start - steps.start * BATCH
    tokens, lengths = (np.concatenate([b[key] for b in batches])[skip:][:count] for key in ("tokens", "length"))
    return tokens, lengths


def as_counter(tokens: np.ndarray) -> collections.Counter:
    return collections.Counter(row.tobytes() for row in tokens.astype(np.int32))


def all_rows(path: str, split: str = "train") -> np.ndarray:
    return np.array([row.tokens for row in read_split(Path(path), load_manifest(path), split)], np.int32)


def test_shapes_and_identity(sets):
    data = open_data(sets)
    batch = data.batch(5, [7, 0, 3])
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "tokens": ((3, T), np.int32),
        "length": ((3,), np.int32),
    }
    assert data.hashes == tuple(load_manifest(path).sha256 for path in sets)
    assert data.eos_id == data.manifests[0].eos_id


@pytest.mark.parametrize("copies", [1, 2])
def test_the_rows_of_a_step_lie_where_it_is_said(sets, copies):
    data = open_data(sets, copies=copies)
    named = data.origins(7)
    assert len(named) > 1 or copies == 2
    found = []
    for path, shards in named.items():
        for shard, places in shards.items():
            records = ArrayRecordReader(str(Path(path) / shard)).read(places)
            manifest = load_manifest(path)
            found += [decode_row(record, manifest.dtype, T).tokens for record in records]
    assert as_counter(np.array(found * copies)) == as_counter(data.batch(7, range(BATCH))["tokens"])


def test_copies_of_sequences(sets):
    """With two copies, each sequence fills two rows with the same random length; the order stays that of one copy."""
    options = {"random_length_every": 3}
    tokens, lengths = take(open_data(sets, copies=2, **options), 6 * BATCH, start=BATCH // 2)
    once = take(open_data(sets, **options), 3 * BATCH + 1, start=BATCH // 4)
    for pairs, single in zip((tokens, lengths), once, strict=True):
        np.testing.assert_array_equal(pairs, np.repeat(single, 2, axis=0)[: 6 * BATCH])


@pytest.mark.parametrize("complementary", [False, True])
def test_complementary_masks_get_pairs_of_rows(sets, complementary):
    config = Config(batch_size=BATCH, sequence_length=T)
    config.model.vocab_size, config.diffusion.complementary = VOCAB, complementary
    tokens, _ = take(open_training(config, sets), 4 * BATCH)
    assert [np.array_equal(*pair) for pair in tokens.reshape(-1, 2, T)] == [complementary] * 2 * BATCH


def test_a_row_depends_on_seed_step_and_place_only(sets):
    weights, options = (0.5, 0.2, 0.3), {"random_length_every": 5}
    whole = [open_data(sets, weights, **options).batch(step, range(BATCH)) for step in range(40)]
    other = open_data(sets, weights, **options)
    for step in np.random.default_rng(0).permutation(40):  # any order, as if the hosts were laid out differently
        for rows in ([6, 1], [0], np.arange(2, 6), [7]):
            part = other.batch(step, rows)
            for key, values in part.items():
                assert (values == whole[step][key][np.asarray(rows)]).all()
    different = open_data(sets, weights, seed=4, **options)
    assert any((different.batch(s, range(BATCH))["tokens"] != whole[s]["tokens"]).any() for s in range(3))


def test_batch_size_cuts_the_same_order(sets):
    """Row i of step s is row s * batch_size + i of the run."""
    small, large = open_data(sets, batch_size=4), open_data(sets, batch_size=12)
    for n in range(48):
        a = small.batch(n // 4, [n % 4])["tokens"]
        assert (a == large.batch(n // 12, [n % 12])["tokens"]).all()


@pytest.mark.parametrize("which", [[0], [0, 1, 2]])
def test_each_epoch_has_each_row_once_in_another_order(sets, which):
    paths = [sets[i] for i in which]
    expected = as_counter(np.concatenate([all_rows(path) for path in paths]))
    assert len(expected) == sum(expected.values())  # all rows differ, so each count identifies one row
    data, size = open_data(paths), sum(expected.values())
    epochs = [take(data, size, start=epoch * size)[0] for epoch in range(3)]
    for tokens in epochs:
        assert as_counter(tokens) == expected
    assert (epochs[0] != epochs[1]).any(axis=1).mean() > 0.9
    assert (epochs[1] != epochs[2]).any(axis=1).mean() > 0.9


def test_seeds_do_not_share_epochs(sets):
    """Grain adds 1 to the seed for each epoch; still, seed 4 must not begin with the second epoch of seed 3."""
    size = len(all_rows(sets[0]))
    second, _ = take(open_data(sets[:1], seed=3), size, start=size)
    first, _ = take(open_data(sets[:1], seed=4), size)
    assert (first != second).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 + 5, 2**70])
def test_any_seed(sets, seed):
    assert open_data(sets, seed=seed, random_length_every=2).batch(10**9, [0])["tokens"].shape == (1, T)


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 0, 3), (1e-3, 1.0, 0.5)])
def test_mixture_proportions_are_exact(sets, weights):
    owner = {row.tobytes(): i for i, path in enumerate(sets) for row in all_rows(path)}
    tokens, _ = take(open_data(sets, weights), 2000)
    counts = np.bincount([owner[row.tobytes()] for row in tokens], minlength=3)
    assert np.abs(counts - 2000 * np.array(weights) / sum(weights)).max() <= 2
    window = np.bincount([owner[row.tobytes()] for row in tokens[777:877]], minlength=3)
    assert np.abs(window - 100 * np.array(weights) / sum(weights)).max() <= 3  # the sets are spread evenly


def test_selection_in_closed_form():
    for proportions in ((7, 2, 1), (1,), (0, 3, 5), (1, 2000)):
        seen = [0] * len(proportions)
        for n in range(3 * sum(proportions)):
            which, place = pipeline._select(n, proportions)
            assert place == seen[which]  # every place comes exactly once
            seen[which] += 1
            if (n + 1) % sum(proportions) == 0:
                assert seen == [(n + 1) // sum(proportions) * p for p in proportions]
    assert pipeline._select(10**15, (7, 3)) == (0, 7 * 10**14)
    assert pipeline._integer_proportions((0.7, 0.3)) == (7, 3)


def test_one_random_length_per_block(sets):
    every, blocks = 5, 1200
    data = open_data(sets[:1], random_length_every=every)
    plain, full = take(open_data(sets[:1]), every * blocks)
    tokens, lengths = take(data, every * blocks)
    # A random length of T changes nothing, and the last row of the set may be short in any case. The expected lengths
    # are therefore computed from the drawn ones.
    drawn = [data._random_length(block) for block in range(blocks)]
    expected = full.copy()
    for block, (offset, length) in enumerate(drawn):
        n = block * every + offset
        expected[n] = min(full[n], length)
    assert (lengths == expected).all()
    assert ((lengths != full).reshape(blocks, every).sum(axis=1) <= 1).all()
    inside = np.arange(T) < lengths[:, None]
    assert (tokens == np.where(inside, plain, data.eos_id)).all()
    offsets, drawn_lengths = np.array(drawn).T
    for values, count in ((offsets, every), (drawn_lengths - 1, T)):
        histogram = np.bincount(values, minlength=count)
        assert len(histogram) == count
        chi2 = ((histogram - blocks / count) ** 2 / (blocks / count)).sum()
        assert chi2 < count + 5 * np.sqrt(2 * count)
    assert (lengths == T).mean() > 0.75


def test_random_lengths_do_not_depend_on_numpy_distributions(sets):
    """A resumed run draws the lengths again, so the drawn values must never change."""
    data = open_data(sets[:1], seed=0, random_length_every=100)
    assert [data._random_length(block) for block in (0, 1, 10**12)] == [(10, 17), (74, 3), (56, 11)]


def test_iterate_equals_batch(sets):
    data = open_data(sets, random_length_every=3)
    for prefetch, threads in ((0, 1), (1, 1), (4, 3)):
        batches = data.iterate(17, [1, 5], prefetch=prefetch, threads=threads)
        for expected_step in range(17, 29):
            step, batch = next(batches)
            assert step == expected_step
            for key, values in data.batch(step, [1, 5]).items():
                assert (values == batch[key]).all()
        batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("data")]


def test_iterate_reads_ahead_within_bounds(sets, monkeypatch):
    data, read = open_data(sets), []
    original = data.batch
    monkeypatch.setattr(data, "batch", lambda step, rows: read.append(step) or original(step, rows))
    batches = data.iterate(0, [0], prefetch=3, threads=1)
    next(batches)
    for _ in range(100):
        if len(read) >= 4:
            break
        threading.Event().wait(0.02)
    assert read == [0, 1, 2, 3]  # the batch that was handed out and three more
    batches.close()


def test_iterate_raises_in_the_consumer_at_its_step(sets, monkeypatch):
    data = open_data(sets)
    original = data.batch

    def fail_at_3(step, rows):
        if step == 3:
            raise UserError("row 3 is bad")
        return original(step, rows)

    monkeypatch.setattr(data, "batch", fail_at_3)
    batches = data.iterate(0, [0], prefetch=4, threads=2)
    assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="row 3 is bad"):
        next(batches)


def test_interpreter_ends_with_an_open_iterator(sets):
    script = (
        "from llada_jax.data.read.pipeline import TrainingData\n"
        f"data = TrainingData([{sets[0]!r}], seed=0, batch_size=8, sequence_length={T}, random_length_every=0,"
        f" vocab_size={VOCAB})\n"
        "batches = data.iterate(0, range(8), prefetch=8, threads=2)\n"
        "print(next(batches)[0])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr


def test_validation_rows_are_fixed_and_from_all_sets(sets):
    held_out = [all_rows(path, "validation") for path in sets]
    total = sum(map(len, held_out))
    tokens, length, prompt, bytes_ = validation_rows(sets, 10**6, T, VOCAB)
    assert tokens.shape == (total, T) and not prompt.any()
    assert (tokens.dtype, length.dtype, bytes_.dtype) == (np.int32, np.int32, np.int64)
    assert as_counter(tokens) == as_counter(np.concatenate(held_out))
    assert [tokens[i].tolist() for i in range(3)] == [rows[0].tolist() for rows in held_out]
    manifests = [load_manifest(path) for path in sets]
    assert length.sum() == sum(m.validation.tokens for m in manifests)
    assert bytes_.sum() == sum(m.validation.bytes for m in manifests)
    fewer = validation_rows(sets, 5, T, VOCAB)
    for some, every in zip(fewer, (tokens, length, prompt, bytes_), strict=True):
        assert (some == every[:5]).all()
    assert validation_rows(sets, 0, T, VOCAB)[0].shape == (0, T)


def test_settings_that_cannot_be(sets, tokenizer_folder, tmp_path):
    from llada_jax.text.train_tokenizer import train_tokenizer

    for paths, weights, options, words in (
        ([], (), {}, "no prepared set"),
        ([str(tmp_path)], (), {}, "not a prepared set"),
        (sets, (1.0,), {}, "1 values for 3 sets"),
        (sets, (1.0, -1.0, 1.0), {}, "at least 0"),
        (sets, (0.0, 0.0, 0.0), {}, "not all 0"),
        (sets, (1.0, float("nan"), 1.0), {}, "at least 0"),
        (sets, (), {"sequence_length": 64}, "sequence length of 32, but sequence_length is 64"),
        (sets, (), {"vocab_size": 384}, "model.vocab_size=512"),
    ):
        with pytest.raises(UserError, match=words) as error:
            open_data(paths, weights, **options)
        assert "\n" not in str(error.value)
    train_tokenizer([story(5)] * 2, 300, tmp_path / "other")
    other = make_set(tmp_path / "b", str(tmp_path / "other"), range(20))
    with pytest.raises(UserError, match="different tokenizers"):
        open_data([sets[0], other])
    with pytest.raises(UserError, match="different tokenizers"):
        validation_rows([sets[0], other], 4, T, VOCAB)


def test_shards_that_are_not_whole(sets, tmp_path):
    def copy(name):
        shutil.copytree(sets[0], tmp_path / name)
        shard = tmp_path / name / "train-00001.arrayrecord"
        return str(tmp_path / name), shard, shard.read_bytes()

    path, shard, _ = copy("missing")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.arrayrecord is missing"):
        open_data([path])

    path, shard, content = copy("short")
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"train-00001.arrayrecord is cut short") as error:
        open_data([path])
    assert "\n" not in str(error.value)

    path, shard, content = copy("zeros")
    shard.write_bytes(b"\0" * len(content))
    with pytest.raises(UserError, match=r"train-00001.arrayrecord is damaged"):
        open_data([path])

    path, shard, content = copy("flipped")
    middle = 2000  # this place is among the records; the end of a small shard is padding
    shard.write_bytes(
        content[:middle] + bytes(255 - b for b in content[middle : middle + 200]) + content[middle + 200 :]
    )
    data = open_data([path])
    with pytest.raises(UserError, match=r"train-00001.arrayrecord, row \d+, is damaged") as error:
        take(data, len(all_rows(sets[0])))
    assert "\n" not in str(error.value)


def test_id_that_the_model_does_not_have(sets, tmp_path):
    """A shard may hold ids that the tokenizer described in the manifest does not have."""
    import dataclasses
    import json

    shutil.copytree(sets[0], tmp_path / "set")
    manifest = load_manifest(sets[0])
    for shard in manifest.train.shards:
        (tmp_path / "set" / shard.name).unlink()
    writer = SplitWriter(tmp_path / "set", "train", T, "uint16", manifest.eos_id, 2)
    ids = np.full(6 * T, 5, np.uint32)
    ids[3 * T + 4] = VOCAB
    writer.add(ids, np.ones_like(ids))
    bad = dataclasses.replace(manifest, train=writer.finish())
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(dataclasses.asdict(bad)))
    data = open_data([str(tmp_path / "set")])
    with pytest.raises(UserError, match=r"train-00001.arrayrecord, row 1, holds the token id 512.*ends at 512"):
        take(data, 6)
