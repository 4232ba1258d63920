"""Measures a restart: python benchmarks/restart.py [--rounds=3] [--config=configs/quickstart.py]

Trains the quickstart on prepared text, kills the training (kill -9) some steps after a checkpoint, and starts the same
command again at once, as often as --rounds says. Prints one JSON line: the median seconds from the kill to the first
step that is new in metrics.jsonl, and their parts, by the lines that the run prints:

  start     to the line that describes the model: Python, imports, devices, data
  read      to "resuming": making an empty state and reading the checkpoint
  batch     to "compiling the train step": the first batch, and showing a row of it
  compile   to the first step in metrics.jsonl: reading the compiled step from the cache, and one step
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKS = {"start": " parameters, ", "read": "resuming ", "batch": "compiling the train step"}
CHECKPOINT, KILL = 5, 8  # steps


def run(command: list[str], metrics: Path, until: int, log: Path) -> tuple[float, dict[str, float]]:
    """Starts a training and kills it when metrics.jsonl has step `until`.

    Returns:
      The time of the start, and the times at which the lines of MARKS and that step ("compile") were seen.

    Raises:
      RuntimeError: If the training ends before.
    """
    seen: dict[str, float] = {}
    begin = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=file, stderr=file)
        try:
            while "compile" not in seen:
                if process.poll() is not None:
                    raise RuntimeError(log.read_text(encoding="utf-8"))
                text, now = log.read_text(encoding="utf-8"), time.perf_counter()
                for name, mark in MARKS.items():
                    if mark in text:
                        seen.setdefault(name, now)
                # What is there before the run resumes is of the start before.
                lines = metrics.read_text().splitlines() if "batch" in seen and metrics.exists() else []
                if any(line.startswith(f'{{"step": {until},') for line in lines):
                    seen["compile"] = now
                time.sleep(0.01)
            return begin, seen
        finally:
            process.kill()
            process.wait()


def main() -> None:
    """Measures all rounds and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py", help="config file of the training")
    parser.add_argument("--rounds", type=int, default=3, help="number of restarts")
    args = parser.parse_args()
    parts: dict[str, list[float]] = {name: [] for name in ("whole", *MARKS, "compile")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = [sys.executable, "-m", "llada_jax.prepare", "--input=stdlib", f"--output={folder / 'data'}"]
        prepare += ["--train_tokenizer=8192", "--sequence_length=64"]
        subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        command = [sys.executable, "-m", "llada_jax.train", f"--config={args.config}", "--config.data.input="]
        command += [f"--config.data.path={folder / 'data'}", f"--workdir={folder / 'run'}", "--config.steps=1000"]
        command += ["--config.logging.every=1", f"--config.checkpoint.every={CHECKPOINT}"]
        metrics, step = folder / "run" / "metrics.jsonl", 0
        run(command, metrics, KILL, folder / "log")
        for _ in range(args.rounds):
            step += CHECKPOINT
            begin, seen = run(command, metrics, step + 1, folder / "log")
            last = begin
            for part in (*MARKS, "compile"):
                parts[part].append(seen[part] - last)
                last = seen[part]
            parts["whole"].append(last - begin)
            run(command, metrics, step + KILL, folder / "log")
    record = {
        "benchmark": "restart",
        "config": args.config,
        **{f"{part}_seconds": round(statistics.median(values), 2) for part, values in parts.items()},
        "ranges": {part: [round(min(values), 2), round(max(values), 2)] for part, values in parts.items()},
        "rounds": args.rounds,
        "python": platform.python_version(),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
