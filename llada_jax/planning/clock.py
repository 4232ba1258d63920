"""Estimates how long a step takes by the compiler's clock: the cycles that it writes to the instructions of a program.

This is the compiler's estimate and the models of `durations`. It has never been compared with a measured step.
"""

import math

from llada_jax.config import Config
from llada_jax.planning import report, schedule, topology
from llada_jax.planning.durations import CYCLES, Rates
from llada_jax.planning.hlo import Module


def simulate(target: str, module: Module, unknown_trips: float, kernel_share: float | None = None) -> schedule.Block:
    """Simulates one step of a compiled train step.

    Args:
      target: The topology that the train step was compiled for, in the form that --topology takes.
      module: The compiled train step.
      unknown_trips: The trip count to assume for a loop whose trip count depends on data.
      kernel_share: The share of the peak that attention kernels are taken to reach; None means that of the chip.
    """
    slices, chip, shape = topology.parse(target)
    rates = Rates(chip, chip.kernel_share if kernel_share is None else kernel_share)
    return schedule.simulate(module, rates, _chips(slices, shape), slices, unknown_trips)


def estimate(
    config: Config, target: str, module: Module, unknown_trips: float, flops: float, kernel_share: float | None = None
) -> dict:
    """Returns how long a step takes by the compiler's estimate, and what the whole run costs by it.

    Args:
      config: The run's configuration.
      target: The topology, as for `simulate`.
      module: The compiled train step.
      unknown_trips: The trip count, as for `simulate`.
      flops: The FLOPs of the model in a step.
      kernel_share: The share of the peak, as for `simulate`.

    Returns:
      A dict of JSON values; `report.summary` has most of them. If the compiler for the chip gives no estimate,
      `estimated_step_seconds` is None and `why_no_estimate` says so.
    """
    slices, chip, shape = topology.parse(target)
    found = report.summary(module, simulate(target, module, unknown_trips, kernel_share)) if chip.clock else None
    if not found or not found["estimated_basis"][CYCLES]:
        reason = f"the compiler for {chip.name} writes none into the compiled program"
        return {"estimated_step_seconds": None, "why_no_estimate": reason}
    seconds, chips, products = found["estimated_step_seconds"], _chips(slices, shape), found["estimated_products"]
    at_peak = products["flops"] / chip.peak_flops
    products["share_of_peak"] = at_peak / products["seconds"] if products["seconds"] else 0.0
    hours = config.minutes / 60 or config.steps * seconds / 3600
    return found | {
        "kernel_share": chip.kernel_share if kernel_share is None else kernel_share,
        "estimated_tokens_per_second": config.batch_size * config.sequence_length / seconds,
        "estimated_mfu": flops / seconds / chips / chip.peak_flops,
        "estimated_recipe_days": hours / 24,
        "estimated_recipe_chip_hours": hours * chips,
    }


def _chips(slices: int, shape: str) -> int:
    return slices * math.prod(int(n) for n in shape.split("x"))
