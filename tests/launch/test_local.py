"""Tests launch/local.py with small processes that start quickly."""

import importlib.util
import os
import re
import signal
import subprocess
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "launch" / "local.py"
# A process that records its start, reads the flags that the launcher appends, and then runs `body`.
CHILD = """
import os, signal, sys, time
flags = dict(flag[2:].split("=") for flag in sys.argv[1:])
me, folder = int(flags["process_id"]), os.environ["NOTES"]
starts = len([name for name in os.listdir(folder) if name.startswith(f"{{me}}.")])
open(os.path.join(folder, f"{{me}}.{{starts}}"), "w").close()
{body}
"""


@pytest.fixture(scope="module")
def local():
    spec = importlib.util.spec_from_file_location("local", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launch(tmp_path):
    """Returns launch(body, *flags), which starts the launcher with three processes that run `body`.

    In `body`, `me` is the number of the process, and `starts` is the number of its earlier starts.
    """

    def start(body: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-c", CHILD.format(body=body)]
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), "--processes=3", *flags, "--", *command],
            env={**os.environ, "NOTES": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.mark.parametrize(
    "body, code, starts",
    [
        ("", 0, 1),
        ("sys.exit(2 if me == 1 else 134)", 2, 1),  # A mistake of the user would occur again at the next start.
        ("sys.exit(2 if me == 1 else 0)", 2, 1),
        ("sys.exit(1)", 1, 1),
        ("sys.exit(143)", 143, 3),
        ("sys.exit(0 if starts else 143)", 0, 2),
        ("me == 2 and starts == 0 and os.kill(os.getpid(), 9)", 0, 2),
        ("starts < 2 and os.abort()", 0, 3),
        ("me == 1 and os.kill(os.getpid(), 9); sys.exit(134)", None, 3),
    ],
)
def test_which_ends_are_tried_again(launch, tmp_path, body, code, starts):
    process = launch(body, "--retries=2")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == code if code is not None else process.returncode in (134, 137), errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.{n}" for i in range(3) for n in range(starts)]
    assert errors.count("starting again") == starts - 1


def test_whoever_outlasts_the_first_is_killed(launch):
    process = launch("signal.signal(15, signal.SIG_IGN); me and time.sleep(1000); sys.exit(1)", "--patience=1")
    process.communicate(timeout=120)
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_and_nothing_is_started_again(launch, tmp_path, number):
    body = "signal.signal({0}, lambda *_: sys.exit(143)); print('ready', flush=True); time.sleep(1000)"
    process = launch(body.format(int(number)), "--retries=2")
    for _ in range(3):
        assert "ready" in process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 143 and len(list(tmp_path.iterdir())) == 3


def test_told_to_stop_and_deaf(launch):
    process = launch("signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(1000)", "--patience=1")
    for _ in range(3):
        process.stdout.readline()
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 137


def test_lines_say_whose_they_are_and_a_mistake_is_told_once(launch):
    body = "print('out', me); print('err', me, file=sys.stderr); print('error: no', file=sys.stderr); sys.exit(2)"
    output, errors = launch(body).communicate(timeout=120)
    assert sorted(output.splitlines()) == ["[0] out 0", "[1] out 1", "[2] out 2"]
    assert sorted(re.sub(r"^\[.\] error", "error", line) for line in errors.splitlines()) == [
        "[0] err 0", "[1] err 1", "[2] err 2", "error: no"
    ]  # fmt: skip


def test_what_each_process_sees(local, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=8")
    simulated = local.environment(local.parse(["--processes=2", "--devices=4", "--", "x"]), 1)
    assert simulated["XLA_FLAGS"].split() == ["--a=1", "--xla_force_host_platform_device_count=4"]
    assert simulated["JAX_PLATFORMS"] == "cpu"
    gpus = local.parse(["--processes=2", "--gpus_per_process=2", "--", "x"])
    assert [local.environment(gpus, i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [local.environment(gpus, i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(SystemExit, match="CUDA_VISIBLE_DEVICES=4,5,6 has too few GPUs"):
        local.environment(gpus, 1)


def test_the_meeting_place_is_given_to_all(launch, tmp_path):
    body = "print(flags['coordinator_address'], flags['num_processes'], me)"
    output, _ = launch(body).communicate(timeout=120)
    told = sorted(line.split()[1:] for line in output.splitlines())
    assert len({address for address, _, _ in told}) == 1 and told[0][0].startswith("127.0.0.1:")
    assert [(count, me) for _, count, me in told] == [("3", "0"), ("3", "1"), ("3", "2")]
