"""The autoregressive baseline of LLaDA 8B (arXiv 2502.09992, Appendix B.2): the same Transformer with a causal mask.

    python -m llada_jax.prepare --input='text/*.parquet' --output=DATA --tokenizer=LLADA_TOKENIZER_DIR
    python -m llada_jax.train --config=configs/arm_7b.py:v5p-4x4x8 --workdir=runs/arm_7b --config.data.path=DATA

Model: 6,834,851,840 parameters, 5,798,858,752 without embedding and head; grouped-query attention, 8 key/value heads.
Data, batch and the shape of the schedule are those of configs/8b.py; the learning rate peaks at 1.5e-4. No sequence is
cut to a random length: each token is predicted from every number of tokens before it anyway.
Hardware: parameters, gradients and Adam's moments take 16 bytes per parameter, 109 GB in all. The hardware is an
argument of this file, one of HARDWARE in configs/8b.py, whose larger model has the same settings there. v5p-4x4x8 is
planned (benchmarks/plans), the others are not. We have not run it.
"""

import runpy
from pathlib import Path

from llada_jax.config import Config, UserError

LLADA = runpy.run_path(str(Path(__file__).with_name("8b.py")))


def baseline() -> Config:
    """Returns what the autoregressive runs share: the recipe of configs/8b.py with the next token as the objective."""
    config = LLADA["paper_recipe"]()
    config.model.causal = True
    config.diffusion.objective = "next_token"
    config.diffusion.t_sampling = "low_discrepancy"  # the default: nothing is masked
    config.diffusion.random_length_every = 0
    config.sampling.prompts = ("The capital of France is", "The answer to 17 + 25 is")
    return config


def get_config(hardware: str = "") -> Config:
    """Returns the config of the paper's autoregressive 7B run, for a name in HARDWARE of configs/8b.py."""
    if hardware not in LLADA["HARDWARE"]:
        raise UserError(f"configs/arm_7b.py:{hardware}: choose one of {', '.join(filter(None, LLADA['HARDWARE']))}")
    config = baseline()
    config.model.layers = 28
    config.model.width = 4096
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.feed_forward = 13_440
    config.optimizer.peak_learning_rate = 1.5e-4
    config.accumulation, config.compute.remat, config.mesh.data = LLADA["HARDWARE"][hardware]
    return config
