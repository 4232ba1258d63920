"""The autoregressive baseline of LLaDA 1B (arXiv 2502.09992, Appendix B): configs/1b.py with a causal mask.

    python -m llada_jax.prepare --input='text/*.parquet' --output=DATA --tokenizer=LLADA_TOKENIZER_DIR
    python -m llada_jax.train --config=configs/arm_1b.py --workdir=runs/arm_1b --config.data.path=DATA

Model: 1,487,243,264 parameters, those of configs/1b.py, and the same data, batch and schedule. Each token is predicted
from the tokens before it.
Hardware: parameters, gradients and moments take 24 GB. We have not yet run this config at this size.
"""

import runpy
from pathlib import Path

from llada_jax.config import Config


def get_config() -> Config:
    """Returns the config of the autoregressive 1B run: the recipe of configs/arm_7b.py with the model of 1b.py."""
    config = runpy.run_path(str(Path(__file__).with_name("arm_7b.py")))["baseline"]()
    config.model.layers = 22
    config.model.width = 2048
    config.model.heads = 32
    config.model.kv_heads = 4
    config.model.feed_forward = 5_634
    config.compute.remat = "full"
    return config
