"""Measures the start-up time: python benchmarks/startup.py [--rounds=3] [--config=configs/quickstart.py]

Starts the training of the quickstart on prepared text, each time in a new workdir, waits until metrics.jsonl contains
the first step, and then kills the training. The runs take turns: with an empty cache of compiled programs (cold), with
the cache that the cold run has filled (warm), and without a cache (off). Prints one JSON line: the median seconds of
each case, and of importing llada_jax.train alone.
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


def environment(cache: Path | None) -> dict[str, str]:
    """Returns environment variables that keep compiled programs in the folder `cache`, or nowhere if it is None."""
    settings = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false" if cache is None else "true"}
    settings.pop("JAX_COMPILATION_CACHE_DIR", None)
    return settings if cache is None else settings | {"XDG_CACHE_HOME": str(cache)}


def seconds_to_first_step(arguments: list[str], workdir: Path, cache: Path | None) -> float:
    """Starts a training and returns the seconds until its first step.

    Raises:
      RuntimeError: If the training ends before its first step.
    """
    command = [sys.executable, "-m", "llada_jax.train", *arguments, f"--workdir={workdir}", "--config.logging.every=1"]
    command.append("--config.steps=1000")  # otherwise config.minutes of the quickstart would first time some steps
    metrics, log = workdir / "metrics.jsonl", workdir.with_suffix(".log")
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(cache), stdout=file, stderr=file)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text(encoding="utf-8"))
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def seconds_to_import() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import llada_jax.train"], cwd=ROOT, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measures all cases and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py", help="config file of the training")
    parser.add_argument("--rounds", type=int, default=3, help="number of starts of each case")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), {"cold": [], "warm": [], "off": [], "import": []}
        prepare = [sys.executable, "-m", "llada_jax.prepare", "--input=stdlib", f"--output={folder / 'data'}"]
        prepare += ["--train_tokenizer=8192", "--sequence_length=64"]
        subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        arguments = [f"--config={args.config}", "--config.data.input=", f"--config.data.path={folder / 'data'}"]
        for i in range(args.rounds):
            cache = folder / f"cache{i}"
            for case, where in (("cold", cache), ("warm", cache), ("off", None)):
                seconds[case].append(seconds_to_first_step(arguments, folder / f"{case}{i}", where))
            seconds["import"].append(seconds_to_import())
        files = [file for file in cache.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
    import jax

    record = {
        "benchmark": "startup",
        "config": args.config,
        **{f"{case}_seconds": round(statistics.median(values), 2) for case, values in seconds.items()},
        "ranges": {case: [round(min(values), 2), round(max(values), 2)] for case, values in seconds.items()},
        "cache_files": len(files),
        "cache_mb": round(size / 1e6, 1),
        "rounds": args.rounds,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
