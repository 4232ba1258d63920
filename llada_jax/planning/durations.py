"""Says how long one instruction of a compiled program takes on a chip, and what that figure rests on.

The TPU compiler writes its own estimate, in cycles, to most instructions. It has none for kernels, transfers between
devices and some other instructions; for these, this module computes a time from FLOPs, bytes and the chip's rates.
Nothing here has been compared with a chip.
"""

import dataclasses
import math
import re

from llada_jax.devices.hardware import Chip
from llada_jax.planning.collectives import Collective
from llada_jax.planning.hlo import Instruction, Module, Shape
from llada_jax.planning.parts import PRODUCTS

# What a duration rests on: the compiler's cycles, the model of attention kernels, bytes over the memory's bandwidth
# because the compiler did not say, bytes over links and network, or nothing because the instruction takes no time.
CYCLES, KERNEL, BYTES, TRANSFER, FREE = "compiler", "kernel model", "bytes", "transfer", "free"

# These name values or memory and compute nothing.
_NO_WORK = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "add-dependency", "opt-barrier")
    + ("partition-id", "replica-id", "send", "send-done", "domain", "get-dimension-size")
)
KERNEL_TARGET = "tpu_custom_call"  # any other custom call of the TPU compiler is a note to itself
# Products of a (queries, keys) matrix that an attention kernel computes, by a part of its name; the first that fits.
_MATMULS = (("_dq", 3), ("_dkv", 4), ("_fwd", 2))
_FUSED_DKV = 5  # The fused backward kernel computes the scores once for all three gradients.


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rates that durations are computed with."""

    chip: Chip
    kernel_share: float  # share of the chip's peak that attention kernels reach

    def transfer(self, collectives: list[Collective]) -> float:
        """Returns the seconds that collectives need if links and network run at the chip's rates."""
        links = sum(one.link_bytes() for one in collectives) / self.chip.link
        return links + sum(one.network_bytes() for one in collectives) / self.chip.network


def duration(module: Module, computation: str, instruction: Instruction, rates: Rates) -> tuple[float, str]:
    """Returns the seconds that an instruction keeps the device's core busy, and what this rests on.

    Transfers, asynchronous instructions and loops are not handled here; see `schedule`.
    """
    chip = rates.chip
    if chip.clock and (cycles := instruction.cycles) is not None:
        return cycles / chip.clock, CYCLES
    if instruction.opcode in _NO_WORK:
        return 0.0, FREE
    if instruction.opcode == "custom-call":
        if instruction.attribute("custom_call_target") != KERNEL_TARGET:
            return 0.0, FREE
        moved = _bytes(module, computation, instruction) / chip.memory_bandwidth
        flops = kernel_flops(module, computation, instruction)
        if not flops:
            return moved, BYTES
        return max(flops / (chip.peak_flops * rates.kernel_share), moved), KERNEL
    operands = [shape for operand in module.operand_shapes(computation, instruction) for shape in operand]
    if not any(shape.dims for shape in (*operands, *instruction.results)):
        return 0.0, FREE  # The scalar unit computes it beside everything else.
    flops = product_flops(module, computation, instruction)
    return max(_bytes(module, computation, instruction) / chip.memory_bandwidth, flops / chip.peak_flops), BYTES


def kernel_flops(module: Module, computation: str, instruction: Instruction) -> float:
    """Returns the FLOPs of an attention kernel, 0 if this is another kernel.

    The first two float operands with a head dimension are the queries (..., T, K) and the keys (..., S, K). Each of the
    kernel's products costs 2 B H T S K.
    """
    path = instruction.op_name + instruction.name
    count = next((count for part, count in _MATMULS if part in path), 0)
    if count == 4 and re.search(r"use_fused_bwd_kernel\W+true", instruction.line):
        count = _FUSED_DKV
    operands = module.operand_shapes(computation, instruction)
    heads = [shape for (shape,) in (one for one in operands if len(one) == 1) if _is_matrix(shape)]
    if not count or len(heads) < 2:
        return 0.0
    queries, keys = heads[:2]
    return count * 2.0 * queries.elements * keys.dims[-2]


def product_flops(module: Module, computation: str, instruction: Instruction) -> float:
    """Returns the FLOPs of the matrix products in an instruction.

    A product of (M, K) and (K, N) has M K, K N and M N elements in its operands and its result, whatever the layout and
    the names of the dimensions: 2 M K N is twice the root of their product. Batch dimensions are in all three.
    """
    flops = 0.0
    for place, one in [(computation, instruction), *module.fused(instruction)]:
        if one.opcode not in PRODUCTS:
            continue
        operands = module.operand_shapes(place, one)
        if len(operands) != 2 or not all(operands):
            continue
        (lhs, *_), (rhs, *_) = operands
        batch = re.search(r"lhs_batch_dims=\{([\d,]+)\}", one.line)
        shared = math.prod(lhs.dims[int(n)] for n in batch[1].split(",")) if batch else 1
        flops += 2 * math.sqrt(lhs.elements * rhs.elements * one.results[0].elements / shared)
    return flops


def copied_bytes(instruction: Instruction) -> float:
    """Returns the bytes that an asynchronous copy reads from and writes to main memory.

    The result of the instruction that starts it lists the source, the destination and a flag. Of a copy between the
    main and the vector memory, only one side is in main memory.
    """
    arrays = [shape for shape in instruction.results if shape.dims]
    if not arrays:
        return 0.0
    sides = 1 if any(shape.space for shape in arrays) else 2
    return sides * min(shape.bytes for shape in arrays)


def _bytes(module: Module, computation: str, instruction: Instruction) -> float:
    """Returns the bytes that an instruction reads from and writes to main memory."""
    operands = [shape for one in module.operand_shapes(computation, instruction) for shape in one]
    results = instruction.results
    opcodes = {one.opcode for one in [instruction, *(one for _, one in module.fused(instruction))]}
    if "scatter" in opcodes:  # The result takes the place of an operand; only the rows of the updates are touched.
        updates = [shape for shape in operands if shape.dims not in [result.dims for result in results]]
        return 3 * _main(updates)
    if "gather" in opcodes:  # Of the table, only the rows of the result are read.
        return 2 * _main(results)
    return _main(operands) + _main(results)


def _main(found: list[Shape]) -> float:
    return float(sum(shape.bytes for shape in found if not shape.space))


def _is_matrix(shape: Shape) -> bool:
    return shape.dtype in ("bf16", "f16", "f32") and len(shape.dims) >= 3
