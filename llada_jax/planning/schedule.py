"""Simulates one step of a compiled program: what its core, links and copy engine do, and when.

The core runs the instructions in the order of the module. A transfer or copy that is started runs on its own unit
beside what follows, and the instruction that ends it makes the core wait for the rest. A loop is simulated once and
takes as long as its trip count says. Each unit does one thing at a time at its full rate; that units take bandwidth
from each other is not modelled, and neither is the start of a loop's iteration before the one ahead of it has ended.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

from llada_jax.planning import parts
from llada_jax.planning.collectives import KINDS, of_instruction
from llada_jax.planning.durations import BYTES, FREE, TRANSFER, Rates, copied_bytes, duration
from llada_jax.planning.hlo import Instruction, Module

CORE, LINKS, COPIES, SPARSE_CORE = UNITS = ("core", "links", "copies", "sparse core")
WAIT, LOOP = "wait", "loop"  # further values of Event.basis


@dataclasses.dataclass
class Event:
    """One thing that a unit does, or a loop of the core.

    Attributes:
      instruction: The instruction that it comes from.
      unit: A name in UNITS.
      start: Seconds since the start of the block.
      seconds: How long it takes; for a loop, all its iterations.
      basis: What the duration rests on, see `durations`; or WAIT, or LOOP.
      part: A name in parts.PARTS.
      in_pass: A name in parts.PASSES.
      body: The block of one iteration, for a loop.
      trips: The number of iterations, for a loop.
    """

    instruction: Instruction
    unit: str
    start: float
    seconds: float
    basis: str
    part: str
    in_pass: str | None
    body: "Block | None" = None
    trips: float = 1.0


@dataclasses.dataclass
class Block:
    """The simulated instructions of one computation, run once."""

    name: str
    events: list[Event]
    seconds: float

    def everything(self, times: float = 1.0) -> Iterator[tuple[Event, float]]:
        """Yields every event, those in loops included but not the loops, with how often it happens."""
        for event in self.events:
            if event.body is None:
                yield event, times
            else:
                yield from event.body.everything(times * event.trips)


def simulate(module: Module, rates: Rates, devices: int, slices: int, unknown_trips: float) -> Block:
    """Simulates the entry computation of a module.

    Args:
      module: A scheduled module.
      rates: The rates of the chip.
      devices: Number of devices, as for `collectives.collectives`.
      slices: Number of slices, as for `collectives.collectives`.
      unknown_trips: The trip count to assume for a loop whose trip count depends on data.
    """
    return _Simulation(module, rates, devices, slices, unknown_trips).block(module.entry)


@dataclasses.dataclass
class _Simulation:
    module: Module
    rates: Rates
    devices: int
    slices: int
    unknown_trips: float

    def block(self, name: str) -> Block:
        """Simulates one computation."""
        run = _Run(self, name)
        for instruction in self.module.computations.get(name, ()):
            run.step(instruction)
        # What does not say to which pass it belongs is taken to belong to the pass of most of the computation.
        usual = _usual_pass(event for event in run.events if event.body is None) or parts.UPDATE
        for event in run.events:
            event.in_pass = event.in_pass or usual
        return Block(name, run.events, run.now)


class _Run:
    """One pass over the instructions of a computation."""

    def __init__(self, simulation: _Simulation, name: str):
        self.simulation, self.name = simulation, name
        self.events: list[Event] = []
        self.now = 0.0
        self.free_at = dict.fromkeys(UNITS, 0.0)  # when each unit has done what was started on it
        self.ends: dict[str, tuple[float, str]] = {}  # of what was started: when it ends, and on which unit
        self.fused: set[tuple] = set()  # the fused collectives that have been started

    def step(self, one: Instruction) -> None:
        """Moves the core past one instruction."""
        simulation, module = self.simulation, self.simulation.module
        if one.opcode == "while":
            body = simulation.block(one.attribute("body"))
            self._loop(one, body, module.trips(one, simulation.unknown_trips))
        elif one.opcode == "conditional":  # The longest branch; the predicate depends on data.
            branches = [simulation.block(name) for name in one.called]
            self._loop(one, max(branches, key=lambda block: block.seconds), 1)
        elif one.opcode == "call":
            self._loop(one, simulation.block(one.attribute("to_apply")), 1)
        elif one.opcode.endswith("-done"):
            self._wait(one, [name for name in one.operands if name in self.ends])
        elif one.opcode.endswith("-start"):
            self._start(one)
        elif one.opcode.endswith("-update"):
            started = [self.ends[name] for name in one.operands if name in self.ends]
            self.ends |= dict.fromkeys([one.name], started[0]) if started else {}
        else:
            self._work(one)

    def _collectives(self, one: Instruction) -> list:
        at = self.simulation
        return of_instruction(at.module, self.name, one, at.devices, at.slices, self.fused)

    def _work(self, one: Instruction) -> None:
        """Handles an instruction that runs on the core, and fusions that start or end a transfer."""
        module, rates = self.simulation.module, self.simulation.rates
        inner = [inside for _, inside in module.fused(one)]
        targets = {inside.attribute("custom_call_target") for inside in inner if inside.opcode == "custom-call"}
        seconds = rates.transfer(self._collectives(one))
        if seconds and ("AsyncCollectiveStart" in targets or one.opcode == "recv"):
            self._begin(one, LINKS, seconds, TRANSFER, [one.name, *filter(None, map(_channel, inner))])
            seconds = 0.0
        elif "AsyncCollectiveDone" in targets:
            self._wait(one, [channel for inside in inner if (channel := _channel(inside)) in self.ends])
        if seconds:  # The core does nothing else while it takes part in a collective.
            begin = max(self.now, self.free_at[LINKS])
            self._add(one, CORE, self.now, begin + seconds - self.now, TRANSFER, parts.COMMUNICATION)
            self.now = self.free_at[LINKS] = begin + seconds
        if one.opcode in KINDS or (not targets.isdisjoint(_ASYNC) and one.cycles is None):
            return
        busy, basis = duration(module, self.name, one, rates)
        if basis == BYTES and seconds:
            return  # The collective in it is what it does.
        if basis != FREE:
            self._add(one, CORE, self.now, busy, basis, parts.part_of(module, one))
            self.now += busy

    def _start(self, one: Instruction) -> None:
        """Starts a collective, a copy or a computation of the SparseCore."""
        simulation = self.simulation
        inside = [] if one.opcode.removesuffix("-start") in KINDS else list(one.called)
        collectives, seconds = self._collectives(one), 0.0
        for name in inside:
            for called in simulation.module.computations.get(name, ()):
                collectives += of_instruction(
                    simulation.module, name, called, simulation.devices, simulation.slices, self.fused
                )
                seconds += duration(simulation.module, name, called, simulation.rates)[0]
        if collectives:
            self._begin(one, LINKS, simulation.rates.transfer(collectives), TRANSFER, [one.name])
        elif inside:
            self._begin(one, SPARSE_CORE, seconds, BYTES, [one.name])
        else:
            copied = copied_bytes(one) / simulation.rates.chip.memory_bandwidth
            self._begin(one, COPIES, copied, BYTES, [one.name])

    def _begin(self, one: Instruction, unit: str, seconds: float, basis: str, names: list[str]) -> None:
        begin = max(self.now, self.free_at[unit])
        part = {LINKS: parts.COMMUNICATION, COPIES: parts.COPIES}.get(unit)
        self._add(one, unit, begin, seconds, basis, part or parts.part_of(self.simulation.module, one))
        self.free_at[unit] = begin + seconds
        self.ends |= dict.fromkeys(names, (begin + seconds, unit))

    def _wait(self, one: Instruction, names: list[str]) -> None:
        """Makes the core wait until what was started under these names has ended."""
        for name in names:
            end, unit = self.ends[name]
            if end > self.now:
                part = {LINKS: parts.COMMUNICATION, COPIES: parts.COPIES}.get(unit, parts.OTHER)
                self._add(one, CORE, self.now, end - self.now, WAIT, part)
                self.now = end

    def _loop(self, one: Instruction, body: Block, trips: float) -> None:
        if body.seconds:
            seconds = body.seconds * trips
            usual = _usual_pass(body.events)
            self.events.append(Event(one, CORE, self.now, seconds, LOOP, parts.OTHER, usual, body, trips))
            self.now += seconds

    def _add(self, one: Instruction, unit: str, start: float, seconds: float, basis: str, part: str) -> None:
        in_pass = parts.pass_of(self.simulation.module, one)
        self.events.append(Event(one, unit, start, seconds, basis, part, in_pass))


def _usual_pass(events: Iterable[Event]) -> str | None:
    """Returns the pass that most of the events' time belongs to, None if none of them says."""
    seconds: Counter = Counter()
    for event in events:
        if event.in_pass:
            seconds[event.in_pass] += event.seconds
    return seconds.most_common(1)[0][0] if seconds else None


_ASYNC = ("AsyncCollectiveStart", "AsyncCollectiveDone")


def _channel(inside: Instruction) -> str:
    """Returns the name under which a fused collective is known in the fusions that start, carry and end it."""
    kind = inside.opcode if inside.opcode in KINDS else ""
    return f"{kind} of channel {inside.attribute('channel_id')}" if kind else ""
