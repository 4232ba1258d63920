"""Runs the benchmarks of benchmarks/gpu.sh at a tiny size: they are used rarely, and far from here."""

import json
import os
import subprocess
import sys

import pytest
from paths import PYTHONPATH, ROOT

SHAPE = "--layers=1 --width=32 --heads=2 --feed_forward=32 --vocab_size=64"
CANVAS = "--prompt_length=6 --gen_length=8 --block_length=4 --steps=4 --repeats=1"
COMMANDS = {
    "attention": "attention.py --shapes=1x128x2x2x32 --rounds=1",
    "train_step": "train_step.py --cases=quickstart --steps=1 --layers=1 --batch_size=8",
    "sampler": f"sampler.py {SHAPE} {CANVAS}",
    "caches": f"sampler.py {SHAPE} {CANVAS} --caches --window=2 --exact_passes=1",
    "likelihood": f"likelihood.py {SHAPE} --requests=2 --samples=2 --chunk=2 --repeats=1 --threads=1 --lengths=4:4",
    "cross_entropy": "cross_entropy.py --tokens=64 --rows=2 --width=32 --vocabulary=128 --chunk=32 --rounds=1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name, tmp_path):
    script, *flags = COMMANDS[name].split()
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": PYTHONPATH}, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert not done.returncode, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines and all("benchmark" in line for line in lines), done.stdout
