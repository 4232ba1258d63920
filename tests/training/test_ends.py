"""Tests workdirs that do not fit, full disks, non-finite steps, profiles, and what a run leaves behind."""

import contextlib
import dataclasses
import json
import resource
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import assert_same_run, record_of, state_of, terminate, when_done

from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.devices import mesh as meshes
from llada_jax.diffusion import forward
from llada_jax.formats import workdir
from llada_jax.training import loop, metrics, start


def test_text_prepared_in_the_workdir(run, corpus, tmp_path):
    folder, other = tmp_path / "run", Path(corpus).with_name("other.jsonl")
    other.write_text(Path(corpus).read_text())
    base = {"data__path": "", "data__input": corpus, "steps": 2, "validation__rows": 0}
    run(folder, **base)
    cases = [
        ({"data__input": str(other)}, "config.data.input is .*other.jsonl, but .* was prepared with .*corpus.jsonl"),
        ({"data__train_tokenizer": 300}, "config.data.train_tokenizer is 300, but .* was prepared with 320"),
        ({"data__validation_fraction": 0.1}, "config.data.validation_fraction is 0.1, but .* prepared with 0.02"),
        ({"sequence_length": 64}, "config.sequence_length is 64, but .* was trained with 32: take another --workdir"),
    ]
    before = workdir.steps_in(folder)
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            run(folder, **{**base, **settings, "steps": 3})
    assert workdir.steps_in(folder) == before
    # data.tokenizer may be another path, if it leads to the tokenizer that the run was trained with.
    with pytest.raises(UserError, match="there is no tokenizer at"):
        run(folder, **base, data__tokenizer=str(tmp_path / "nowhere"))
    assert run(folder, **base, data__tokenizer=str(folder / "tokenizer")) == 0
    # If the prepared set is gone, another text is refused before it is prepared.
    shutil.rmtree(folder / "data")
    with pytest.raises(UserError, match="config.data.input is .*other.jsonl, but .* was trained on .*corpus.jsonl"):
        run(folder, **{**base, "data__input": str(other)})
    assert not (folder / "data").exists()
    assert run(folder, **base) == 0  # preparing the same text again gives the same set


@pytest.mark.slow
def test_before_the_first_checkpoint_nothing_binds(run, tmp_path, prepared, corpus):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    prepare([corpus], tmp_path / "tokens", train_tokenizer=330, sequence_length=32, workers=1, progress=False)
    with when_done(2, stop), pytest.raises(Stop):
        run(tmp_path / "run", seed=3)
    assert (tmp_path / "run" / "config.json").exists()
    assert run(tmp_path / "run", data__path=str(tmp_path / "tokens"), seed=4, steps=3, batch_size=4) == 0
    kept, wanted = (path.read_bytes() for path in (
        tmp_path / "run" / "tokenizer" / "tokenizer.model", tmp_path / "tokens" / "tokenizer" / "tokenizer.model"
    ))  # fmt: skip
    assert kept == wanted


def test_checkpoints_without_a_config(run, copy):
    folder = copy(5)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has checkpoints but no config.json"):
        run(folder)


# A workdir has one owner and must be writable


def test_a_second_process_is_refused(run, reference, prepared, tmp_path):
    folder = tmp_path / "run"
    codes = []

    def second():
        process = tiny.start(["-m", "llada_jax.train", *tiny.command(folder, f"data.path={prepared}")])
        codes.append((process.communicate()[1].strip(), process.returncode))

    with when_done(8, second):
        assert run(folder, checkpoint__keep=5) == 0
    assert codes == [(f"error: --workdir={folder} is in use by another process", entry_point.USER_ERROR)]
    assert_same_run(folder, reference)


def test_a_workdir_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file/run cannot be written"):
        run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="--workdir=az://bucket/run: models and runs can lie in gs:// and s3:// only"):
        run("az://bucket/run")


def test_a_full_disk_ends_the_run_and_it_goes_on_later(run, reference, tmp_path, capfd):
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk():
        while workdir.steps_in(folder) != [5, 10]:  # until checkpoint 10 is complete
            time.sleep(0.01)
        # The limit is too small for a checkpoint and large enough for metrics.jsonl.
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))

    try:
        with when_done(13, fill_disk):
            assert run(folder, checkpoint__keep=5) == entry_point.FAILURE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capfd.readouterr().err
    assert "stopped: a checkpoint could not be written to" in errors and "Traceback" not in errors
    assert workdir.steps_in(folder) == [5, 10]
    assert run(folder, checkpoint__keep=5) == 0
    assert_same_run(folder, reference)


# Steps that are not finite


@contextlib.contextmanager
def poisoned(first: int, last: int):
    """Makes the loss of the steps first..last, counted from 1, NaN while the context is active.

    The rows of these steps are marked with an impossible length.
    """
    place, step, pretrain = meshes.place_batch, loop.Loop._step, forward.OBJECTIVES["pretrain"]
    now = []

    def noted_step(self, *args):
        now[:] = [self.done + 1]
        return step(self, *args)

    def marked(batch, mesh, batch_size):
        if first <= now[0] <= last:
            batch = {**batch, "length": batch["length"] + 1000}
        return place(batch, mesh, batch_size)

    def objective(key, batch, *rest):
        length_B = batch["length"]
        noisy = pretrain(key, {**batch, "length": length_B % 1000}, *rest)
        return noisy._replace(weight_BT=jnp.where(length_B[:, None] > 1000, jnp.nan, noisy.weight_BT))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", noted_step)
        patch.setattr(loop.mesh, "place_batch", marked)
        patch.setitem(forward.OBJECTIVES, "pretrain", objective)
        yield


def test_steps_that_are_not_finite_end_the_run(run, tmp_path, capfd):
    settings = {"optimizer__max_nonfinite": 6, "checkpoint__every": 2, "checkpoint__keep": 9}
    with poisoned(8, 99):
        assert run(tmp_path, **settings) == entry_point.FAILURE
    errors = capfd.readouterr().err
    assert "stopped: loss or gradients were not finite in 6 steps in a row, up to step 13" in errors
    assert [(r["step"], r["skipped"]) for r in tiny.records(tmp_path) if "skipped" in r] == [
        (3, 0), (6, 0), (9, 2), (12, 3)
    ]  # fmt: skip
    assert tiny.records(tmp_path)[-1]["loss"] is None  # no step since the last log line was finite
    assert workdir.steps_in(tmp_path) == [2, 4, 6, 8, 10, 12]
    seven = {name: value for name, value in state_of(tmp_path, 8).items() if name != ".step"}
    for step in (10, 12):
        for name, value in state_of(tmp_path, step).items():
            assert np.isfinite(value).all()
            assert name == ".step" or value.tobytes() == seven[name].tobytes()
    # The count of skipped steps continues after a restart.
    assert record_of(tmp_path, 12)["skipped_in_a_row"] == 5
    with poisoned(8, 99):
        assert run(tmp_path, **settings) == entry_point.FAILURE
    assert "in 6 steps in a row, up to step 13" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["validation", "samples"])
def test_an_output_that_is_not_finite_ends_the_run(run, tmp_path, capfd, monkeypatch, what):
    """The steps with these weights are skipped too, but long before ten of them a validation or a sample is due."""
    make = start.make_state

    def make_spoiled(*args):
        state = make(*args)
        head = np.array(state.params["head"])
        head[0, 5] = np.nan
        head = jax.device_put(head, state.params["head"].sharding)
        return dataclasses.replace(state, params=state.params | {"head": head})

    monkeypatch.setattr(start, "make_state", make_spoiled)
    rows = 8 if what == "validation" else 0
    settings = {"validation__rows": rows, "checkpoint__every": 100, "sampling__every": 3 if not rows else 100}
    assert run(tmp_path, **settings) == entry_point.FAILURE
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("stopped: ")]
    assert line.startswith(f"stopped: {what} at step {7 if rows else 3}: the model's output is not finite")
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() and workdir.steps_in(tmp_path) == []
    assert not (tmp_path / "samples.txt").exists()


def test_a_few_steps_that_are_not_finite_are_skipped(run, tmp_path):
    with poisoned(8, 10):
        assert run(tmp_path, optimizer__max_nonfinite=4) == 0
    assert {r["step"]: r["skipped"] for r in tiny.records(tmp_path) if "skipped" in r}[9] == 2
    assert tiny.records(tmp_path)[-1]["step"] == 20 and tiny.records(tmp_path)[-1]["loss"] < 6


def test_an_absurd_learning_rate_leaves_nothing_but_finite_numbers(run, tmp_path):
    settings = {"optimizer__peak_learning_rate": 1e30, "optimizer__schedule": ((0, 1.0),), "checkpoint__every": 1}
    assert run(tmp_path, optimizer__max_nonfinite=3, checkpoint__keep=20, **settings) == entry_point.FAILURE
    for step in workdir.steps_in(tmp_path):
        assert all(np.isfinite(value).all() for value in state_of(tmp_path, step).values())


# Transfers between host and device


def test_nothing_crosses_unasked(run, tmp_path, monkeypatch):
    place = meshes.place_batch

    def careless(*args):
        batch = place(*args)
        return {**batch, "length": batch["length"] + np.int32(0)}

    monkeypatch.setattr(loop.mesh, "place_batch", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path)


def test_the_host_stays_one_step_behind(run, tmp_path, monkeypatch):
    dispatched, looks = [], []
    make, fetch = loop.make_train_step, metrics.fetch

    def make_noting(*args):
        step = make(*args)

        def noting(*args):
            dispatched.append(None)
            return step(*args)

        return noting

    def note_fetch(values):
        looks.append(len(dispatched))
        return fetch(values)

    monkeypatch.setattr(loop, "make_train_step", make_noting)
    monkeypatch.setattr(loop.metrics, "fetch", note_fetch)
    assert run(tmp_path, logging__every=1, validation__rows=0, sampling__every=0, checkpoint__every=5) == 0
    # The metrics of step s are fetched after step s + 1 was dispatched, except for steps that save a checkpoint.
    assert looks == [s if s % 5 == 0 else s + 1 for s in range(1, 21)]


# Profiles


@pytest.mark.parametrize("stop, first, count", [(None, 3, 2), (None, 18, 9), (5, 3, 9)])
def test_a_profile_is_closed_whatever_happens(run, tmp_path, capfd, stop, first, count):
    with when_done(stop, terminate) if stop else contextlib.nullcontext():
        code = run(tmp_path, profile__first_step=first, profile__steps=count, validation__rows=0)
    assert code == (entry_point.PREEMPTED if stop else 0)
    last = min(first + count, stop or 20)
    assert f"profile from step {first} to {last} in" in capfd.readouterr().err
    assert [file.stat().st_size > 1000 for file in tmp_path.rglob("*.xplane.pb")] == [True]


def test_a_profile_that_is_over_before_the_start(run, copy, capfd):
    assert run(copy(15), profile__first_step=3, profile__steps=2) == 0
    assert "no profile: config.profile.first_step=3 lies before step 15" in capfd.readouterr().err


# What is left behind


def test_nothing_is_left_running(run, tmp_path):
    assert run(tmp_path, steps=3) == 0
    names = [thread.name for thread in threading.enumerate() if "save" in thread.name or "data" in thread.name]
    assert names == []


def test_a_workdir_is_self_contained(reference):
    starts = [json.loads(line) for line in (reference / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0]
    config, identity = workdir.read_config(reference)
    assert config.model.vocab_size == 384 and config.model.mask_id is not None
    assert identity["tokenizer"] and identity["data"]
    assert (reference / "tokenizer" / "tokenizer.model").exists()
    assert (reference / "samples.txt").read_text().startswith("--- step 9\n")
