"""Finds the collectives in the text of a compiled program: how often each one runs and how many bytes it moves."""

import dataclasses
import math
import re
from collections import Counter, defaultdict

import numpy as np

from llada_jax.planning.hlo import Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # a name in KINDS
    size: int  # bytes of the whole operand or of the whole result on one device, whichever is larger
    group: int  # number of devices that take part
    slices: int  # number of slices (or nodes) that these devices are on
    count: float  # runs per call of the program

    def link_bytes(self) -> float:
        """Returns the least number of bytes that each device must receive from its own slice, summed over all runs."""
        return self._moved(self.group // self.slices) * self.count

    def network_bytes(self) -> float:
        """Returns the least number of bytes that each device must receive from other slices, summed over all runs.

        The devices of one slice are assumed to share this traffic equally.
        """
        return self._moved(self.slices) / (self.group // self.slices) * self.count

    def _moved(self, parties: int) -> float:
        if self.kind == "collective-permute":
            return self.size if parties > 1 else 0
        rounds = 2 if self.kind == "all-reduce" else 1  # one round reduces, the other distributes the result
        return rounds * self.size * (parties - 1) / parties


def collectives(module: Module, devices: int, slices: int, unknown_trips: float) -> list[Collective]:
    """Returns all collectives of an optimised HLO module; a collective in a loop counts once per iteration.

    Args:
      module: The module.
      devices: Number of devices that the program runs on. Every slice has the same number of devices, and the devices
        of one slice have consecutive numbers.
      slices: Number of TPU slices, or of GPU nodes.
      unknown_trips: The trip count to assume for a loop whose trip count depends on data.

    Returns:
      One `Collective` for each collective instruction in a computation that runs.
    """
    found = []
    for name, times in module.runs(unknown_trips).items():
        seen: set[tuple] = set()
        for instruction in module.computations.get(name, ()):
            once = of_instruction(module, name, instruction, devices, slices, seen)
            found += [dataclasses.replace(one, count=times) for one in once]
    return found


def of_instruction(
    module: Module, computation: str, instruction: Instruction, devices: int, slices: int, seen: set[tuple]
) -> list[Collective]:
    """Returns the collectives that an instruction is or that are fused into it, each with a count of 1.

    Args:
      module: The module.
      computation: The name of the computation that the instruction is in.
      instruction: The instruction.
      devices: Number of devices, as for `collectives`.
      slices: Number of slices, as for `collectives`.
      seen: The fused collectives that other instructions of the computation have begun. It is added to. The same
        asynchronous gather appears in several fusions: the one that starts it, those that run beside it, and the one
        that waits for it. Only the first counts.
    """
    found = []
    for place, one in [(computation, instruction), *module.fused(instruction)]:
        if one.opcode == "recv" and "xla_megascale" in one.line:
            # Data for other TPU slices is handed to the hosts, which reduce it with the hosts of those slices.
            found.append(Collective("all-reduce", one.results[0].bytes, slices, slices, 1.0))
            continue
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if one is not instruction:
            channel = re.search(r"channel_id=\d+", one.line)
            key = (kind, channel and channel[0], _groups_text(one.line))
            if key in seen:
                continue
            seen.add(key)
        groups = _groups(one.line, devices, devices // slices)
        crossed = len({partition // (devices // slices) for partition in groups})
        size = _size(one, kind, len(groups))
        if "all-reduce-scatter" in place:
            # The TPU compiler writes a reduce-scatter as an all-reduce of which only a slice is computed.
            kind = "reduce-scatter"
        found.append(Collective(kind, size, len(groups), crossed, 1.0))
    return found


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Returns, for each kind, the number of runs and the bytes received per device over links and over the network."""
    sums: dict[str, Counter] = defaultdict(Counter)
    for one in found:
        sums[one.kind].update(runs=one.count, link_bytes=one.link_bytes(), network_bytes=one.network_bytes())
    return {kind: dict(values) for kind, values in sums.items()}


def _size(one: Instruction, kind: str, parties: int) -> int:
    """Returns the bytes of the result or operand, whichever is larger: a gather's result, a scatter's operand."""
    sizes = [shape.bytes for shape in one.results]
    if one.opcode.endswith("-start") and kind in ("all-gather", "reduce-scatter"):
        return sum(sizes) * parties // (parties + 1)  # The type lists both the operands and the results.
    if kind == "collective-permute":
        return sizes[0]
    return sum(sizes) * (parties if kind == "reduce-scatter" else 1)


def _groups_text(line: str) -> str:
    found = re.search(r"replica_groups=(.*?)(?:, use_global|, dimensions|, metadata|, to_apply|$)", line)
    return found[1] if found else ""


def _groups(line: str, devices: int, per_slice: int) -> list[int]:
    """Returns the device numbers in the first group of a collective.

    For a permutation, returns a source and target that lie on different slices if there is such a pair.
    """
    text = _groups_text(line)
    if found := re.match(r"\{\{([\d,]+)\}", text):
        return [int(n) for n in found[1].split(",")]
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(found[2], found[3]).reshape([int(n) for n in found[1].split(",")])[0].tolist()
    if found := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(sizes.values()))
        named = re.findall(r"'(\w+)'", found[4])
        index = tuple(slice(None) if name in named else 0 for name in sizes)
        return ids.reshape(list(sizes.values()))[index].ravel().tolist()
    if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        pairs = [[int(a), int(b)] for a, b in re.findall(r"(\d+),(\d+)", found[1])]
        return max(pairs, key=lambda pair: pair[0] // per_slice != pair[1] // per_slice)
    return list(range(devices))  # A collective without groups involves all devices.


def _iota(shape: str, order: str | None) -> np.ndarray:
    dims = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).ravel()
