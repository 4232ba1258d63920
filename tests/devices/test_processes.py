"""Tests how several processes find each other, and what one does to the others; `main` is a small program."""

import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import tiny
from jax._src.clusters import cloud_tpu_cluster
from paths import PARITY, PYTHONPATH

from llada_jax.config import UserError
from llada_jax.devices import distributed

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
