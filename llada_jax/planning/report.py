"""Sums up a simulated step: its duration, where the time goes, and what the figures rest on."""

import dataclasses
from collections import Counter, defaultdict

from llada_jax.planning import parts
from llada_jax.planning.durations import BYTES, CYCLES, KERNEL, TRANSFER, product_flops
from llada_jax.planning.hlo import Module
from llada_jax.planning.schedule import CORE, LINKS, WAIT, Block

DEAREST = 10


@dataclasses.dataclass
class _Cost:
    """What one instruction costs in a step."""

    seconds: float = 0.0
    runs: float = 0.0
    part: str = ""
    in_pass: str = ""
    basis: str = ""
    source: str = ""


def summary(module: Module, block: Block) -> dict:
    """Returns a simulated step as a dict of JSON values.

    The values are:
      estimated_step_seconds: Duration of the step.
      estimated_parts: Seconds of the core, by part of the model and pass. They add up to the step.
      communication_seconds: Seconds that transfers between devices take; "hidden" while the core computes, "exposed"
        while it waits.
      estimated_basis: Seconds of the core, by what they rest on: the compiler's estimate in cycles, the model of
        attention kernels, bytes over the memory's bandwidth where the compiler gives no estimate, transfers that the
        core does itself, and waiting.
      estimated_unknown: The shares of the core's instructions, each as often as it runs, and of its seconds for which
        the compiler gives no estimate. Attention kernels count, and transfers do not.
      estimated_products: Seconds of the instructions with a matrix product, and their FLOPs per second of peak.
      estimated_dearest: The instructions that cost most, with the line of this package that they come from.
    """
    table: dict[str, Counter] = defaultdict(Counter)
    basis, runs, transfers = Counter(), Counter(), Counter()
    costs: dict[str, _Cost] = defaultdict(_Cost)
    for event, times in block.everything():
        seconds = event.seconds * times
        if event.unit == LINKS:
            transfers["started"] += seconds
        if event.unit != CORE:
            continue
        if event.part == parts.COMMUNICATION:
            transfers["exposed"] += seconds
            transfers["started"] += seconds if event.basis == TRANSFER else 0
        table[event.part][event.in_pass] += seconds
        basis[event.basis] += seconds
        runs[event.basis] += times
        cost = costs[event.instruction.name]
        cost.seconds, cost.runs = cost.seconds + seconds, cost.runs + times
        cost.part, cost.in_pass, cost.basis = event.part, event.in_pass, event.basis
        cost.source = cost.source or module.source(event.instruction)
    computed, unknown = (CYCLES, KERNEL, BYTES), (KERNEL, BYTES)
    dearest = sorted(costs.items(), key=lambda item: -item[1].seconds)[:DEAREST]
    return {
        "estimated_step_seconds": block.seconds,
        "estimated_parts": {
            part: {name: table[part][name] for name in parts.PASSES if table[part][name]}
            for part in parts.PARTS
            if part in table
        },
        "communication_seconds": {
            "hidden": max(0.0, transfers["started"] - transfers["exposed"]),
            "exposed": float(transfers["exposed"]),
        },
        "estimated_basis": {name: basis[name] for name in (CYCLES, KERNEL, BYTES, TRANSFER, WAIT)},
        "estimated_unknown": {
            "instructions": _share(runs, unknown, computed),
            "seconds": sum(basis[name] for name in unknown) / block.seconds if block.seconds else 0.0,
        },
        "estimated_products": _products(module, block),
        "estimated_dearest": [
            {"name": name} | {key.replace("in_pass", "pass"): value for key, value in dataclasses.asdict(cost).items()}
            for name, cost in dearest
        ],
    }


def _share(counts: Counter, some: tuple[str, ...], of: tuple[str, ...]) -> float:
    total = sum(counts[name] for name in of)
    return sum(counts[name] for name in some) / total if total else 0.0


def _products(module: Module, block: Block) -> dict:
    """Returns the seconds and the FLOPs of the instructions with a matrix product for which there is an estimate."""
    homes = {one.name: name for name, instructions in module.computations.items() for one in instructions}
    seconds = flops = 0.0
    for event, times in block.everything():
        one = event.instruction
        if event.basis == CYCLES and (count := product_flops(module, homes[one.name], one)):
            seconds, flops = seconds + event.seconds * times, flops + count * times
    return {"seconds": seconds, "flops": flops}


def lines(record: dict) -> list[str]:
    """Formats the estimate in a plan as lines of text for a person."""
    if record.get("estimated_step_seconds") is None:
        return [f"no estimate of the step: {record['why_no_estimate']}"] if "why_no_estimate" in record else []
    step, moved = record["estimated_step_seconds"], record["communication_seconds"]
    basis, unknown = record["estimated_basis"], record["estimated_unknown"]
    products = record["estimated_products"]
    found = [
        f"step by the compiler's estimate, which nobody has checked against a pod: {step:.2f} s, "
        f"{record['estimated_tokens_per_second']:,.0f} tokens/s, MFU {record['estimated_mfu']:.1%}",
        f"recipe at that estimate: {record['estimated_recipe_days']:.1f} days, "
        f"{record['estimated_recipe_chip_hours']:,.0f} chip hours",
        f"  matrix products {products['seconds']:.2f} s, at {products['share_of_peak']:.0%} of peak; attention kernels "
        f"{basis[KERNEL]:.2f} s, taken to run at {record['kernel_share']:.0%} of peak (--kernel_share)",
        f"  communication: {moved['hidden']:.2f} s hidden behind computation, {moved['exposed']:.2f} s exposed",
        f"  the compiler gave no cycles for {unknown['instructions']:.1%} of the instructions that run, which take "
        f"{unknown['seconds']:.1%} of the time here",
        "  seconds".ljust(24) + "".join(name.rjust(12) for name in (*parts.PASSES, "all", "share")),
    ]
    for part, times in record["estimated_parts"].items():
        row = [f"{times[name]:.3f}" if name in times else "" for name in parts.PASSES]
        total = sum(times.values())
        row += [f"{total:.3f}", f"{total / step:.1%}"]
        found.append(f"  {part}".ljust(24) + "".join(cell.rjust(12) for cell in row))
    found.append("  dearest instructions, each with its runs per step:")
    for one in record["estimated_dearest"]:
        kind = f"({one['part']}, {one['pass']})"
        found.append(f"  {one['seconds']:9.3f} s {one['runs']:6,.0f} x {one['name']} {kind} {one['source']}")
    return found
