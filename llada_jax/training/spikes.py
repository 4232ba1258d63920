"""Finds the steps whose loss or gradient norm is far above that of the steps before, and says what can be done.

The rule: a value is a spike if it exceeds both FACTORS times the median of the last HISTORY steps, and the median by
DEVIATIONS times their median absolute deviation. The first condition leaves small changes of a smooth curve alone, the
second one the usual changes of a noisy curve. Neither the median nor the deviation moves much when a few values among
the steps before are wild. A step whose loss or gradients are not finite is always a spike. After a spike, none is told
for QUIET steps.
"""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from llada_jax.config import Config

HISTORY, LEAST, QUIET = 128, 32, 100  # steps: how many are compared with, at least and at most; and the pause
FACTORS = {"grad_norm": 4.0, "loss": 2.0}
DEVIATIONS = 10.0
_WORDS = {"grad_norm": "gradient norm", "loss": "loss"}


class Spikes:
    """Compares each step with the steps before.

    Every checkpoint contains `sums`, so that a resumed run says the same as a run without interruption.
    """

    def __init__(self, record: Mapping | None = None):
        """Goes on from the record of a checkpoint, if there is one."""
        self.sums: dict = {"grad_norm": [], "loss": [], "told": -QUIET, **(record or {})}

    def look(self, step: int, values: Mapping) -> dict[str, str | float] | None:
        """Takes the values of the next step.

        Args:
          step: The step.
          values: Its fetched metrics, see `step.make_train_step`.

        Returns:
          None, or what a record of metrics.jsonl says of a spike: "spike/text", and "spike/times", the value over the
          median, unless it is not finite.
        """
        found = None
        if values["skipped"]:
            found = {"spike/text": f"step {step}: the loss or the gradients are not finite; the step is skipped"}
        for name, factor in FACTORS.items():
            value, before = float(values[name]), self.sums[name]
            if not math.isfinite(value):
                continue
            if found is None and len(before) >= LEAST:
                median = statistics.median(before)
                usual = statistics.median(abs(x - median) for x in before)
                if value > factor * median and value > median + DEVIATIONS * usual:
                    times = value / median if median > 0 else math.inf
                    text = f"step {step}: the {_WORDS[name]} is {value:.4g}, {times:.1f} times the median of the "
                    found = {"spike/text": f"{text}{len(before)} steps before ({median:.4g})", "spike/times": times}
            self.sums[name] = [*before[1 - HISTORY :], value]
        if found is None or step < self.sums["told"] + QUIET:
            return None
        self.sums["told"] = step
        return found


def advice(
    text: str,
    rows: Mapping[str, Mapping[str, Sequence[int]]],
    config: Config,
    folder: Path,
    before: int | None,
    step: int,
    argv: Sequence[str],
) -> str:
    """Returns the line that tells of a spike.

    Args:
      text: The "spike/text".
      rows: The rows of the batch, as `Data.origins` returns them.
      config: The configuration of the run.
      folder: The workdir of the run.
      before: The newest checkpoint before the spike; None if there is none.
      step: The step of the spike.
      argv: The command line of the run.
    """
    count = sum(len(places) for shards in rows.values() for places in shards.values())
    path, shards = next(iter(rows.items()))
    shard, places = next(iter(shards.items()))
    told = f"{text}. Its batch has {count:,} rows, such as row {places[0]} of {path}/{shard}; metrics.jsonl has all"
    if before is None:
        return f"{told}. There is no checkpoint before it to branch from"
    again = command(config, folder, before, step, argv)
    return f"{told}. To try again from before it with half the learning rate: {again}"


def command(config: Config, folder: Path, before: int, step: int, argv: Sequence[str]) -> str:
    """Returns the command that branches from checkpoint `before`, with half the learning rate, in a new workdir."""
    replaced = {
        "workdir": f"{folder}-before-{step}",
        "config.init_from": f"{folder}",
        "config.init_step": f"{before}",
        "config.optimizer.peak_learning_rate": f"{config.optimizer.peak_learning_rate / 2:g}",
    }
    if config.minutes:  # a branch counts its steps
        replaced |= {"config.minutes": "0", "config.steps": f"{config.steps}"}
    dropped = {*replaced, "config.init_weights_only", "config.noinit_weights_only"}
    kept, words = [], list(argv[1:])
    while words:
        name, equals, _ = (word := words.pop(0)).lstrip("-").partition("=")
        if name not in dropped:
            kept.append(word)
        elif not equals and words and not words[0].startswith("-"):
            words.pop(0)
    new = [f"--{name}={value}" for name, value in replaced.items()]
    return shlex.join(["python", "-m", "llada_jax.train", *kept, *new])
