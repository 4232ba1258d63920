"""Tests that a run that was killed, stopped or damaged continues exactly as if nothing had happened, on any mesh."""

import contextlib
import os
import random
import re
import shutil
import signal
import time

import pytest
import rounding
import tiny
from paths import SUPPORT
from runs import assert_same_run, record_of, terminate, wait_for, when_done

from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.formats import workdir
from llada_jax.training import goodput

ONE_MOMENT = (["saving", "20"],)
ALL_MOMENTS = (["publish"], ["config"], ["dispatched", "4"], ["saving", "5"], ["written", "14"], ["saving", "20"])


@pytest.mark.parametrize("moments", [ONE_MOMENT, pytest.param(ALL_MOMENTS, marks=pytest.mark.slow)], ids=["one", "all"])
def test_killed_at_chosen_moments_the_run_is_the_same(outside, corpus, tmp_path, moments):
    folder = tmp_path / "run"
    flags = tiny.command(folder, f"data.input={corpus}")
    for point in moments:
        process = tiny.start([str(SUPPORT / "dying.py"), *point, "--", *flags])
        errors = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, (point, errors)
        if point == ["publish"]:
            assert not (folder / "data").exists() and list(folder.glob(".data.preparing-*"))
        elif point == ["config"]:
            assert (folder / "data").exists() and not (folder / "config.json").exists()
        elif point[0] == "saving":
            assert list((folder / "checkpoints").glob(f"{point[1]}.*tmp*")), "it was not killed while saving"
            assert int(point[1]) not in workdir.steps_in(folder)
    process = tiny.start(["-m", "llada_jax.train", *flags])
    errors = process.communicate()[1]
    assert process.returncode == 0 and f"resuming {folder} at step 15" in errors, errors
    assert_same_run(folder, outside[0])
    left = [path.name for path in [*folder.iterdir(), *(folder / "checkpoints").iterdir()]]
    assert not [name for name in left if "tmp" in name or "preparing" in name]


@pytest.mark.slow
def test_killed_three_times_at_random_the_run_is_the_same(outside, corpus, tmp_path):
    folder, delays = tmp_path / "run", []
    shutil.copytree(outside[0] / "data", folder / "data")
    flags = ["-m", "llada_jax.train", *tiny.command(folder, f"data.input={corpus}")]
    for _ in range(3):
        process = tiny.start(flags)
        delays.append(random.uniform(0.2, 1.0) * outside[1])
        time.sleep(delays[-1])
        process.kill()
        process.communicate()
    process = tiny.start(flags)
    errors = process.communicate()[1]
    assert process.returncode == 0, (delays, errors)
    assert_same_run(folder, outside[0])


def test_the_last_line_is_torn_and_steps_are_beyond_the_checkpoint(run, copy, reference):
    folder = copy(10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    with (folder / "samples.txt").open("a") as file:
        file.write("--- step 99\nsamples of another future\n")
    assert run(folder, checkpoint__keep=5) == 0
    assert_same_run(folder, reference)
    written = [record["step"] for record in tiny.records(folder)]
    assert written == sorted(set(written)) == [3, 6, 7, 9, 12, 14, 15, 18, 20]
    earlier = goodput.read_lines(folder / "starts.jsonl")[1]["earlier"]
    assert earlier["start"]["step"] == 20 and 0 < earlier["seconds"]["redone"] < earlier["start"]["seconds"]["train"]
    assert goodput.read_lines(folder / "metrics.jsonl")[-1]["goodput/redone"] == earlier["seconds"]["redone"]


def test_a_finished_run_is_finished(run, copy, reference, capfd):
    folder = copy(20)
    assert run(folder, checkpoint__keep=5) == 0
    assert "is finished: nothing to train up to step 20" in capfd.readouterr().err
    assert_same_run(folder, reference)
    assert run(folder, steps=22) == 0  # with more steps the run continues
    errors = capfd.readouterr().err
    assert "  config.steps: 20 -> 22\n" in errors
    assert "  the learning rate of step 21 stays 3.00e-04; " in errors  # the positions of the schedule are steps
    assert tiny.records(folder)[-1]["step"] == 22 and workdir.steps_in(folder) == [20, 22]


def test_what_was_logged_is_the_mean_since_the_last_line(run, tmp_path, reference):
    # A logged loss is the mean over all steps since the last log line, also over those before a checkpoint was saved.
    every = tmp_path / "every"
    assert run(every, logging__every=1) == 0
    losses = {record["step"]: record["loss"] for record in tiny.records(every)}
    for record in tiny.records(reference):
        if record["step"] in (3, 6, 9, 12, 15, 18):
            assert record["loss"] == sum(losses[record["step"] - i] for i in (2, 1, 0)) / 3
    assert record_of(reference, 5)["window"]["steps"] == 2  # checkpoint 5 has the sums of steps 4 and 5


# SIGTERM


@pytest.mark.parametrize("step", [1, 5, *(pytest.param(step, marks=pytest.mark.slow) for step in (6, 13))])
def test_sigterm_saves_and_the_run_goes_on(run, reference, tmp_path, step):
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with when_done(step, terminate):
        assert run(folder, checkpoint__keep=5) == entry_point.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert workdir.steps_in(folder)[-1] == step
    assert run(folder, checkpoint__keep=9) == 0
    assert_same_run(folder, reference)


def test_sigterm_at_the_end_changes_nothing(run, reference, tmp_path):
    with when_done(20, terminate):
        assert run(tmp_path, checkpoint__keep=5) == 0
    assert_same_run(tmp_path, reference)


def test_sigterm_to_a_process(prepared, tmp_path):
    folder = tmp_path / "run"
    flags = ["-m", "llada_jax.train", *tiny.command(folder, f"data.path={prepared}", "steps=1000000")]
    process = tiny.start(flags)
    wait_for(process, "compiling the train step")  # there is nothing to save yet, so SIGTERM ends the process at once
    process.terminate()
    process.communicate()
    assert process.returncode == -signal.SIGTERM and workdir.steps_in(folder) == []
    process = tiny.start(flags)
    wait_for(process, "step      12/1000000")
    process.terminate()
    errors = process.communicate()[1]
    assert process.returncode == entry_point.PREEMPTED, errors
    step = workdir.steps_in(folder)[-1]
    assert errors.rstrip().endswith(f"stopped by SIGTERM: saved step {step}; the same command goes on from there")
    assert tiny.records(folder)[-1]["step"] <= step


# Other meshes

# The tests share these settings, and thereby their compiled programs.
ON_FOUR = {"mesh__fsdp": 2, "mesh__tensor": 2}
ON_EIGHT = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "accumulation": 2}


@pytest.mark.slow
def test_another_mesh_sees_the_same_rows_and_the_same_noise(run, reference, tmp_path, capfd):
    folder = tmp_path / "run"
    first_rows = {}
    for stop, devices, settings in ((5, 1, {}), (10, 4, ON_FOUR), (20, 8, ON_EIGHT)):
        with when_done(stop, terminate) if stop < 20 else contextlib.nullcontext():
            code = run(folder, devices, checkpoint__keep=5, **settings)
        assert code == (entry_point.PREEMPTED if stop < 20 else 0)
        first_rows |= dict(re.findall(r"first row of step (\d+): (.*\n.*\n.*\n)", capfd.readouterr().err))
    assert first_rows.keys() == {"0", "5", "10"}
    for step in (5, 10, 15, 20):
        ours, theirs = record_of(folder, step)["window"], record_of(reference, step)["window"]
        for exact in ("steps", "tokens", "bucket_tokens", "skipped"):  # these depend on the rows and the noise alone
            assert ours[exact] == theirs[exact], (step, exact)
    for ours, theirs in zip(tiny.records(folder), tiny.records(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=rounding.LATER_STEPS), (ours["step"], name)
    for step in (5, 10):  # a run on one device that resumes there shows the same first row
        shutil.copytree(reference, tmp_path / str(step))
        for later in workdir.steps_in(reference):
            if later > step:
                shutil.rmtree(tmp_path / str(step) / "checkpoints" / str(later))
        with when_done(step + 2, terminate):
            run(tmp_path / str(step), checkpoint__keep=5)
        found = dict(re.findall(r"first row of step (\d+): (.*\n.*\n.*\n)", capfd.readouterr().err))
        assert found[str(step)] == first_rows[str(step)]


@pytest.mark.parametrize(
    "devices, settings", [pytest.param(4, ON_FOUR, marks=pytest.mark.slow), (8, ON_EIGHT)], ids=["four", "eight"]
)
def test_the_first_step_on_another_mesh(run, tmp_path, reference, devices, settings):
    folders = tmp_path / "here", tmp_path / "there"
    assert run(folders[0], steps=1, validation__rows=0) == 0
    assert run(folders[1], devices, steps=1, validation__rows=0, **settings) == 0
    (here,), (there,) = map(tiny.records, folders)
    assert there["loss"] == pytest.approx(here["loss"], rel=rounding.FIRST_STEP)


# Damage and retention


def test_after_damage_the_run_goes_on_from_the_checkpoint_before(run, copy, reference, capfd):
    folder = copy(15)
    os.truncate(folder / "checkpoints" / "15" / "state" / "_METADATA", 0)
    assert run(folder, checkpoint__keep=5) == 0
    errors = capfd.readouterr().err
    assert errors.count("checkpoint 15 is damaged") == 1 and f"resuming {folder} at step 10" in errors
    assert workdir.steps_in(folder) == [5, 10, 15, 20]
    assert_same_run(folder, reference)


def test_all_damaged(run, copy):
    folder = copy(10)
    for step in ("5", "10"):
        os.truncate(folder / "checkpoints" / step / "run" / "metadata", 0)
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"none of the checkpoints \[5, 10\] can be restored"):
        run(folder)
    assert workdir.steps_in(folder) == [5, 10] and (folder / "metrics.jsonl").read_text() == before


def test_rolling_and_permanent_checkpoints(run, tmp_path):
    settings = {"checkpoint__every": 3, "checkpoint__keep": 2, "checkpoint__permanent_every": 6}
    assert run(tmp_path, validation__rows=0, **settings) == 0
    assert workdir.steps_in(tmp_path) == [6, 12, 18, 20]
