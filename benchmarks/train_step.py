"""Measures the train step: python benchmarks/train_step.py [--cases=cpu,1b,8b,8b_lora] [--steps=10] [--attention=xla]

Prints one JSON line per case: the median and range of the step time, tokens/s, FLOP/s by the count of
`training.metrics`, MFU if the device's peak is known, and the peak device memory if the backend reports it. The tokens
are random, because the time does not depend on them.
"""

import json
import runpy
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llada_jax.cli import entry_point, paths
from llada_jax.config import Config, UserError
from llada_jax.devices import mesh
from llada_jax.devices.hardware import compiler_options
from llada_jax.diffusion.forward import masked_share
from llada_jax.model import lora
from llada_jax.model.compute import resolve_compute
from llada_jax.model.transformer import Transformer, abstract_model, split
from llada_jax.training import flops as flops_count
from llada_jax.training.step import make_state, make_train_step

_CASES = flags.DEFINE_list("cases", ["cpu"], "Cases to measure: cpu, cpu_lora, quickstart, 150m, 1b, 8b, 8b_lora.")
_ATTENTION = flags.DEFINE_string("attention", None, "Attention kernel. Default: the one chosen for the device.")
_REMAT = flags.DEFINE_string("remat", None, "Value of config.compute.remat. Default: the case's own.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Number of sequences per step. Default: the case's own.")
_PROFILE = paths.define("profile", None, "Folder to write a profiler trace of three additional steps to.")
_LAYERS = flags.DEFINE_integer("layers", None, "Number of layers. Default: the case's own.")
_UNROLL = flags.DEFINE_integer("unroll", None, "Value of config.compute.unroll. Default: the case's own.")
_STEPS = flags.DEFINE_integer("steps", 10, "Number of timed steps, after two steps that are not timed.")


def _config(batch_size: int, sequence_length: int, vocabulary: int, **model) -> Config:
    config = Config(steps=1000, batch_size=batch_size, sequence_length=sequence_length)
    config.model.vocab_size, config.model.mask_id = vocabulary, vocabulary - 1
    for name, value in model.items():
        setattr(config.model, name, value)
    return config


def cpu() -> Config:
    """Returns a model with 8 layers of width 512, large enough that matmuls dominate the time on a CPU."""
    config = _config(8, 512, 32_000, layers=8, width=512, heads=8, kv_heads=8, feed_forward=1536)
    config.compute.unroll, config.compute.remat = 0, "none"
    return config


def quickstart() -> Config:
    """Returns the model and batch of configs/quickstart.py."""
    config = runpy.run_path(str(Path(__file__).parent.parent / "configs" / "quickstart.py"))["get_config"]()
    config.model.vocab_size = -(-config.data.train_tokenizer // 128) * 128
    config.model.mask_id = config.model.vocab_size - 1
    return config


def gpu_150m() -> Config:
    """Returns the model of configs/150m.py with one micro-batch."""
    config = _config(32, 1024, 32_000, layers=12, width=768, heads=12, kv_heads=12, feed_forward=2688)
    config.compute.remat, config.compute.unroll = "none", 0
    return config


def gpu_1b() -> Config:
    """Returns the model of configs/1b.py with a batch of 8 sequences."""
    config = _config(8, 4096, 126_464, layers=22, width=2048, heads=32, kv_heads=4, feed_forward=5634)
    config.compute.remat, config.compute.unroll = "none", 0
    return config


def gpu_8b() -> Config:
    """Returns the model of configs/8b.py with 2 sequences, for one GPU with 141 GB.

    The parameters are in fp32; the moments are in bfloat16, because they would not fit otherwise.
    """
    config = _config(2, 4096, 126_464, layers=32, width=4096, heads=32, kv_heads=32, feed_forward=12_288)
    config.optimizer.state_dtype, config.compute.remat = "bfloat16", "dots"
    return config


def adapted(config: Config) -> Config:
    """Adds low-rank adapters to a case, so that only the adapters are trained."""
    config.model.lora.rank, config.init_from = 16, "random weights"
    return config


def gpu_8b_lora() -> Config:
    """Returns the model of configs/8b_sft.py:lora-h200-1 with one micro-batch of 4 sequences."""
    config = adapted(gpu_8b())
    config.batch_size, config.optimizer.state_dtype = 4, "float32"
    return config


CASES = {
    "cpu": cpu,
    "cpu_lora": lambda: adapted(cpu()),
    "quickstart": quickstart,
    "150m": gpu_150m,
    "1b": gpu_1b,
    "8b": gpu_8b,
    "8b_lora": gpu_8b_lora,
}


def frozen_weights(config: Config) -> dict | None:
    """Returns random frozen weights for a model with adapters, in the compute dtype, or None if it has no adapters."""
    if not config.model.lora.rank:
        return None
    dtype = jnp.dtype(config.compute.dtype)

    @jax.jit
    def make(key):
        frozen = lora.partition(split(Transformer(config.model, config.compute, key))[1])[1]
        return jax.tree.map(lambda x: x.astype(dtype), frozen)

    return make(jax.random.key(0))


def measure(name: str, config: Config, steps: int) -> dict:
    """Measures one case and returns its record."""
    config.mesh.fsdp = -1
    config.batch_size = _BATCH_SIZE.value or config.batch_size
    config.compute.remat = _REMAT.value or config.compute.remat
    config.compute.attention = _ATTENTION.value or config.compute.attention
    config.model.layers = _LAYERS.value or config.model.layers
    config.compute.unroll = config.compute.unroll if _UNROLL.value is None else _UNROLL.value
    config.compute = resolve_compute(config.model, config.compute)
    device_mesh = mesh.make_mesh(config.mesh)
    shape = (config.batch_size, config.sequence_length)
    rng = np.random.default_rng(0)
    with jax.set_mesh(device_mesh):
        graphdef, _ = split(abstract_model(config.model, config.compute))
        state, train_step = (
            make_state(config),
            make_train_step(config, graphdef, compiler_options(jax.devices()[0])),
        )
        batch = {
            "tokens": rng.integers(0, config.model.mask_id, shape).astype(np.int32),
            "length": np.full(config.batch_size, config.sequence_length, np.int32),
        }
        batch = mesh.place_batch(batch, device_mesh, config.batch_size)
        frozen = frozen_weights(config)
        started, seconds = time.perf_counter(), []
        for _ in range(steps + 2):
            state, values = train_step(state, batch, frozen)
            jax.block_until_ready((state, values))
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
        if _PROFILE.value:
            with jax.profiler.trace(f"{_PROFILE.value}/{name}"):
                for _ in range(3):
                    state, values = train_step(state, batch, frozen)
                jax.block_until_ready((state, values))
    compile_seconds, timed = seconds[0], np.array(seconds[2:])
    tokens = config.batch_size * config.sequence_length
    flops = flops_count.flops_per_token(config.model, config.sequence_length, masked_share(config.diffusion)) * tokens
    full = flops_count.flops_per_token(config.model, config.sequence_length, head_share=1.0) * tokens
    device = jax.devices()[0]
    peak, memory = flops_count.peak_flops(device.device_kind), device.memory_stats() or {}
    return {
        "benchmark": "train_step",
        "case": name,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "batch": shape,
        "dtype": config.compute.dtype,
        "attention": config.compute.attention,
        "remat": config.compute.remat,
        "first_step_seconds": round(compile_seconds, 2),
        "step_ms": round(float(np.median(timed)) * 1e3, 2),
        "step_ms_range": [round(float(x) * 1e3, 2) for x in (timed.min(), timed.max())],
        "tokens_per_second": round(tokens / float(np.median(timed))),
        "gflops_per_second": round(flops / float(np.median(timed)) / 1e9, 1),
        "mfu": round(flops / float(np.median(timed)) / peak / jax.device_count(), 4) if peak else None,
        "mfu_full_head": round(full / float(np.median(timed)) / peak / jax.device_count(), 4) if peak else None,
        "peak_gib": round(memory["peak_bytes_in_use"] / 2**30, 2) if "peak_bytes_in_use" in memory else None,
    }


def main() -> None:
    """Measures the cases and prints one line per case."""
    for name in _CASES.value:
        if name not in CASES:
            raise UserError(f"--cases={name}: choose from {', '.join(CASES)}")
        print(json.dumps(measure(name, CASES[name](), _STEPS.value)), flush=True)


if __name__ == "__main__":
    entry_point.run(main)
