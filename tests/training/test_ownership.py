"""Tests that a workdir has one owner at a time, and that it gets a record of every start and the tokenizer."""

import dataclasses
import fcntl
import json
import subprocess
import sys

import jax
import pytest

from llada_jax.config import Config, UserError
from llada_jax.training import ownership


def test_only_one_owner(tmp_path):
    folder = tmp_path / "runs" / "one"
    with ownership.locked(folder):
        assert folder.is_dir()
        with pytest.raises(UserError, match=r"--workdir=.*one is in use"), ownership.locked(folder):
            pass
    with ownership.locked(folder):  # free again
        pass


def test_the_lock_ends_with_its_process(tmp_path):
    """The lock is released even if its process is killed with kill -9, so nobody has to clean up by hand."""
    program = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="in use"), ownership.locked(tmp_path):
            pass
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    with ownership.locked(tmp_path):
        pass


def test_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), ownership.locked(tmp_path):
        raise KeyError
    with ownership.locked(tmp_path):
        pass


def test_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--workdir=.* cannot be written: "), ownership.locked(folder):
            pass


def test_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with ownership.locked(tmp_path):
        pass


def test_record_of_each_start(tmp_path):
    config = dataclasses.replace(Config(), steps=7)
    ownership.record_start(tmp_path, config, 0)
    ownership.record_start(tmp_path, config, 5)
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 5)
    assert first["config"]["steps"] == 7 and first["command"] == sys.argv
    assert first["versions"]["jax"] and first["versions"]["python"].startswith("3.")
    assert first["hardware"]["devices"] == jax.device_count() and first["hardware"]["processes"] == 1
    assert "device_count=8" in first["xla_flags"]
    assert first["commit"] is None or len(first["commit"].split("-")[0]) == 40


def test_tokenizer_is_copied_whole_or_not_at_all(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir(), run.mkdir()
    (source / "tokenizer.model").write_bytes(b"abc")
    (run / "tokenizer.tmp").mkdir()  # left by a start that was killed
    (run / "tokenizer.tmp" / "half").write_bytes(b"a")
    ownership.keep_tokenizer(run, source)
    assert [p.name for p in run.iterdir()] == ["tokenizer"]
    assert [(p.name, p.read_bytes()) for p in (run / "tokenizer").iterdir()] == [("tokenizer.model", b"abc")]
    kept = (run / "tokenizer").stat().st_ino
    ownership.keep_tokenizer(run, source)  # does not copy it a second time
    assert (run / "tokenizer").stat().st_ino == kept
    (source / "tokenizer.model").write_bytes(b"other")
    ownership.keep_tokenizer(run, source)
    assert [p.name for p in run.iterdir()] == ["tokenizer"]
    assert (run / "tokenizer" / "tokenizer.model").read_bytes() == b"other"
