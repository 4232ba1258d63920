"""Reads the text of an optimised HLO module: computations, instructions in their order, loops, and where they are from.

The text is what `compiled.as_text()` returns. If the module is scheduled, which optimised modules are, the order of the
instructions of a computation is the order in which the device starts them.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_UNKNOWN_CYCLES = 2**62  # The TPU compiler writes 2 ** 63 - 1 where it has no estimate.


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: str  # "" is the device's main memory (HBM); "S(1)" is the vector memory of a TPU

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The number of bytes, without padding."""
        return self.elements * _BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 4)


def shapes(text: str) -> list[Shape]:
    """Returns the arrays in the text of a type, in their order."""
    return [
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), space or "")
        for dtype, dims, space in _SHAPE.findall(text)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    type: str  # the text of the type of its result
    opcode: str
    line: str  # the whole text

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands."""
        start = self.line.index(f" {self.opcode}(", self.line.index(" = ")) + len(self.opcode) + 2
        depth, end = 1, start
        while depth and end < len(self.line):
            depth += {"(": 1, ")": -1}.get(self.line[end], 0)
            end += 1
        return tuple(re.findall(r"%([\w.\-]+)", self.line[start:end]))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that this instruction calls."""
        return tuple(name for names in _CALLED.findall(self.line) for name in re.findall(r"[\w.\-]+", names))

    @functools.cached_property
    def results(self) -> list[Shape]:
        """The arrays of the result."""
        return shapes(self.type)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of the cycles that this instruction takes, None if it gives no estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(found[1]) if found and int(found[1]) < _UNKNOWN_CYCLES else None

    @property
    def op_name(self) -> str:
        """The path of JAX's name scopes and transformations that this instruction comes from, "" if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """Returns the value of an attribute that is a plain word, as in `custom_call_target="x"` or `body=%x`."""
        found = re.search(rf'\b{name}="?%?([\w.\-]+)', self.line)
        return found[1] if found else None


class Module:
    """A parsed module.

    Attributes:
      computations: The instructions of each computation in their order, by the computation's name.
      entry: The name of the computation that runs first.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._tables: dict[str, dict[int, str]] = defaultdict(dict)
        table, lines = None, None
        texts: dict[str, list[str]] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                lines, table = texts.setdefault(header[1], []), None
                if line.startswith("ENTRY"):
                    self.entry = header[1]
            elif line.rstrip() == "}":
                lines = None  # The whole line: the description of a kernel may contain a line that starts with }.
            elif lines is not None:
                if lines and not re.match(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", line):
                    lines[-1] += line  # The description of a kernel may contain line breaks.
                else:
                    lines.append(line)
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables[line]
            elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
                table[int(row[1])] = row[2]
        for name, found in texts.items():
            parsed = ((_INSTRUCTION.match(line), line) for line in found)
            self.computations[name] = [Instruction(*match.groups(), line) for match, line in parsed if match]
        self._by_name = {
            computation: {one.name: one for one in instructions}
            for computation, instructions in self.computations.items()
        }

    def find(self, computation: str, name: str) -> Instruction | None:
        """Returns the instruction of this name in a computation, or None."""
        return self._by_name.get(computation, {}).get(name)

    def operand_shapes(self, computation: str, instruction: Instruction) -> list[list[Shape]]:
        """Returns the arrays of each operand of an instruction; an operand that is not in the text has none."""
        found = (self.find(computation, name) for name in instruction.operands)
        return [one.results if one else [] for one in found]

    def fused(self, instruction: Instruction) -> list[tuple[str, Instruction]]:
        """Returns the instructions that a fusion consists of, each with the name of its own computation.

        Instructions of nested fusions are included. For anything but a fusion the result is empty.
        """
        inner = []
        for name in instruction.called if instruction.opcode == "fusion" else ():
            for one in self.computations.get(name, ()):
                inner += [(name, one), *self.fused(one)]
        return inner

    def trips(self, loop: Instruction, unknown: float) -> float:
        """Returns the trip count of a while instruction.

        This is the annotated trip count if there is one, else the largest constant in the loop's condition, else
        `unknown`.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition"), ())
        limits = [int(n) for one in condition for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", one.line)]
        return max(limits) if limits else unknown

    def runs(self, unknown_trips: float) -> dict[str, float]:
        """Returns how often each computation runs, leaving out the computations of fusions and of reductions.

        Args:
          unknown_trips: The trip count to assume for a loop whose trip count depends on data.
        """
        runs: dict[str, float] = defaultdict(float)

        def visit(name: str, times: float) -> None:
            runs[name] += times
            for one in self.computations.get(name, ()):
                if one.opcode in _NOT_ENTERED:
                    continue
                inner = self.trips(one, unknown_trips) if one.opcode == "while" else 1
                for called in one.called:
                    visit(called, times * inner)

        visit(self.entry, 1.0)
        return runs

    def source(self, instruction: Instruction) -> str:
        """Returns "llada_jax/path.py:line" of the line of this package that an instruction comes from, "" if unknown.

        That is the innermost line, but not one of a private or nested function if the same file has its caller: the
        line that calls `linear` says more than the only einsum in it.
        """
        found = re.search(r"stack_frame_id=(\d+)", instruction.line)
        frames = list(self._frames(int(found[1]) if found else 0))
        if not frames:
            plain = re.search(rf'source_file="[^"]*({_PACKAGE}[^"]*)" source_line=(\d+)', instruction.line)
            return f"{plain[1]}:{plain[2]}" if plain else ""
        near = [frame for frame in frames if frame[0] == frames[0][0]]
        path, line, _ = next((frame for frame in near if not _is_helper(frame[2])), frames[0])
        return f"{path}:{line}"

    def _frames(self, frame: int) -> Iterator[tuple[str, str, str]]:
        """Yields (path, line, function) of the lines of this package in a stack, from the inside out."""
        while row := self._tables["StackFrames"].get(frame):
            location, parent = (int(n) for n in re.findall(r"=(\d+)", row)[:2])
            place = dict(re.findall(r"(\w+)=(\d+)", self._tables["FileLocations"].get(location, "")))
            path = self._tables["FileNames"].get(int(place.get("file_name_id", 0)), "").strip('"')
            function = self._tables["FunctionNames"].get(int(place.get("function_name_id", 0)), "").strip('"')
            if _PACKAGE in path and f"{_PACKAGE}planning/" not in path:
                yield _PACKAGE + path.rpartition(_PACKAGE)[2], place["line"], function
            # Parents are counted from 1, and 1 means that there is no parent. A parent comes before its frames.
            frame = min(parent, frame) - 1


def _is_helper(function: str) -> bool:
    name = function.rpartition(".")[2]
    return "<locals>" in function or (name.startswith("_") and not name.endswith("__"))


_PACKAGE = "llada_jax/"
# The computations that these call say what the instruction does; they are not steps of the program.
_NOT_ENTERED = frozenset(
    ("fusion", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    + ("reduce", "reduce-window", "select-and-scatter", "scatter", "sort", "map", "custom-call")
)
