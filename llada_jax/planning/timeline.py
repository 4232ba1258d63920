"""Shows a simulated step: as a page to look at in a browser, and as a trace for Perfetto (ui.perfetto.dev)."""

import json
from collections.abc import Iterator

from llada_jax.cli import pages
from llada_jax.planning import parts, report
from llada_jax.planning.hlo import Module
from llada_jax.planning.schedule import UNITS, Block, Event


def html(record: dict, module: Module, block: Block) -> str:
    """Returns a page, without any reference to other files, with the timeline of a step and where its time goes.

    Args:
      record: The plan, as `estimate.plan` returns it.
      module: The parsed program.
      block: The simulated step.
    """
    blocks: list[dict] = []
    names: dict[str, int] = {}
    labels: list[list[str]] = []

    def add(one: Block) -> int:
        rows = []
        for event in one.events:
            body = -1 if event.body is None else add(event.body)
            if event.instruction.name not in names:
                names[event.instruction.name] = len(labels)
                labels.append([event.instruction.name, event.instruction.op_name, module.source(event.instruction)])
            rows.append(
                [
                    UNITS.index(event.unit),
                    _micro(event.start),
                    _micro(event.seconds),
                    parts.PARTS.index(event.part),
                    parts.PASSES.index(event.in_pass),
                    names[event.instruction.name],
                    event.basis,
                    body,
                    event.trips,
                ]
            )
        blocks.append({"seconds": one.seconds, "rows": rows})
        return len(blocks) - 1

    data = {
        "entry": add(block),
        "blocks": blocks,
        "labels": labels,
        "units": UNITS,
        "parts": parts.PARTS,
        "passes": parts.PASSES,
        "times": record["estimated_parts"],
        "seconds": block.seconds,
        "title": f"One step on {record['topology']}",
        "notes": report.lines(record)[:5],
        "dearest": record["estimated_dearest"],
    }
    return pages.page(__package__, "timeline", data)


def trace(module: Module, block: Block) -> str:
    """Returns a step in Chrome's trace format, which Perfetto and chrome://tracing read; times are in microseconds."""
    events = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": unit}}
        for number, unit in enumerate(UNITS)
    ]
    for start, event in _placed(block, 0.0):
        one = event.instruction
        events.append(
            {
                "name": f"{one.opcode} x {event.trips:g}" if event.body else one.name,
                "cat": event.part,
                "ph": "X",
                "pid": 0,
                "tid": UNITS.index(event.unit),
                "ts": _micro(start),
                "dur": _micro(event.seconds),
                "args": {"part": event.part, "pass": event.in_pass, "duration from": event.basis, "op": one.op_name}
                | {"line": module.source(one)},
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False, separators=(",", ":"))


def _placed(block: Block, start: float) -> Iterator[tuple[float, Event]]:
    """Yields every event of a step with its start, the iterations of loops one after the other."""
    for event in block.events:
        yield start + event.start, event
        if event.body is not None:
            for turn in range(int(event.trips)):
                yield from _placed(event.body, start + event.start + turn * event.body.seconds)


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 3)
