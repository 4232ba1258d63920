"""Compares attention kernels: python benchmarks/attention.py [--shapes=BxTxHxGxK,...] [--rounds=5]

Measures the forward and backward pass of all kernels that run on this device, and of `jax.nn.dot_product_attention`
without any options (which is dense). The kernels take turns. Prints one JSON line per shape and kernel: the median
time, its ratio to the time of the reference kernel, the temporary memory that the compiler plans, and the largest
difference between the kernel's output and the reference.
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llada_jax.cli import entry_point
from llada_jax.config import ComputeConfig, UserError
from llada_jax.devices import mesh
from llada_jax.model.attention import KERNELS, attention, choose_kernel
from llada_jax.model.compute import compute_dtype

_SHAPES = flags.DEFINE_list(
    "shapes", ["2x1024x8x8x64"], "Shapes, each batch x tokens x heads x key/value heads x head width."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds, after an untimed one. Each kernel runs once per round.")
_DTYPE = flags.DEFINE_string("dtype", "", "float32 or bfloat16. Default: the compute dtype for this device.")


def _runs(dtype: jnp.dtype, width: int) -> dict:
    """Returns the functions of q, k and v by the name of their kernel, for all kernels that run on this device."""
    runs = {"jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v)}
    for name in KERNELS:
        if name == "splash_interpreted":
            continue
        try:
            choose_kernel(name, dtype, width, jax.devices()[0])
        except UserError:
            continue
        runs[name] = functools.partial(attention, real=None, kernel=name)
    return runs


def measure(shape: tuple[int, ...], dtype: jnp.dtype, rounds: int) -> list[dict]:
    """Measures all kernels for one shape and returns one record per kernel."""
    batch, length, heads, groups, width = shape
    keys = jax.random.split(jax.random.key(0), 4)
    with jax.set_mesh(mesh.one_device_mesh()):
        q, k, v, dout = (
            jax.device_put(jax.random.normal(key, (batch, length, n, width), dtype), mesh.HEADS_BTHK)
            for key, n in zip(keys, (heads, groups, groups, heads), strict=True)
        )
        steps, outs, memory = {}, {}, {}
        for name, run in _runs(dtype, width).items():

            def loss(q, k, v, dout, run=run):
                out = run(q, k, v)
                return jnp.sum((out * dout).astype(jnp.float32)), out

            steps[name] = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)).lower(q, k, v, dout).compile()
            memory[name] = steps[name].memory_analysis().temp_size_in_bytes
            outs[name] = np.asarray(steps[name](q, k, v, dout)[0][1], np.float32)
        seconds = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                started = time.perf_counter()
                jax.block_until_ready(step(q, k, v, dout))
                seconds[name].append(time.perf_counter() - started)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    # Two matmuls in the forward pass and four in the backward pass, as MFU counts them. FLOPs that a kernel spends on
    # computing something again do not count.
    flops = 12 * batch * length * length * heads * width
    device = jax.devices()[0]
    return [
        {
            "benchmark": "attention",
            "shape_BTHGK": shape,
            "dtype": dtype.name,
            "kernel": name,
            "jax": jax.__version__,
            "device": device.device_kind,
            "ms": round(median[name] * 1e3, 3),
            "ms_range": [round(f(seconds[name]) * 1e3, 3) for f in (min, max)],
            "time_over_reference": round(median[name] / median["reference"], 3),
            "tflops_per_second": round(flops / median[name] / 1e12, 3),
            "temporary_mib": round(memory[name] / 2**20, 1),
            "largest_difference": float(f"{np.abs(outs[name] - outs['reference']).max():.2g}"),
        }
        for name in steps
    ]


def main() -> None:
    """Prints the records of all shapes."""
    dtype = compute_dtype(ComputeConfig(dtype=_DTYPE.value))
    for text in _SHAPES.value:
        parts = text.split("x")
        if len(parts) != 5 or not all(part.isdigit() for part in parts):
            raise UserError(f"--shapes={text}: write five numbers joined by x, e.g. 2x1024x8x8x64")
        for record in measure(tuple(map(int, parts)), dtype, _ROUNDS.value):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    entry_point.run(main)
