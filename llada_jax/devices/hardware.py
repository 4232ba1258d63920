"""What is known of each kind of chip: peaks, memory, links, and the compiler options it is driven with.

Figures are the makers' (Cloud TPU documentation and NVIDIA data sheets, read 2026-11). Links count one direction:
what a chip can receive per second, half of the "bidirectional" figure in those sheets; the network's figure is the
pod's or the host's, shared out over its chips (GPUs: one 400 Gbit/s adapter each).
"""

import dataclasses

import jax

from llada_jax.config import UserError

# TPU. The latency-hiding scheduler is on by default there; these give it something to hide.
_TPU = {
    "xla_enable_async_all_gather": True,
    # Reductions over the 'data' axis (slices) may be put off out of the loop over layers and merged, whatever
    # their sizes.
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
# On v5e the tensor core itself carries a gather of the next weights on, in steps between those of a matmul. The
# compiler warns of wrong results and hangs on any other chip; newer ones refuse.
_FUSED = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# v5p and v6e have SparseCores, which gather weights and scatter gradients beside the tensor core; each shape of the
# torus needs its own word. Without, gradients are all-reduced and sliced, and on v5p a gather over the whole torus is
# an all-reduce of zeros and the shard: twice the bytes, and nothing runs beside it. (So the compiled text of libtpu
# 0.0.42 and 0.0.50.) They could take all-reduces over, too: that stays off, said here so that no later default turns
# it on, as training losses were reported to suffer.
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

# NVIDIA Hopper.
_HOPPER = {
    # Gathers and scatters of one layer run beside the matmuls of another.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Two iterations of the scan over layers in flight, or gathers could not run ahead of the layer that needs them.
    "xla_gpu_enable_while_loop_double_buffering": True,
    # Some large transfers instead of many small ones: about one layer of the 8B model's each.
    "xla_gpu_all_gather_combine_threshold_bytes": 536870912,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 536870912,
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator chip."""

    name: str  # as in --topology
    kinds: tuple[str, ...]  # parts of jax.Device.device_kind that mean it
    peak_flops: float  # dense bfloat16, FLOP/s
    memory: float  # bytes
    link: float  # bytes/s a chip can receive from chips of its slice or node
    network: float  # bytes/s a chip can receive from other slices or nodes
    compiler_options: dict[str, bool | int] = dataclasses.field(default_factory=dict)


GIB = 2**30
GPU = ("gpu", "cuda", "rocm")  # names of the platform
CHIPS = (
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 200e9, 3.1e9, _TPU | _FUSED),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 400e9, 12.5e9,
         # More of the vector memory for fusions than by default, so that matmul tiles are larger; not measured by us.
         _TPU | _SPARSE_CORE | _TORUS_2D | {"xla_tpu_scoped_vmem_limit_kib": 65536}),
    Chip("v5p", ("TPU v5",), 459e12, 95 * GIB, 600e9, 6.25e9, _TPU | _SPARSE_CORE | _TORUS_3D),
    Chip("h100", ("H100 80GB HBM3",), 989e12, 80e9, 450e9, 50e9, _HOPPER),
    Chip("h200", ("H200",), 989e12, 141e9, 450e9, 50e9, _HOPPER),
)  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a jax.Device.device_kind means; None if it is not known (a CPU, say)."""
    return next((chip for chip in CHIPS if any(kind in device_kind for kind in chip.kinds)), None)


def chip_named(name: str) -> Chip:
    """The chip of a --topology. UserError if it is not known."""
    for chip in CHIPS:
        if chip.name == name:
            return chip
    raise UserError(f"--topology: no chip {name!r}: choose from {', '.join(chip.name for chip in CHIPS)}")


def compiler_options(device: jax.Device, deterministic: bool = False) -> dict[str, bool | int]:
    """What to give the compiler for this kind of device; {} where nothing is known.

    deterministic: the program gives bitwise the same results every time, and is chosen without timing anything; only
      GPUs need to be told.
    """
    chip = chip_of(device.device_kind)
    options = dict(chip.compiler_options) if chip else {}
    if deterministic and device.platform in GPU:
        options["xla_gpu_deterministic_ops"] = True
    return options
