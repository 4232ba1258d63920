"""Finds the collectives in the text of a compiled program: how often each one runs and how many bytes it moves."""

import dataclasses
import math
import re
from collections import Counter, defaultdict

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")


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


def collectives(text: str, devices: int, slices: int, unknown_trips: float) -> list[Collective]:
    """Returns all collectives of an optimised HLO module; a collective in a loop counts once per iteration.

    Args:
      text: The text of the module, as `compiled.as_text()` returns it.
      devices: Number of devices that the program runs on. Every slice has the same number of devices, and the devices
        of one slice have consecutive numbers.
      slices: Number of TPU slices, or of GPU nodes.
      unknown_trips: The trip count to assume for a loop whose trip count depends on data.

    Returns:
      One `Collective` for each collective instruction in a computation that runs.
    """
    computations, entry = _computations(text)
    runs = _runs(computations, entry, unknown_trips)
    found = []
    for name, lines in computations.items():
        if not runs[name]:
            continue
        seen = set()
        for place, line in _with_fused(name, lines, computations):
            if " recv(" in line and "xla_megascale" in line:
                # Data for other TPU slices is handed to the hosts, which reduce it with the hosts of those slices.
                found.append(Collective("all-reduce", _shapes(line.split(" recv(")[0])[0], slices, slices, runs[name]))
                continue
            kind = next((kind for kind in KINDS if f" {kind}(" in line or f" {kind}-start(" in line), None)
            if kind is None:
                continue
            # The same asynchronous gather appears in several fusions: the one that starts it, those that run beside
            # it, and the one that waits for it. Count it only once.
            channel = re.search(r"channel_id=\d+", line)
            if line not in lines:
                key = (kind, channel and channel[0], _groups_text(line))
                if key in seen:
                    continue
                seen.add(key)
            groups = _groups(line, devices, devices // slices)
            crossed = len({partition // (devices // slices) for partition in groups})
            size = _size(line, kind, len(groups))
            if "all-reduce-scatter" in place:
                # The TPU compiler writes a reduce-scatter as an all-reduce of which only a slice is computed.
                kind = "reduce-scatter"
            found.append(Collective(kind, size, len(groups), crossed, runs[name]))
    return found


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Returns, for each kind, the number of runs and the bytes received per device over links and over the network."""
    sums: dict[str, Counter] = defaultdict(Counter)
    for one in found:
        sums[one.kind].update(runs=one.count, link_bytes=one.link_bytes(), network_bytes=one.network_bytes())
    return {kind: dict(values) for kind, values in sums.items()}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], [])
            if line.startswith("ENTRY"):
                entry = header[1]
        elif line.rstrip() == "}":  # The whole line: the description of a kernel may contain a line that starts with }.
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str, unknown_trips: float) -> dict[str, float]:
    """Returns how often each computation runs, leaving out the computations of fusions."""
    runs: dict[str, float] = defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for line in computations.get(name, ()):
            found = _INSTRUCTION.match(line)
            if not found or found[2] in ("fusion", *KINDS, "reduce", "scatter", "sort", "custom-call"):
                continue
            inner = _trips(line, computations, unknown_trips) if found[2] == "while" else 1
            for called in _called(line):
                visit(called, times * inner)

    visit(entry, 1.0)
    return runs


def _trips(line: str, computations: dict[str, list[str]], unknown_trips: float) -> float:
    """Returns the trip count of a while instruction.

    This is the annotated trip count if there is one, else the largest constant in the loop's condition, else
    `unknown_trips`.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", line)[1]]
    limits = [int(n) for line in condition for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", line)]
    return max(limits) if limits else unknown_trips


def _called(line: str) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    return [name for names in _CALLED.findall(line) for name in re.findall(r"[\w.\-]+", names)]


def _with_fused(name: str, lines: list[str], computations: dict[str, list[str]]):
    """Yields the instructions of a computation and of its fusions, each with the name of its own computation."""
    for line in lines:
        yield name, line
        if " fusion(" in line:
            for called in _called(line):
                yield from _with_fused(called, computations.get(called, []), computations)


def _size(line: str, kind: str, parties: int) -> int:
    """Returns the bytes of the result or operand, whichever is larger: a gather's result, a scatter's operand."""
    result = re.match(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) (?:all-|reduce-scatter|collective-permute)", line)[1]
    shapes = _shapes(result)
    if f" {kind}-start(" in line and kind in ("all-gather", "reduce-scatter"):
        return sum(shapes) * parties // (parties + 1)  # The type lists both the operands and the results.
    if kind == "collective-permute":
        return shapes[0]
    return sum(shapes) * (parties if kind == "reduce-scatter" else 1)


def _shapes(text: str) -> list[int]:
    """Returns the bytes of each array in the text of a type."""
    return [
        math.prod(int(n) for n in dims.split(",") if n) * _BYTES.get(dtype, 4)
        for dtype, dims in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", text)
    ]


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
