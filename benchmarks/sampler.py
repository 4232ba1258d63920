"""Measures the speed of sampling: python benchmarks/sampler.py [--width=512 --layers=8 ...]

Prints one JSON line per case: the tokens per second and milliseconds per reverse step of `llada_jax.generate`, and the
ratio to the plain way, which applies the head to the whole canvas in every step. The cases run in turns, so that other
load on the machine affects all of them alike. It reports medians and the ratio of medians. Compilation is not counted.

With --caches it measures the sampler with each cache instead, at one token per pass and at about --tokens_per_pass. A
model with random weights is sure of nothing, so that the rules of `commit` would keep one token per pass: the schedule
stands for them. Each case runs with a few numbers of passes per block. How the time grows with them is the time of a
pass that reads the cache, and what is left is the time of the full pass of each block; the times at other numbers of
passes follow from the two. The exact sampler runs for --exact_passes passes. --commits measures the passes of each rule
as well, with its default bound.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.config import ComputeConfig, ModelConfig, SamplerConfig
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer, initialise
from llada_jax.sampling.canvas import arguments, scalar
from llada_jax.sampling.commit import CHOICES
from llada_jax.sampling.remasking import choose
from llada_jax.sampling.sampler import begin, denoise, generate
from llada_jax.sampling.settings import resolve


def plain(model: Transformer, prompt_BT: np.ndarray, config: SamplerConfig) -> jax.Array:
    """Samples greedily with low-confidence remasking as the published code does.

    It computes logits for every position and makes one call per reverse step.
    """
    mask_id, length = model.config.mask_id, prompt_BT.shape[1]
    canvas_BT = jnp.asarray(np.pad(prompt_BT, ((0, 0), (0, config.gen_length)), constant_values=mask_id), jnp.int32)
    blocks = config.gen_length // config.block_length
    count = config.gen_length // config.steps
    with mesh.mesh_of(model.embedding[...]):
        for block in range(blocks):
            end = length + (block + 1) * config.block_length
            for _ in range(config.steps // blocks):
                canvas_BT = _plain_step(model, canvas_BT, end, count, mask_id)
    return canvas_BT


@functools.partial(jax.jit, static_argnames=("count", "mask_id"))
def _plain_step(model: Transformer, canvas_BT: jax.Array, end: int, count: int, mask_id: int) -> jax.Array:
    canvas_BT = jax.reshard(canvas_BT, mesh.TOKENS_BT)
    logits_BTV = model.logits(model.trunk(canvas_BT))
    token_BT, score_BT = choose(logits_BTV, None, jnp.arange(logits_BTV.shape[-1]) != mask_id)
    open_BT = (canvas_BT == mask_id) & (jnp.arange(canvas_BT.shape[1]) < end)
    order_BT = jnp.argsort(jnp.where(open_BT, -score_BT, jnp.inf), axis=1, stable=True)
    rank_BT = jnp.argsort(order_BT, axis=1)
    return jnp.where(rank_BT < count, token_BT, canvas_BT)


@jax.jit
def trunk_alone(model: Transformer, canvas_BT: jax.Array, steps: int) -> jax.Array:
    """Runs only the trunk, `steps` times. No sampler without a cache can be faster than this."""
    canvas_BT = jax.reshard(canvas_BT, mesh.TOKENS_BT)

    def step(_, total):
        h_BTD = model.trunk(canvas_BT + (total > 1e30))  # makes each step depend on the one before
        return total + jnp.sum(h_BTD.astype(jnp.float32))

    return jax.lax.fori_loop(0, steps, step, jnp.float32(0))


def passes_of(model: Transformer, prompt_BT: np.ndarray, config: SamplerConfig, passes: int) -> float:
    """Returns the seconds that so many passes take, which include the start and the transfer of the result."""
    config = resolve(config, model)
    start = time.perf_counter()
    with mesh.mesh_of(model.embedding[...]):
        rows, state = begin(model, prompt_BT, config, jax.random.key(0), None)
        dials, static = arguments(config)
        outcome, _ = denoise(model, rows, state, scalar(passes), dials, config=static)
        np.asarray(outcome.canvas_BT)
    return time.perf_counter() - start


def measure_caches(model: Transformer, prompt_BT: np.ndarray, args: argparse.Namespace) -> None:
    """Prints a JSON line for the exact sampler, and one for each cache with and without a suffix window."""
    blocks, batch = -(-args.gen_length // args.block_length), len(prompt_BT)
    base = SamplerConfig(steps=args.gen_length, gen_length=args.gen_length, block_length=args.block_length)

    def of(config: SamplerConfig, passes: int, repeats: int = args.repeats) -> float:
        """Returns the smallest time, because other load on the machine can only add to it."""
        passes_of(model, prompt_BT, config, 2)  # compiles
        return min(passes_of(model, prompt_BT, config, passes) for _ in range(repeats))

    def show(case: str, **values) -> None:
        rounded = {name: round(x, 4) if isinstance(x, float) else x for name, x in values.items()}
        line = {"benchmark": "caches", "case": case, **rounded, "device": jax.devices()[0].device_kind}
        print(json.dumps(line | {"jax": jax.__version__} | vars(args)), flush=True)

    exact = of(base, args.exact_passes) / args.exact_passes
    show("exact", seconds_per_pass=exact, seconds=exact * args.gen_length, passes=args.exact_passes)
    fast = -(-args.block_length // args.tokens_per_pass)  # passes per block
    settings = [("prefix", 0), ("dual", 0), ("none", args.window), ("prefix", args.window), ("dual", args.window)]
    for cache, window in settings:
        config = dataclasses.replace(base, cache=cache, suffix_window=window)
        few, more = (dataclasses.replace(config, steps=blocks * n) for n in ((1, 2) if cache == "none" else (1, 5)))
        first, second = of(few, 2**30), of(more, 2**30)
        reading = (second - first) / (more.steps - few.steps)
        full = first / blocks
        seconds = {n: blocks * (full + (n - 1) * reading) for n in (args.block_length, fast)}
        show(
            f"cache={cache} suffix_window={window}",
            seconds_per_full_pass=full,
            seconds_per_reading_pass=reading,
            seconds=seconds[args.block_length],
            times_exact=exact * args.gen_length / seconds[args.block_length],
            passes_per_block_when_fast=fast,
            seconds_when_fast=seconds[fast],
            times_exact_when_fast=exact * args.gen_length / seconds[fast],
            tokens_per_second_when_fast=batch * args.gen_length / seconds[fast],
        )
        if cache == "dual":
            whole = dataclasses.replace(config, steps=blocks * fast)
            show(f"cache={cache} suffix_window={window}, measured when fast", seconds=of(whole, 2**30, 1))
    for commit in CHOICES if args.commits else ():
        for cache in ("none", "prefix", "dual"):
            config = dataclasses.replace(base, commit=commit, cache=cache)
            one, five = (of(config, passes, 1) for passes in (1, 5))
            show(f"commit={commit} cache={cache}", first_pass=one, seconds_per_later_pass=(five - one) / 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("caches", "commits"):
        parser.add_argument(f"--{name}", action="store_true")
    sizes = {"layers": 8, "width": 512, "heads": 8, "feed_forward": 1536, "vocab_size": 32000, "batch_size": 1}
    sizes |= {"prompt_length": 448, "gen_length": 64, "steps": 32, "block_length": 32, "repeats": 5, "unroll": 1}
    sizes |= {"tokens_per_pass": 3, "window": 32, "exact_passes": 8}  # of --caches
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()

    architecture = {name: getattr(args, name) for name in ("layers", "width", "heads", "feed_forward", "vocab_size")}
    model_config = ModelConfig(**architecture, kv_heads=args.heads, mask_id=args.vocab_size - 1)
    with jax.set_mesh(mesh.one_device_mesh()):
        model = initialise(model_config, ComputeConfig(unroll=args.unroll), jax.random.key(0))
    prompt_BT = np.random.default_rng(0).integers(0, args.vocab_size - 1, (args.batch_size, args.prompt_length))
    if args.caches:
        measure_caches(model, prompt_BT, args)
        return
    config = SamplerConfig(steps=args.steps, gen_length=args.gen_length, block_length=args.block_length)
    sampled = dataclasses.replace(config, temperature=1.0)
    key = jax.random.key(0)
    canvas_BT = jnp.asarray(np.pad(prompt_BT, ((0, 0), (0, args.gen_length))), jnp.int32)

    def trunk() -> jax.Array:
        with mesh.mesh_of(model.embedding[...]):
            return trunk_alone(model, canvas_BT, args.steps)

    cases: dict[str, Callable[[], jax.Array]] = {
        "generate": lambda: generate(model, prompt_BT, config, key),
        "generate, temperature 1": lambda: generate(model, prompt_BT, sampled, key),
        "plain: head on the whole canvas": lambda: plain(model, prompt_BT, config),
        "trunk alone": trunk,
    }
    results: dict[str, jax.Array] = {}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(args.repeats + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            results[name] = jax.block_until_ready(case())
            if repeat:  # The first run also compiles and is not counted.
                seconds[name].append(time.perf_counter() - start)
            print(f"{repeat} of {args.repeats}: {name}", file=sys.stderr, flush=True)
    same = bool(jnp.all(results["generate"] == results["plain: head on the whole canvas"]))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        line = {
            "benchmark": "sampler",
            "case": name,
            "seconds": round(median, 3),
            "tokens_per_second": round(args.batch_size * args.gen_length / median, 1),
            "ms_per_step": round(1000 * median / args.steps, 2),
            "times_plain": round(medians["plain: head on the whole canvas"] / median, 2),
            "same_tokens_as_plain": same,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "python": platform.python_version(),
        }
        print(json.dumps(line | vars(args)), flush=True)


if __name__ == "__main__":
    main()
