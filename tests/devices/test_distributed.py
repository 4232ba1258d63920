"""Tests trainings by two processes on one machine: they run like one process, and none is left hanging."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import rounding
import tiny
from bucket import rule
from paths import SUPPORT
from runs import train_on

from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.devices import mesh as meshes
from llada_jax.formats import workdir
from llada_jax.training import checkpoint

FAST = ("distributed.heartbeat_timeout=10", "logging.every=2", "checkpoint.keep=9")
ABORTED = (134, -signal.SIGABRT)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    corpus = tiny.write_corpus(folder / "corpus.jsonl")
    prepare([corpus], folder / "set", train_tokenizer=320, sequence_length=32, workers=1, progress=False)
    return str(folder / "set")


@pytest.fixture(scope="module")
def several(launch, prepared):
    """Returns several(folder, point, who, step, *overrides, devices=1), which trains with two processes.

    Process `who` does at step `step` what `point` names; see support/several.py.
    """

    def start(folder: Path, point: str = "nothing", who: int = 0, step: int = 0, *overrides: str, devices: int = 1):
        script = [sys.executable, str(SUPPORT / "several.py"), point, str(who), str(step), "--"]
        return launch([*script, *tiny.command(folder, f"data.path={prepared}", *FAST, *overrides)], devices)

    return start


@pytest.fixture(scope="module")
def alone(prepared):
    """Returns alone(folder, devices, steps=20), which trains in this process alone."""

    def start(folder: Path, devices: int, steps: int = 20) -> int:
        config = tiny.get_config()
        config.data.path, config.steps = prepared, steps
        config.distributed.heartbeat_timeout, config.logging.every, config.checkpoint.keep = 10, 2, 9

        return train_on(devices, config, folder)

    return start


@pytest.fixture(scope="module")
def whole(several, tmp_path_factory):
    """Returns the folder and the output of an undisturbed run of two processes. Tests must not change the folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    end = several(folder)
    assert end.codes == [0, 0], end.said
    return folder, end.said


def state_of(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every array in the newest checkpoint, by the name of the array."""
    config, _ = workdir.read_config(folder)
    state = checkpoint.load_state(folder, None, config, meshes.one_device_mesh())
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def window_of(folder: Path, step: int) -> dict:
    """Returns the sums of the window at a checkpoint of an odd step.

    The window holds only that step, because a line of metrics is written at every even step.
    """
    window = json.loads((folder / "checkpoints" / str(step) / "run" / "metadata").read_text())["window"]
    assert window["steps"] == 1
    return window


def assert_equal_within_tolerance(folder: Path, other: Path, first: int = 0) -> None:
    """Checks that two runs are equal after step `first`: rows and noise exactly, losses within a tolerance.

    This is what "equal" means everywhere in this project for runs on different meshes, see `rounding.LATER_STEPS`.
    """
    ours, theirs = ([r for r in tiny.records(f) if r["step"] > first] for f in (folder, other))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for record, wanted in zip(ours, theirs, strict=True):
        assert record == pytest.approx(wanted, rel=rounding.LATER_STEPS), record["step"]
    for step in (s for s in (5, 15) if s > first):
        # The number of tokens, and of masked tokens by mask ratio, would differ with other rows or other noise.
        for exact in ("tokens", "bucket_tokens"):
            assert window_of(folder, step)[exact] == window_of(other, step)[exact]


def test_the_losses_of_one_process_with_as_many_devices(whole, alone, tmp_path):
    assert alone(tmp_path, 2) == 0
    assert_equal_within_tolerance(whole[0], tmp_path)
    ours, theirs = tiny.records(whole[0])[0], tiny.records(tmp_path)[0]
    assert ours["step"] == 2  # the loss of two steps from the same weights: the first learning rate is 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=rounding.FIRST_STEP)


@pytest.mark.slow
def test_several_devices_in_each_process(several, alone, tmp_path):
    end = several(tmp_path / "two", "nothing", 0, 0, "steps=6", devices=4)
    assert end.codes == [0, 0], end.said
    assert alone(tmp_path / "one", 8, steps=6) == 0
    ours, theirs = (tiny.records(tmp_path / name) for name in ("two", "one"))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for record, wanted in zip(ours, theirs, strict=True):
        assert record == pytest.approx(wanted, rel=rounding.LATER_STEPS), record["step"]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=rounding.FIRST_STEP)
    assert window_of(tmp_path / "two", 5)["bucket_tokens"] == window_of(tmp_path / "one", 5)["bucket_tokens"]


def test_each_process_reads_only_its_rows(whole):
    for process, rows in ((0, [0, 1, 2, 3]), (1, [4, 5, 6, 7])):
        read = re.findall(r"^rows (\d+) (\[.*\])$", Path(f"{whole[0]}.{process}").read_text(), re.MULTILINE)
        assert set(range(20)) <= {int(step) for step, _ in read}
        assert all(json.loads(which) == rows for _, which in read)


@pytest.mark.slow
def test_conversations_have_the_same_length_everywhere(launch, prepared, tmp_path):
    """Conversations are padded to the longest row of all processes, although no process reads the rows of all.

    Therefore two processes have the losses of one process.
    """
    lines = ({"prompt": "fox " * (i % 9), "response": "child " * (i % 13 + 1)} for i in range(60))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chats = str(tmp_path / "set")
    prepare_chat(
        [str(tmp_path / "chats.jsonl")], chats, tokenizer=prepared, sequence_length=64, workers=1, progress=False
    )
    settings = ("diffusion.objective=sft", "diffusion.random_length_every=0", "sequence_length=64", "steps=6")
    overrides = (f"data.path={chats}", *settings, "sampling.prompts=()", *FAST)
    end = launch([sys.executable, "-m", "llada_jax.train", *tiny.command(tmp_path / "two", *overrides)], devices=1)
    assert end.codes == [0, 0], end.said
    process = tiny.start(["-m", "llada_jax.train", *tiny.command(tmp_path / "one", *overrides)], devices=2)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    ours, theirs = ([r for r in tiny.records(tmp_path / name) if "loss" in r] for name in ("two", "one"))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=rounding.LATER_STEPS)


def test_only_one_process_writes_and_speaks(whole):
    written = [set(re.findall(r"^writes (.*)$", Path(f"{whole[0]}.{i}").read_text(), re.MULTILINE)) for i in (0, 1)]
    # The processes tell each other how long they were late, without waiting for each other.
    last = json.loads((whole[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["hosts/slowest"] in (0, 1) and 0 <= last["hosts/data_seconds_max"] <= last["this_start/train"]
    assert {"lock", "metrics.jsonl", "starts.jsonl", "samples.txt", "config.tmp"} <= written[0]
    assert [name for name in written[1] if not name.startswith("checkpoints/")] == []
    # The collectives of simulated devices print lines too, in pieces.
    spoken = re.sub(r"\[1\] (.*Gloo.*|.*connected peer ranks.*|[\d :]*)\n", "", whole[1])
    assert [line for line in spoken.splitlines() if line.startswith("[1]")] == []
    assert len((whole[0] / "starts.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_any_death_is_the_death_of_all_and_the_run_goes_on(several, whole, tmp_path):
    folder = tmp_path / "run"

    end = several(folder, "saving", 1, 10)
    assert end.codes[1] == -signal.SIGKILL and end.codes[0] in ABORTED, end
    assert workdir.steps_in(folder) == [5], end.said

    end = several(folder, "terminate", 1, 8)
    assert end.codes == [143, 143], end.said
    stopped = workdir.steps_in(folder)[-1]
    assert f"resuming {folder} at step 5" in end.said and stopped < 15
    assert end.said.count(f"stopped by SIGTERM: saved step {stopped}; the same command goes on from there") == 1

    end = several(folder, "raise", 1, 17)
    assert end.codes == [1, 1], end.said
    assert f"resuming {folder} at step {stopped}" in end.said
    assert end.said.count("Traceback") == 1 and "RuntimeError: a step that fails" in end.said
    assert workdir.steps_in(folder)[-1] == 15

    # Damage the part of the newest checkpoint that process 1 has written.
    files = (folder / "checkpoints" / "15" / "state" / "ocdbt.process_1" / "d").iterdir()
    os.truncate(max(files, key=lambda file: file.stat().st_size), 100)
    end = several(folder)
    assert end.codes == [0, 0], end.said
    assert end.said.count("checkpoint 15 is damaged") == 1 and (folder / "checkpoints" / "damaged-15").is_dir()
    assert tiny.records(folder) == tiny.records(whole[0])
    assert state_of(folder) == state_of(whole[0])
    assert (folder / "samples.txt").read_text() == (whole[0] / "samples.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["bucket", "s3_bucket"])
def test_a_workdir_in_a_bucket(launch, prepared, whole, storage, request, monkeypatch, tmp_path):
    """One of two processes dies while its part of a checkpoint is on the way; the next start is the local run."""
    pytest.importorskip("gcsfs")
    bucket = request.getfixturevalue(storage)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place, folder = f"{bucket.url}/run", tmp_path / "run"
    flags = tiny.command(place, f"data.path={prepared}", *FAST)
    command = [sys.executable, str(SUPPORT / "in_bucket.py"), *flags]

    def kill_one_when_held(processes: list[subprocess.Popen]) -> None:
        while not bucket.injected("hang") and processes[1].poll() is None:
            time.sleep(0.1)
        processes[1].kill()

    bucket.faults([rule("hang", match="P(OS|U)T .*run/checkpoints/10/state/ocdbt.process_1/")])
    end = launch(command, meanwhile=kill_one_when_held)
    assert end.codes[1] == -signal.SIGKILL and end.codes[0] in ABORTED, end
    assert bucket.injected("hang") and workdir.steps_in(place) == [5], end.said
    assert [name for name in bucket.names("run/checkpoints/10/") if "ocdbt.process_0" in name]
    bucket.reset()
    end = launch(command)
    assert end.codes == [0, 0] and f"resuming {place} at step 5" in end.said, end.said
    bucket.download("run", folder)
    assert workdir.steps_in(folder) == [5, 10, 15, 20] and not (folder / "lock").exists()
    assert tiny.records(folder) == tiny.records(whole[0]) and state_of(folder) == state_of(whole[0])
    assert (folder / "samples.txt").read_text() == (whole[0] / "samples.txt").read_text()
    assert len((folder / "starts.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_one_process_continues_what_two_began(whole, alone, tmp_path, devices):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    for step in (15, 20):
        shutil.rmtree(folder / "checkpoints" / str(step))
    assert alone(folder, devices) == 0
    assert_equal_within_tolerance(folder, whole[0], first=10)
    assert [record["step"] for record in tiny.records(folder)] == [r["step"] for r in tiny.records(whole[0])]


@pytest.mark.parametrize(
    "point, override, message",
    [
        pytest.param("nothing", "nonsense=1", "nonsense", marks=pytest.mark.slow),
        pytest.param("nothing", "mesh.fsdp=3", "takes 3 devices, but there are 2", marks=pytest.mark.slow),
        ("other", "steps=20", "process 1 (of 2): config.seed is 5, but in process 0 it is 0: start all processes with"),
        ("busy", "steps=20", "is in use by another process"),
    ],
)
def test_a_mistake_is_told_once_and_ends_all(several, tmp_path, point, override, message):
    with (tmp_path / "lock").open("a") as lock:
        if point == "busy":
            fcntl.flock(lock, fcntl.LOCK_EX)
        end = several(tmp_path, point, 1, 0, override)
    assert end.codes == [2, 2], end.said
    told = [line for line in end.said.splitlines() if "error: " in line]
    assert len(told) == 1 and message in told[0] and "Traceback" not in end.said
    assert workdir.steps_in(tmp_path) == [] and not (tmp_path / "config.json").exists()
