"""Describes TPU slices and GPU nodes that need not be present, so that any machine can compile for them."""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from llada_jax.config import UserError
from llada_jax.devices.hardware import Chip, chip_named

# The description of a device that the GPU compiler needs, in the text form of its GpuTargetConfigProto. The values are
# NVIDIA's figures for Hopper SXM. {memory} and {bandwidth} differ between H100 and H200.
_HOPPER = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}}
"""
LARGEST = {"v5e": 256, "v6e": 256, "v5p": 6144}  # the largest number of chips in one slice


@dataclasses.dataclass(frozen=True)
class Topology:
    """The hardware that a --topology describes."""

    chip: Chip
    slices: int  # TPU slices joined by the data-center network, or GPU nodes
    devices: list  # the described devices of all slices or nodes


def parse(text: str) -> tuple[int, Chip, str]:
    """Splits a topology in the form "[SLICESx]CHIP:SHAPE", as in "2xv5p:4x4x8", into its parts.

    Returns:
      The number of slices, the chip and the text of the shape.

    Raises:
      UserError: If the text does not have this form, or the chip is unknown.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)*)", text)
    if not found:
        raise UserError(f"--topology={text!r}: write [SLICESx]CHIP:SHAPE, e.g. v5p:4x4x8, 2xv5p:4x4x8 or h200:8")
    return int(found[1] or 1), chip_named(found[2]), found[3]


def describe(text: str) -> Topology:
    """Returns the chip, the slices and the described devices of a topology.

    Args:
      text: The topology, in the form that `parse` takes.

    Raises:
      UserError: If the compiler for the topology is not installed, or no hardware of this shape exists.
    """
    slices, chip, shape = parse(text)
    lengths = [int(n) for n in shape.split("x")]
    if min(lengths) < 1 or slices > 1024 or math.prod(lengths) > LARGEST.get(chip.name, 1024):
        raise UserError(
            f"--topology={text}: no such number of chips: a slice or node of {chip.name} has 1 to "
            f"{LARGEST.get(chip.name, 1024)}, and at most 1024 slices or nodes can be joined"
        )
    if chip.name.startswith("v"):
        if len(lengths) != (dimensions := 3 if chip.name == "v5p" else 2):
            raise UserError(
                f"--topology={text}: a slice of {chip.name} has {dimensions} dimensions, not {len(lengths)}"
            )
        return Topology(chip, slices, _tpu(text, chip, shape, slices))
    if "x" in shape:
        raise UserError(
            f"--topology={text}: GPUs are given by their number per node, e.g. {chip.name}:8, or 2x{chip.name}:8 for "
            "two nodes"
        )
    return Topology(chip, slices, _gpu(text, chip, int(shape), slices))


def prepare_environment() -> None:
    """Sets the environment variables that let a machine without TPUs and GPUs compile for them.

    Call this before a JAX backend or libtpu is loaded, because libtpu would otherwise look for a TPU.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Without it, two plans at once abort on a lock file.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # libtpu requires a value, but a plan does not use it.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def installed(chip: str) -> bool:
    """Returns whether the compiler for the chip with this name is installed."""
    return any(importlib.util.find_spec(package) for package in _compilers(chip))


def _compilers(chip: str) -> tuple[str, ...]:
    return ("libtpu",) if chip.startswith("v") else ("jax_cuda13_plugin", "jax_cuda12_plugin")


def _tpu(text: str, chip: Chip, shape: str, slices: int) -> list:
    if not installed(chip.name):
        raise UserError(f'--topology={text} needs the TPU compiler: pip install "jax[tpu]" (no TPU is needed)')
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{shape}", **({"num_slices": slices} if slices > 1 else {})
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"--topology={text}: no such slice exists: {str(error).splitlines()[0]}") from None


def _gpu(text: str, chip: Chip, count: int, nodes: int) -> list:
    if not installed(chip.name):
        raise UserError(f'--topology={text} needs the GPU compiler: pip install "jax[cuda13]" (no GPU is needed)')
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=chip.name,
        topology=f"1x{nodes}x{count}",
        target_config=_HOPPER.format(
            name="NVIDIA " + chip.kinds[0], memory=int(chip.memory), bandwidth=int(chip.memory_bandwidth)
        ),
    ).devices
