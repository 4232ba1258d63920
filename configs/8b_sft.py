"""LLaDA 8B Instruct: supervised fine-tuning as in the paper (arXiv 2502.09992, Section 2.3 and Appendix B).

    python -m llada_jax.prepare --chat --input='chats/*.jsonl.gz' --output=data/sft --tokenizer=LLaDA-8B-Base
    python -m llada_jax.train --config=configs/8b_sft.py:v5p-4x4x4 --workdir=runs/8b_sft
    python -m llada_jax.chat --model=runs/8b_sft

Data: 4.5 M pairs, three epochs: 52,734 steps of 256; with other data set --config.steps to 3 * conversations / 256.
Answers are padded with EOS, which is learned, to the longest of the batch.
Schedule: 0 -> 2.5e-5 over 50 steps, held, the last 10 % linear to 2.5e-6. AdamW, weight decay 0.1. The paper does not
state betas and clipping: 0.9, 0.95 and 1.0 here.

LLaDA-8B-Base is the published folder; --config.init_from names another one, or a workdir of configs/8b.py.

Hardware is an argument of this file, a name in HARDWARE below. All of the 8 B parameters are tuned, with 16 bytes of
memory each, but on one GPU (lora-...): there low-rank adapters are, beside weights that stay as they are in bfloat16.
Each is accepted by the plan (`python -m llada_jax.plan --config=configs/8b_sft.py:NAME --topology=...`), whose output
is kept in benchmarks/plans; none has been run by us.
"""

import runpy
from pathlib import Path
from typing import NamedTuple

from llada_jax.config import Config, UserError

PAIRS = 4_500_000


class Hardware(NamedTuple):
    """What depends on the chips."""

    accumulation: int = 1  # micro-batches; the rest of the 256 rows lies on the chips at once
    remat: str = "full"
    rank: int = 0  # of adapters; 0 = all parameters are tuned


HARDWARE = {
    "": Hardware(),
    "v5e-8x8": Hardware(accumulation=2),  # 2 rows per chip
    "v5p-4x4x4": Hardware(remat="dots"),  # 4
    "h200-8": Hardware(accumulation=8, remat="dots"),  # 4
    "lora-h200-1": Hardware(accumulation=64, remat="dots", rank=16),  # 4
}


def get_config(hardware: str = "") -> Config:
    """The paper's fine-tuning run, for a name in HARDWARE."""
    if hardware not in HARDWARE:
        raise UserError(f"configs/8b_sft.py:{hardware}: choose one of {', '.join(filter(None, HARDWARE))}")
    config = runpy.run_path(str(Path(__file__).with_name("8b.py")))["get_config"]()
    config.steps, config.batch_size = round(3 * PAIRS / 256), 256
    config.init_from, config.init_weights_only = "LLaDA-8B-Base", True
    config.diffusion.objective = "sft"
    config.diffusion.random_length_every = 0
    config.data.path = "data/sft"

    config.optimizer.peak_learning_rate = 2.5e-5
    config.optimizer.schedule = ((0, 0.0), (50, 1.0), (0.9, 1.0), (1.0, 0.1))

    config.checkpoint.permanent_every = 5_000
    config.validation.every = 1_000
    config.validation.rows = 1_024
    config.sampling.every = 1_000
    config.sampling.prompts = ("What is the capital of France?", "A train leaves at 9:40 and takes 85 minutes. When?")
    config.sampling.steps = config.sampling.gen_length = 128

    config.accumulation, config.compute.remat, config.model.lora.rank = HARDWARE[hardware]
    if config.model.lora.rank:  # our choice: adapters take a larger rate than the weights themselves would
        config.optimizer.peak_learning_rate = 2e-4
    return config
