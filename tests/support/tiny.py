"""A very small run, as a config file (--config=tests/support/tiny.py), and what the tests of runs share."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from paths import PYTHONPATH, ROOT, SUPPORT

from llada_jax.config import Config

# These metrics differ between any two runs.
TIMED = (
    "step_seconds", "tokens_per_second", "tokens_per_second_per_device", "seconds_left", "mfu", "mfu_full_head", "time",
    "goodput", "checkpoint_stall_seconds",
)  # fmt: skip
TIMED_GROUPS = ("goodput/", "this_start/", "hosts/")


def get_config() -> Config:
    c = Config(steps=20, batch_size=8, sequence_length=32)
    c.model.layers, c.model.width, c.model.heads, c.model.kv_heads, c.model.feed_forward = 2, 32, 4, 4, 64
    c.compute.dtype, c.compute.deterministic = "float32", True  # so that all runs have the same bits, on GPUs too
    c.data.train_tokenizer, c.data.workers = 320, 1
    c.compute.remat = "none"
    c.diffusion.random_length_every = 5
    c.optimizer.peak_learning_rate = 3e-3
    # The positions are steps, so runs of another number of steps share the compiled train step.
    c.optimizer.schedule = ((0, 0.0), (4, 1.0), (20, 0.1))
    c.validation.every, c.validation.rows = 7, 8
    c.checkpoint.every, c.checkpoint.keep = 5, 2
    c.logging.every, c.logging.buckets = 3, 4
    c.sampling.every, c.sampling.steps, c.sampling.gen_length, c.sampling.block_length = 9, 2, 4, 4
    return c


def write_corpus(path: Path, lines: int = 1500) -> str:
    """Writes a text of different lines, large enough to train a tokenizer and to hold out some documents."""
    words = "the a small quiet green tired fox engine child river walked sang ate and but never always home".split()
    pick = random.Random(0)
    documents = (" ".join(pick.choices(words, k=12)) + f" {i}." for i in range(lines))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def command(workdir: Path, *overrides: str) -> list[str]:
    """Returns the flags of a training run; overrides are NAME=VALUE, without --config."""
    flags = [f"--config={SUPPORT / 'tiny.py'}", f"--workdir={workdir}"]
    return [*flags, *(f"--config.{override}" for override in overrides)]


def xla_flags(devices: int) -> str:
    """Returns the XLA_FLAGS of the tests, for a process with so many simulated devices."""
    count = "--xla_force_host_platform_device_count="
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(count)]
    return " ".join([*kept, f"{count}{devices}"])


def start(arguments: list[str], devices: int = 1, **options) -> subprocess.Popen:
    """Starts `python ARGUMENTS` as a process of its own, with one device by default; its stderr is a pipe of text."""
    environment = dict(os.environ, PYTHONPATH=PYTHONPATH)
    environment["XLA_FLAGS"] = xla_flags(devices)
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, **options,
    )  # fmt: skip


def is_timed(name: str) -> bool:
    """Returns whether a metric depends on the clock, so that it differs between any two runs."""
    return name in TIMED or name.startswith(TIMED_GROUPS)


def records(workdir: Path) -> list[dict]:
    """Returns the records of metrics.jsonl without the values that depend on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not is_timed(name)} for line in lines]
