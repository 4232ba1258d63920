"""Trains a model: python -m llada_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command, started again, continues from the newest complete checkpoint. On several hosts, start the command on
each host.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from llada_jax.cli import entry_point, huge_pages, paths, process_flags
from llada_jax.config import Config, UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, e.g. configs/quickstart.py")
_WORKDIR = paths.define(
    "workdir", None, "The folder that the checkpoints, metrics and samples of the run are written to."
)
flags.adopt_module_key_flags(process_flags)


def main() -> int:
    """Trains as the flags say and returns the exit code."""
    config = entry_point.config_of(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: name a folder for the checkpoints, metrics and samples")
    _choose_length(config, config_flags.get_override_values(flags.FLAGS[_CONFIG.name]))
    if __name__ == "__main__":  # a process that only calls this function must go on
        huge_pages.restart()
    with entry_point.importing():
        from llada_jax.devices import distributed
        from llada_jax.training import goodput
        from llada_jax.training.config_check import check_distributed
        from llada_jax.training.run import train

    check_distributed(config)
    began = goodput.process_began()
    return distributed.run(lambda: train(config, _WORKDIR.value, began), config.distributed, *process_flags.given())


def _choose_length(config: Config, given: Mapping[str, Any]) -> None:
    """Lets --config.steps on the command line take the place of `minutes` in the config file, in place.

    Args:
      config: The configuration of the run.
      given: The settings on the command line.

    Raises:
      UserError: If the command line sets both.
    """
    if "steps" not in given or not config.minutes:
        return
    if "minutes" in given:
        raise UserError(
            f"--config.steps={config.steps} and --config.minutes={config.minutes:g} both set the length of the run: "
            "give one of them"
        )
    config.minutes = 0.0


if __name__ == "__main__":
    entry_point.run(main)
