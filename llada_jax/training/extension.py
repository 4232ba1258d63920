"""Says what changed settings do to the learning rate of a run that continues, for example when it is extended.

A position in config.optimizer.schedule that is a fraction moves when config.steps changes. The learning rate of a run
that is extended then jumps, often from the end of its decay back to its peak.
"""

from llada_jax.config import Config, OptimizerConfig
from llada_jax.training.optimizer import rate_at, schedule_points

_JUMP = 1.01  # a ratio of two learning rates above which the change is called a jump


def told(name: str) -> bool:
    """Returns whether a change of this setting is told to the user of a run that branches off another one."""
    return name == "steps" or name.startswith("optimizer.")


def effects(before: Config, now: Config, step: int) -> list[str]:
    """Returns lines that say what the changes do to the next step of a run. There are none without such a change.

    Args:
      before: The configuration with which the run was trained so far.
      now: The configuration with which it continues.
      step: The number of steps done.
    """
    old, new = before.optimizer, now.optimizer
    values = [(c.steps, o.schedule, o.peak_learning_rate, o.weight_decay) for c, o in ((before, old), (now, new))]
    if repr(values[0]) == repr(values[1]) or step >= now.steps:
        return []
    rates = rate_at(old, before.steps, step), rate_at(new, now.steps, step)
    decays = rates[0] * old.weight_decay, rates[1] * new.weight_decay
    line = f"the learning rate of step {step + 1} " + _change(*rates)
    line += f"; the weight decay of this step (learning rate x config.optimizer.weight_decay) {_change(*decays)}"
    high, low = max(rates), min(rates)
    same_peak = old.peak_learning_rate == new.peak_learning_rate
    if high > _JUMP * low and before.steps != now.steps and same_peak and _has_fractions(new):
        line += (
            f"; to go on without this jump, give the positions in steps: --config.optimizer.schedule="
            f"'{_in_steps(old, before.steps)}', with further points after step {step} as you like"
        )
    lines = [line]
    if not any(rate_at(new, now.steps, s) for s in _corners(new, now.steps, step)):
        lines.append(
            f"the learning rate is 0 from step {step + 1} to step {now.steps}, so these steps learn nothing: "
            "add points to config.optimizer.schedule"
        )
    return lines


def _change(before: float, now: float) -> str:
    shown = f"{before:.2e}", f"{now:.2e}"
    return f"stays {shown[0]}" if shown[0] == shown[1] else f"changes from {shown[0]} to {shown[1]}"


def _has_fractions(config: OptimizerConfig) -> bool:
    return any(isinstance(position, float) for position, _ in config.schedule)


def _in_steps(config: OptimizerConfig, steps: int) -> str:
    """Returns a schedule as a flag takes it, with every position in steps."""
    points = [f"({round(at)}, {factor:g})" for at, factor in schedule_points(config, steps)]
    return f"({', '.join(points)}{',' if len(points) == 1 else ''})"


def _corners(config: OptimizerConfig, steps: int, step: int) -> list[int]:
    """Returns steps from `step` on, among them one where the learning rate is above 0 if there is any."""
    found = {step, steps - 1}
    for at, _ in schedule_points(config, steps):
        found |= {s for s in (int(at) - 2, int(at) - 1, int(at)) if step <= s < steps}
    return sorted(found)
