"""Measures the speed and memory of data preparation and of the data pipeline. Prints one JSON line per case.

python benchmarks/data.py                            # Python's standard library, with a tokenizer trained on it
python benchmarks/data.py --input=FILES --tokenizer=FILE --sequence_length=4096
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from absl import flags

from llada_jax.cli import entry_point, paths

_INPUT = paths.define_multi("input", ["stdlib"], "Text to prepare, as for llada_jax.prepare.")
_TOKENIZER = paths.define(
    "tokenizer", None, "Tokenizer, as for llada_jax.prepare. Default: train a tokenizer with 4,096 tokens."
)
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 4096, "Tokens per row.")
_WORKERS = flags.DEFINE_multi_integer("workers", [1, 2], "Number of worker processes to measure; may repeat.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Seconds to measure each pipeline case.")


def measured(command: list[str]) -> tuple[float, float]:
    """Runs a command and returns its wall-clock seconds and its peak resident memory, with all children, in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if code:
        sys.exit(code)
    return seconds, peak / 2**20


def resident(pid: int) -> int:
    """Returns the resident memory of a process and its descendants in bytes (only on Linux).

    Pages that several processes share count once for each process.
    """
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = [
            int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
    except (OSError, IndexError):
        return 0
    return own + sum(map(resident, children))


def report(case: str, **values: object) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"benchmark": "data", "case": case, **rounded, "machine": platform.machine()}), flush=True)


def main() -> None:
    from llada_jax.data.manifest import TOKENIZER_FOLDER, load_manifest

    with tempfile.TemporaryDirectory() as folder:
        common = [f"--input={name}" for name in _INPUT.value] + [f"--sequence_length={_SEQUENCE_LENGTH.value}"]
        tokenizer = _TOKENIZER.value
        for workers in _WORKERS.value:
            output = f"{folder}/{workers}"
            choice = f"--tokenizer={tokenizer}" if tokenizer else "--train_tokenizer=4096"
            command = [sys.executable, "-m", "llada_jax.prepare", *common, choice, f"--output={output}"]
            seconds, peak = measured([*command, f"--workers={workers}"])
            manifest = load_manifest(output)
            tokens = manifest.train.tokens + manifest.validation.tokens
            report(
                "prepare" if tokenizer else "prepare, training a tokenizer",
                workers=workers,
                tokens=tokens,
                bytes=manifest.train.bytes + manifest.validation.bytes,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                peak_rss_mib=peak,
            )
            tokenizer = tokenizer or f"{output}/{TOKENIZER_FOLDER}"
        pipeline(output)


def pipeline(path: str) -> None:
    """Measures batches of 8 rows that are read without prefetching, and with prefetching by one or two threads."""
    from llada_jax.data.manifest import load_manifest
    from llada_jax.data.read.pipeline import TrainingData

    manifest = load_manifest(path)
    data = TrainingData(
        [path],
        seed=0,
        batch_size=8,
        sequence_length=manifest.sequence_length,
        random_length_every=100,
        vocab_size=manifest.vocab_size,
    )
    for prefetch, threads in ((0, 1), (4, 1), (4, 2)):
        batches = data.iterate(0, range(8), prefetch=prefetch, threads=threads)
        next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS.value:
            next(batches)
            count += 1
        seconds = time.perf_counter() - start
        batches.close()
        tokens = count * 8 * manifest.sequence_length
        report("pipeline", prefetch=prefetch, threads=threads, tokens_per_second=tokens / seconds)


if __name__ == "__main__":
    entry_point.run(main)
