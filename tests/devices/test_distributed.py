"""Tests two processes of four devices each on one machine: they run like one process, and none is left hanging."""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import rounding
import tiny
from bucket import rule
from jax._src.clusters import cloud_tpu_cluster
from paths import PARITY, PYTHONPATH, SUPPORT
from runs import train_on

from llada_jax.config import UserError
from llada_jax.data.prepare.prepare_chat import prepare_chat
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.devices import distributed
from llada_jax.devices import mesh as meshes
from llada_jax.formats import workdir
from llada_jax.training import checkpoint

GONE = 60  # seconds from the end of one process until the launcher kills those that are left: none may be left by then
ALL = 600  # seconds until a start of the processes that does not end is killed
FAST = ("distributed.heartbeat_timeout=10", "logging.every=2", "checkpoint.keep=9")
ABORTED = (134, -signal.SIGABRT)


class End(NamedTuple):
    """How the processes of one start have ended."""

    codes: list[int]  # the exit code of each process
    said: str  # the output of all processes; every line begins with the index of its process


@pytest.fixture(scope="module")
def local():
    """Returns launch/local.py as a module."""
    spec = importlib.util.spec_from_file_location("local", tiny.ROOT / "launch" / "local.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def launch(local):
    """Returns launch(command, devices=1, meanwhile=None), which runs two processes of the command until they end.

    Each process has so many devices. More than one make it slow: each is a thread that waits for all others, and there
    are fewer cores. `meanwhile` is called with the processes as soon as they have started.
    """

    def start(command: list[str], devices: int = 1, meanwhile: Callable | None = None) -> End:
        flags = ["--processes=2", f"--devices={devices}", f"--patience={GONE}", "--"]
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", PYTHONPATH)
            patch.setattr(local, "print", lambda *line, **_: lines.append(*line), raising=False)
            job = local.Job(local.parse([*flags, *command]))
            hanging = threading.Timer(ALL, job.send, (signal.SIGKILL,))
            hanging.start()
            if meanwhile:
                meanwhile(job.processes)
            job.wait(threading.Event())
            hanging.cancel()
        return End([process.returncode for process in job.processes], "".join(lines))

    return start


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

    def start(
        folder: Path, point: str = "nothing", who: int = 0, step: int = 0, *overrides: str, devices: int = 1
    ) -> End:
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


# Tests of `distributed.run` without training: `main` is a small program.

SMALL = """
import os, signal, sys, time
from llada_jax.devices import distributed
from llada_jax.config import DistributedConfig, UserError
index = distributed.index
def fail(error):
    raise error
def main():
    {body}
    return 0
flags = dict(flag[2:].split("=") for flag in sys.argv[1:])
settings = DistributedConfig(heartbeat_timeout=10, shutdown_timeout=5)
distributed._LOOK_SECONDS = 0.2
sys.exit(distributed.run(main, settings, flags["coordinator_address"], int(flags["num_processes"]),
                         int(flags["process_id"])))
"""


BEGIN = (
    "import tiny; from pathlib import Path; from llada_jax.training import start\n"
    "    config = tiny.get_config(); config.init_from = 'gqa'; os.chdir({} if index() else {!r})\n"
    "    begin = start.decide(config, Path('nowhere')); print(begin.kind, len(__import__('jax').devices()))"
)


@pytest.mark.parametrize(
    "body, codes, said",
    [
        # Process 0 looks at a published folder for all, and only then do the devices start, in all processes together.
        (BEGIN.format(repr(str(PARITY)), str(PARITY)), [0, 0], "[0] weights 2\n[1] weights 2\n"),
        (BEGIN.format("'/'", str(PARITY)), [2, 2], "error: process 1: config.init_from=gqa is not a folder"),
        (
            "decided = distributed.first_decides('x', lambda: [index(), None, 'a'])\n"
            "    print(decided, distributed.first_problem('x', ['late', None][1 - index()]))\n"
            "    time.sleep(index()); return 143",
            [143, 143],
            "[0] [0, None, 'a'] process 1: late\n[1] [0, None, 'a'] process 1: late\n",
        ),
        ("distributed.first_decides('x', lambda: fail(UserError('no such text')))", [2, 2], "error: no such text"),
        ("index() == 1 and fail(UserError('a damaged row')); time.sleep(50)", [2, 2], "error: a damaged row"),
        pytest.param(
            "index() == 0 and fail(KeyError('a')); distributed.barrier('x')",
            [1, 1],
            "KeyError: 'a'",
            marks=pytest.mark.slow,
        ),
        ("index() == 0 and sys.exit(143); distributed.barrier('x')", [143, 143], ""),
        pytest.param("return 1 if index() else distributed.barrier('x')", [1, 1], "", marks=pytest.mark.slow),
        ("index() == 0 and os.kill(os.getpid(), 9); time.sleep(50)", [-signal.SIGKILL, -signal.SIGABRT], ""),
    ],
)
def test_what_one_process_does_to_the_other(launch, local, body, codes, said):
    end = launch([sys.executable, "-c", SMALL.format(body=body)], devices=1)
    assert end.codes == codes, end.said
    assert said in "".join(sorted(end.said.splitlines(keepends=True)))
    # Count only the project's own lines, because what JAX logs about a lost process may contain the word "error".
    assert len(re.findall(r"^\[\d\] error: ", end.said, re.MULTILINE)) == (codes == [2, 2])
    assert end.said.count("Traceback") == ("KeyError" in said)


def test_flags_that_do_not_fit_together():
    for flags, message in (
        (("host:1", None, None), "belong together: give all three"),
        (("host", 2, 0), "--coordinator_address=host is not HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2: with --num_processes=2 it must be from 0 to 1"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            distributed._check_flags(*flags)


# Tests of finding the other processes automatically.

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0"}  # fmt: skip
GKE = {"TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "1"}


def test_slurm_processes_find_each_other(local):
    port = str(local.free_port())
    code = "import sys\nfrom llada_jax import config\nfrom llada_jax.devices import distributed\n" + (
        "def main():\n  print(distributed.index(), distributed.count())\n  return 0\n"
        "sys.exit(distributed.run(main, config.DistributedConfig()))"
    )
    processes = []
    for index in ("0", "1"):
        environment = {**os.environ, **SLURM, "SLURM_PROCID": index, "SLURM_LOCALID": index}
        environment |= {"JAX_COORDINATOR_PORT": port, "PYTHONPATH": PYTHONPATH}
        processes.append(
            subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        )
    assert [process.communicate(timeout=200)[0].strip() for process in processes] == ["0 2", "1 2"]
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.parametrize(
    "announced, name",
    [
        ({}, None),
        (SLURM, "slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({name: value for name, value in SLURM.items() if "NODELIST" not in name}, None),  # a batch script without srun
        ({**GKE, "TPU_WORKER_HOSTNAMES": "a,b"}, "gketpu"),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
        ({"TPU_WORKER_ID": "0", "GCE_METADATA_IP": "127.0.0.1:1"}, None),  # a TPU machine without a metadata server
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that belongs to no indexed job
    ],
)
def test_what_a_cluster_announces(monkeypatch, announced, name):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for variable, value in announced.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", "TPU_WORKER_ID" in announced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster = distributed._cluster()
    assert (cluster and cluster.name) == name


def test_slurm_gives_a_lone_task_all_gpus_of_its_node(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")
    assert distributed._slurm_devices() == [0, 1, 2, 3]
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert distributed._slurm_devices() is None


def test_one_process_needs_none_of_this(monkeypatch):
    monkeypatch.setattr(distributed, "_cluster", lambda: None)
    assert distributed.run(lambda: 143, tiny.get_config().distributed) == 143
    with pytest.raises(KeyError):
        distributed.run(lambda: {}["a"], tiny.get_config().distributed)
    assert (distributed.index(), distributed.count(), distributed.announce(1)) == (0, 1, True)
