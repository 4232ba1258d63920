"""Fixtures with the training runs that several tests share."""

import shutil
import time
from pathlib import Path

import pytest
import tiny
from bucket import hurry
from runs import train_on

from llada_jax.cli import entry_point
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.formats import workdir
from llada_jax.storage import lease, retries


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "set"
    prepare([corpus], folder, train_tokenizer=320, sequence_length=32, workers=1, progress=False)
    return str(folder)


@pytest.fixture(scope="session")
def run(prepared):
    """Returns the function run(folder, devices=1, **settings), which trains in this process and returns the exit code.

    A setting config.a.b=value is passed as a__b=value.
    """

    def run_it(folder, devices: int = 1, **settings) -> int:
        config = tiny.get_config()
        config.data.path = prepared
        for name, value in settings.items():
            *groups, leaf = name.split("__")
            node = config
            for group in groups:
                node = getattr(node, group)
            assert hasattr(node, leaf)
            setattr(node, leaf, value)

        return train_on(devices, config, folder)

    return run_it


@pytest.fixture(scope="session")
def reference(run, tmp_path_factory):
    """Returns the workdir of a run without any interruption. Do not change it."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert run(folder, checkpoint__keep=5) == entry_point.FINISHED
    return folder


@pytest.fixture
def copy(reference, tmp_path):
    """Returns copied(step), which copies the uninterrupted run as if it had been killed after checkpoint `step`."""

    def copied(step: int) -> Path:
        folder = tmp_path / f"copy_{step}"
        shutil.copytree(reference, folder)
        for later in workdir.steps_in(folder):
            if later > step:
                shutil.rmtree(folder / "checkpoints" / str(later))
        return folder

    return copied


@pytest.fixture(scope="session")
def outside(corpus, tmp_path_factory):
    """Returns (folder, seconds): the workdir of an uninterrupted run in its own process, and the time that it took.

    The time includes preparing the text.
    """
    folder = tmp_path_factory.mktemp("outside") / "run"
    started = time.monotonic()
    process = tiny.start(["-m", "llada_jax.train", *tiny.command(folder, f"data.input={corpus}")])
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    return folder, time.monotonic() - started


@pytest.fixture
def place(bucket, monkeypatch, tmp_path) -> str:
    """Returns the address of a workdir. Failed requests are repeated soon, and leases live for a few seconds."""
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "POLICY", retries.Policy(first_wait=0.02, longest_wait=0.1))
    hurry(monkeypatch)
    monkeypatch.setattr(lease, "SECONDS", 6.0)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 1.0)
    return f"{bucket.url}/runs/one"
