"""The autoregressive model that benchmarks/tasks.py compares with: the model and data of tasks_config.py.

    python -m llada_jax.train --config=benchmarks/tasks_ar_config.py --workdir=runs/tasks_ar

It has as many parameters, sees as many problems and takes as many steps, so it costs about the same compute.
"""

import runpy
from pathlib import Path

from llada_jax.config import Config, DiffusionConfig, SamplingConfig, ValidationConfig


def get_config() -> Config:
    """Returns the config of an autoregressive model with about 0.8 million parameters."""
    config = runpy.run_path(str(Path(__file__).with_name("tasks_config.py")))["get_config"]()
    config.model.causal = True
    config.diffusion = DiffusionConfig(objective="next_token_sft", random_length_every=0)
    config.sampling = SamplingConfig(prompts=config.sampling.prompts, every=config.sampling.every, gen_length=24)
    config.validation.samples = ValidationConfig().samples  # the likelihood is exact
    return config
