"""The autoregressive baseline of configs/150m.py: the same model, data, batch and schedule, with a causal mask.

    python -m llada_jax.prepare --input='text/*.jsonl.gz' --output=data/150m --train_tokenizer=32000 \
        --sequence_length=1024
    python -m llada_jax.train --config=configs/arm_150m.py --workdir=runs/arm_150m --config.data.path=data/150m

Its validation is the exact likelihood, where that of configs/150m.py is a bound; both are in nats per token and in bits
per byte of the same rows.
Hardware: as for configs/150m.py. We have not run it at this size.
"""

import runpy
from pathlib import Path

from llada_jax.config import Config


def get_config() -> Config:
    """Returns the config of an autoregressive model with about 152 M parameters."""
    config = runpy.run_path(str(Path(__file__).with_name("150m.py")))["get_config"]()
    config.model.causal = True
    config.diffusion.objective = "next_token"
    config.diffusion.random_length_every = 0
    config.sampling.prompts = ("Once upon a time", "She opened the door and")
    return config
