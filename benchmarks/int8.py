"""Measures what int8 weights change: python benchmarks/int8.py --model=WORKDIR [--data=SET]

The model is loaded twice, with its own weights and with weights="int8". For both, prints one JSON line with the bytes
of the parameters, the likelihood bound (Eq. 6) on the held-out rows of the set (by default the workdir's own), with the
same masks for both, and the time of a reverse step of one row of --prompt_length + --gen_length tokens. The two take
turns. `agree` is the share of the most probable tokens that are the same, over the masked positions of a canvas that is
half masked.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import numpy as np

import llada_jax
from llada_jax.cli.paths import expanded
from llada_jax.config import SamplerConfig, ValidationConfig
from llada_jax.data.read.pipeline import validation_rows
from llada_jax.devices import mesh
from llada_jax.formats import workdir
from llada_jax.model.transformer import split
from llada_jax.sampling.sampler import generate
from llada_jax.scoring import bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=expanded, required=True)
    parser.add_argument("--data", type=expanded)
    parser.add_argument("--dtype", help="float32 or bfloat16")
    sizes = {"rows": 128, "samples": 4, "prompt_length": 448, "gen_length": 64, "steps": 64, "repeats": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()

    models = {name: llada_jax.load(args.model, dtype=args.dtype, weights=name)[0] for name in (None, "int8")}
    config = models[None].config
    sets = [args.data or str(Path(args.model) / "data")]
    held_out = validation_rows(sets, args.rows, workdir.trained_length(args.model), config.vocab_size)
    rng = np.random.default_rng(0)
    row_BT = rng.permutation(held_out.tokens_NT.reshape(-1)[: args.prompt_length])[None]
    masked_NT = rng.random(held_out.tokens_NT.shape) < 0.5
    half_NT = np.where(masked_NT, config.mask_id, held_out.tokens_NT)[:8]
    best = {name: np.asarray(model(half_NT).argmax(axis=-1))[masked_NT[:8]] for name, model in models.items()}

    sampler = SamplerConfig(steps=args.steps, gen_length=args.gen_length, block_length=args.gen_length)
    seconds: dict[str | None, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            jax.block_until_ready(generate(model, row_BT, sampler, jax.random.key(0)))
            if repeat:  # the first run also compiles and is not counted
                seconds[name].append((time.perf_counter() - begin) / args.steps)
    for name, model in models.items():
        with mesh.mesh_of(model.embedding[...]):
            options = {"batch_size": 8, "chunk": 512, "mask_id": config.mask_id}
            figures = bound.validate(*split(model), held_out, ValidationConfig(samples=args.samples), **options)
        line = {
            "benchmark": "int8",
            "weights": name or str(model.embedding[...].dtype),
            "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(split(model)[1])),
            "bits_per_byte": round(figures["bits_per_byte"], 5),
            "nats_per_token": round(figures["nats_per_token"], 5),
            "agree": round(float((best[name] == best[None]).mean()), 4),
            "ms_per_step": round(1000 * statistics.median(seconds[name]), 2),
            "times_own_weights": round(statistics.median(seconds[name]) / statistics.median(seconds[None]), 3),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "python": platform.python_version(),
        }
        print(json.dumps(line | vars(args)), flush=True)


if __name__ == "__main__":
    main()
