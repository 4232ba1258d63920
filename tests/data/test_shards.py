"""Tests sets of many shards: few readers are open at a time, and what the machine does not allow is no damage."""

import errno
import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import PYTHONPATH

from llada_jax.config import UserError
from llada_jax.data.read import shards

from .test_pipeline import BATCH, all_rows, as_counter, make_set, open_data, take


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few_files():
    """Returns allow(more), which lets this process have so many more open files than now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more: int) -> None:
        limit = os.dup(0)  # the lowest free number
        os.close(limit)
        used = set(map(int, os.listdir("/proc/self/fd")))
        while more:  # the limit is one on the numbers of files, among which there are gaps
            more -= limit not in used
            limit += 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def sets(tmp_path_factory, tokenizer_folder) -> list[str]:
    """Returns two sets, each of about 60 shards of one row."""
    folder = tmp_path_factory.mktemp("many")
    made = [make_set(folder / str(i), tokenizer_folder, range(30 * i, 30 * i + 30), shard_rows=1) for i in range(2)]
    assert all(len(list(Path(path).glob("train-*"))) > 40 for path in made)
    return made


def test_a_mixture_reads_all_rows_with_few_open_files(sets, monkeypatch, few_files):
    rows = [all_rows(path) for path in sets]
    total = sum(map(len, rows))
    monkeypatch.setattr(shards, "most_open", lambda: 5)
    few_files(5 + shards._OPEN_THREADS)
    gc.collect()  # otherwise files that earlier tests left open may be closed in between
    before = open_files()
    data = open_data(sets)
    assert open_files() == before, "readers are opened when a row is read"
    tokens, _ = take(data, total)
    assert as_counter(tokens) == as_counter(np.concatenate(rows))
    assert open_files() - before == 5
    for step, batch in data.iterate(0, range(BATCH), threads=4):
        np.testing.assert_array_equal(batch["tokens"], data.batch(step, range(BATCH))["tokens"])
        if step == 6:
            break
    del data, batch
    gc.collect()  # TrainingData and its cache refer to each other
    assert open_files() <= before, "the readers of sets that are no longer used are closed"


def test_how_many_readers_may_be_open(monkeypatch):
    for limit, most in ((256, 128), (1, 1), (10**6, 1024), (resource.RLIM_INFINITY, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert shards.most_open() == most


def test_too_many_open_files_are_no_damage(sets, few_files):
    data = open_data(sets[:1])
    few_files(0)
    with pytest.raises(OSError) as error:
        data.batch(0, range(BATCH))
    assert error.value.errno == errno.EMFILE
    with pytest.raises(OSError) as error:
        open_data(sets[:1])
    assert error.value.errno == errno.EMFILE


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOMEM, errno.ESTALE])
def test_an_error_of_the_machine_while_reading_is_no_damage(sets, monkeypatch, code):
    class Reader:
        def read(self, places):
            raise RuntimeError(f"INTERNAL: pread() failed: {os.strerror(code)} [errno {code}]")

    data = open_data(sets[:1])
    monkeypatch.setattr(shards, "_opened", lambda file: Reader())
    with pytest.raises(OSError) as error:
        data.batch(0, range(BATCH))
    assert error.value.errno == code and error.value.filename.endswith(".arrayrecord")


def test_a_shard_that_is_removed_while_it_is_used(sets, tmp_path, tokenizer_folder):
    path = make_set(tmp_path / "set", tokenizer_folder, range(10), shard_rows=2)
    data = open_data([path])
    for file in Path(path).glob("train-*"):
        file.unlink()
    with pytest.raises(UserError, match=r"train-\d+.arrayrecord is missing: copy the whole folder"):
        data.batch(0, range(BATCH))


@pytest.mark.slow
def test_399_shards_under_a_limit_of_256_files(tmp_path, tokenizer_folder):
    path = make_set(tmp_path / "set", tokenizer_folder, range(300), shard_rows=1)
    assert len(list(Path(path).glob("train-*"))) >= 399
    program = f"""
from llada_jax.data.read.pipeline import TrainingData
data = TrainingData([{path!r}], seed=0, batch_size=8, sequence_length=32, random_length_every=0, vocab_size=512)
for step, _ in data.iterate(0, range(8), threads=4):
    if step == 110:
        break
"""
    command = ["bash", "-c", 'ulimit -n 256; exec "$0" "$@"', sys.executable, "-c", program]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": PYTHONPATH}, check=True)
