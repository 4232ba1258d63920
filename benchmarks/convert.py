"""Measures memory and time of loading and saving models: python benchmarks/convert.py [--model=1b] [--folder=DIR]

Writes a published folder of random bfloat16 weights shard by shard, then loads it and saves it again. Each case runs in
a process of its own on the CPU, so that the parameters are in the host's memory too. Prints one JSON line per case,
with sizes in MiB:

  parameters      size of the parameters on the devices after loading
  largest_tensor  size of the largest tensor in the files
  load_beyond     peak of anonymous memory (RssAnon of /proc/self/status, read every millisecond) while loading, minus
                  its value before loading and minus the parameters
  save_beyond     peak of anonymous memory while saving, minus its value before saving
  mapped          peak of RssFile while loading: pages of the mapped files, which the operating system can take back
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "1b": {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "feed_forward": 5634, "vocab_size": 126464},
    "tiny": {"layers": 4, "width": 256, "heads": 4, "kv_heads": 4, "feed_forward": 512, "vocab_size": 4096},
}
CASES = ((None, "bfloat16", "bfloat16"), (None, "float32", "bfloat16"), ("tied", "bfloat16", "bfloat16"))
MIB = 1 << 20


def generate(folder: Path, size: str, tied: bool, shard_bytes: int) -> None:
    """Writes a published folder with random weights, holding only one of its tensors in memory at a time."""
    import ml_dtypes
    import numpy as np

    from llada_jax.config import ModelConfig
    from llada_jax.formats import published, tensor_files, tensor_names

    config = ModelConfig(**SIZES[size], tied_embeddings=tied, mask_id=1, eos_id=2)
    shapes, random = tensor_names.expected_tensors(config), np.random.default_rng(0)

    def make(name: str) -> np.ndarray:
        return random.standard_normal(shapes[name], np.float32).astype(ml_dtypes.bfloat16)

    folder.mkdir()
    fields = published.published_config(config, dtype="bfloat16")
    (folder / published.CONFIG).write_text(json.dumps(fields))
    tensor_files.write(folder, shapes, dict.fromkeys(shapes, np.dtype(ml_dtypes.bfloat16)), shard_bytes, make)


class Peak:
    """Records the highest RssAnon and RssFile of this process in bytes, and RssAnon at the start."""

    def __init__(self) -> None:
        self.start, self.anonymous, self.mapped = self._now()[0], 0, 0

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
        return found["RssAnon"], found["RssFile"]

    def look(self) -> None:
        anonymous, mapped = self._now()
        self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)


@contextlib.contextmanager
def watched() -> Iterator[Peak]:
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.look()


def measure(folder: Path, load_dtype: str, save_dtype: str) -> dict:
    """Loads and saves the model of one case in this process and returns the measurements."""
    import jax
    import jax.numpy as jnp

    from llada_jax.devices import mesh
    from llada_jax.formats import huggingface, tensor_names

    config = huggingface.inspect(folder).config
    tensors = tensor_names.expected_tensors(config).values()
    largest = max(rows[0] * (rows[1] if len(rows) == 2 else 1) for rows in tensors) * 2
    with jax.set_mesh(mesh.one_device_mesh()):
        jax.block_until_ready(jnp.zeros(8) + 1)
        started = time.perf_counter()
        with watched() as loading:
            model = jax.block_until_ready(huggingface.load_model(folder, jnp.dtype(load_dtype)))
        load_seconds, started = time.perf_counter() - started, time.perf_counter()
        with watched() as saving:
            huggingface.save_model(model, folder.with_name("back"), dtype=save_dtype, shard_bytes=10**9)
        save_seconds = time.perf_counter() - started
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {
        "parameters": round(parameters / MIB),
        "largest_tensor": round(largest / MIB),
        "load_beyond": round((loading.anonymous - loading.start - parameters) / MIB),
        "save_beyond": round((saving.anonymous - saving.start) / MIB),
        "mapped": round(loading.mapped / MIB),
        "load_seconds": round(load_seconds, 1),
        "save_seconds": round(save_seconds, 1),
    }


def main() -> None:
    """Runs each case in a process of its own and prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1b", choices=SIZES, help="size of the model")
    parser.add_argument(
        "--folder",
        type=os.path.expanduser,
        help="folder to write the models to; default: the system's temporary folder",
    )
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(Path(args.case[0]), *args.case[1:])), flush=True)
        return
    import jax

    for kind, load_dtype, save_dtype in CASES:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name) / "model"
            generate(folder, args.model, kind == "tied", 10**9)
            command = [sys.executable, __file__, "--case", str(folder), load_dtype, save_dtype]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
            case = {"benchmark": "convert", "model": args.model, "tied": kind == "tied"}
            case |= {"files": "bfloat16", "shards": len(list(folder.glob("*.safetensors"))), "loaded": load_dtype}
            versions = {"jax": jax.__version__, "python": platform.python_version()}
            print(json.dumps(case | json.loads(done.stdout) | versions), flush=True)


if __name__ == "__main__":
    main()
