"""Facts about each kind of chip: peak speed, memory, bandwidths, and the compiler options that suit it.

The figures come from the makers (Cloud TPU documentation and NVIDIA data sheets, read 2026-11). The bandwidth of a
link counts one direction only: the bytes that a chip can receive per second, which is half of the "bidirectional"
figure in those documents. The network bandwidth of a chip is that of its pod or host, divided by the number of chips
there (for GPUs: one 400 Gbit/s adapter per GPU).

The clock of a TPU turns the compiler's estimates, which are in cycles, into seconds. Google does not publish it. It
follows from the published peak and from what the published matrix units (MXUs) multiply in a cycle:

  v5e: 197e12 / (4 MXUs x 128 x 128 x 2) = 1.50 GHz.
  v5p: 459e12 / (2 cores x 4 MXUs x 128 x 128 x 2) = 1.75 GHz.
  v6e: 1.75 GHz is an assumption. The published 2 MXUs of 256 x 256 would need 3.5 GHz for the peak of 918e12, if each
    did one product of 256 numbers per cycle. The compiler's own estimates exceed that rate at 1.75 GHz, so an MXU must
    do two; at another clock, all estimates for v6e scale with it.
"""

import dataclasses
import os

import jax

from llada_jax.config import UserError

# All TPUs. The latency-hiding scheduler is on by default; these options give it transfers that it can overlap with
# computation.
_TPU = {
    "xla_enable_async_all_gather": True,
    # Reductions over the 'data' axis (between slices) may be moved out of the loop over layers and merged, whatever
    # their sizes are.
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
# On v5e the TensorCore itself gathers the next weights, in steps interleaved with the steps of a matmul. For any other
# chip the compiler warns of wrong results and of programs that hang; newer compilers refuse the options.
_FUSED = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# v5p and v6e have SparseCores, which can gather weights and reduce-scatter gradients while the TensorCore computes.
# Each shape of the torus needs an option of its own. Without these options, gradients are all-reduced and then sliced,
# and on v5p a gather over the whole torus becomes an all-reduce of the shard and zeros: it moves twice the bytes, and
# nothing runs at the same time. (The compiled programs of libtpu 0.0.42 and 0.0.50 show this.) SparseCores could also
# do all-reduces. That stays off, because worse training losses were reported with it; the option is set explicitly so
# that no later default turns it on.
_SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": False,
}
_TORUS_2D = {"xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True}
_TORUS_3D = {
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
}

# Fusions may take twice their default share of the vector memory (16 MiB), so that the tiles of matrix products are
# larger. By libtpu 0.0.42.1's own estimate, the products of an 8B step then run at 92 % of v5p's peak instead of 72 %.
# The compiler takes longer (192 s instead of 118 s of CPU time for one layer), and far longer with 64 MiB.
_LARGE_TILES = {"xla_tpu_scoped_vmem_limit_kib": 32768}

# NVIDIA Hopper.
_HOPPER = {
    # Gathers and reduce-scatters of one layer overlap with the matmuls of another layer.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Two iterations of the scan over layers run at the same time; otherwise a gather could not start before the layer
    # that needs it.
    "xla_gpu_enable_while_loop_double_buffering": True,
    # A few large transfers instead of many small ones: each combines about one layer of the 8B model.
    "xla_gpu_all_gather_combine_threshold_bytes": 536870912,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 536870912,
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator chip."""

    name: str  # the name of the chip in --topology
    kinds: tuple[str, ...]  # a jax.Device.device_kind that contains one of these strings means this chip
    peak_flops: float  # dense bfloat16, FLOP/s
    memory: float  # bytes
    link: float  # bytes/s that a chip can receive from the other chips of its slice or node
    network: float  # bytes/s that a chip can receive from other slices or nodes
    memory_bandwidth: float  # bytes/s between the chip and its memory (HBM)
    compiler_options: dict[str, bool | int] = dataclasses.field(default_factory=dict)
    clock: float | None = None  # Hz; None where the compiler estimates no cycles
    # The share of peak_flops that an attention kernel is taken to reach, because the compiler estimates nothing for
    # kernels. An assumption, not a measurement: `plan --kernel_share` changes it. For comparison: the code that libtpu
    # 0.0.42.1 schedules for splash's forward and fused backward kernel (blocks of 512, heads of 128) would reach 70 %
    # on v5e, 68 % on v5p and 27 % on v6e if each block ran all of it and nothing ever stalled.
    kernel_share: float = 0.5


GIB = 2**30
GPU = ("gpu", "cuda", "rocm")  # the names that JAX may use for the platform of a GPU
CHIPS = (
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 200e9, 3.1e9, 819e9,
         _TPU | _FUSED | _LARGE_TILES, 1.5e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 400e9, 12.5e9, 1638e9,
         # Gives fusions more of the vector memory than the default, so that matmul tiles are larger; not measured here.
         _TPU | _SPARSE_CORE | _TORUS_2D | {"xla_tpu_scoped_vmem_limit_kib": 65536}, 1.75e9,
         # Heads are usually 128 wide, and fill half of the rows or columns of an MXU of 256 x 256.
         0.25),
    Chip("v5p", ("TPU v5",), 459e12, 95 * GIB, 600e9, 6.25e9, 2765e9,
         _TPU | _SPARSE_CORE | _TORUS_3D | _LARGE_TILES, 1.75e9),
    Chip("h100", ("H100 80GB HBM3",), 989e12, 80e9, 450e9, 50e9, 3350e9, _HOPPER),
    Chip("h200", ("H200",), 989e12, 141e9, 450e9, 50e9, 4800e9, _HOPPER),
)  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip that a jax.Device.device_kind stands for, or None if it is unknown (a CPU, for example)."""
    return next((chip for chip in CHIPS if any(kind in device_kind for kind in chip.kinds)), None)


def chip_named(name: str) -> Chip:
    """Returns the chip of this name, as --topology gives it. Raises UserError if there is no such chip."""
    for chip in CHIPS:
        if chip.name == name:
            return chip
    raise UserError(f"--topology: there is no chip {name!r}: choose from {', '.join(chip.name for chip in CHIPS)}")


def free_memory(device: jax.Device) -> int | None:
    """Returns the bytes of memory that a device has left, or None if nobody knows.

    A device that does not say what is in use has all of its memory left. CPU devices share the memory of the machine.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if chip := chip_of(device.device_kind):
        return int(chip.memory)
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return None


def compiler_options(device: jax.Device, deterministic: bool = False) -> dict[str, bool | int]:
    """Returns the compiler options for this kind of device.

    Args:
      device: A device of the kind that the program is compiled for.
      deterministic: Whether the program must give bitwise the same results every time, and must be chosen without
        timing any alternatives. Only GPUs need an option for this.

    Returns:
      The options by name; empty if none are known for this kind of device.
    """
    chip = chip_of(device.device_kind)
    options = dict(chip.compiler_options) if chip else {}
    if deterministic and device.platform in GPU:
        options["xla_gpu_deterministic_ops"] = True
    return options
