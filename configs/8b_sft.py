"""LLaDA 8B Instruct: supervised fine-tuning as in the paper (arXiv 2502.09992, Section 2.3 and Appendix B).

    python -m llada_jax.prepare --chat --input='chats/*.jsonl.gz' --output=data/sft --tokenizer=LLaDA-8B-Base
    python -m llada_jax.train --config=configs/8b_sft.py:v5p-4x4x4 --workdir=runs/8b_sft
    python -m llada_jax.chat --model=runs/8b_sft

Data: 4.5 M pairs of prompt and answer, three epochs: 52,734 steps of 256 rows. With other data, set --config.steps to
3 * conversations / 256. Answers are padded with EOS to the longest row of the batch; the model learns this padding.
Schedule: the learning rate rises from 0 to 2.5e-5 over 50 steps and stays there. Over the last 10 % of the steps it
falls linearly to 2.5e-6.
Optimizer: AdamW with weight decay 0.1. The paper does not state the betas and the clipping norm; they are 0.9, 0.95 and
1.0 here.

LLaDA-8B-Base is the published folder. --config.init_from names another folder, or a workdir of configs/8b.py.

The hardware is an argument of this file. It is a name in HARDWARE below. All 8 B parameters are tuned, which takes 16
bytes of memory for each of them. On one GPU (lora-...), low-rank adapters are tuned instead, and the other weights stay
unchanged in bfloat16. `python -m llada_jax.plan --config=configs/8b_sft.py:NAME --topology=...` accepts every entry,
and its output is kept in benchmarks/plans. We have run none of them.
"""

import runpy
from pathlib import Path
from typing import NamedTuple

from llada_jax.config import Config, UserError

PAIRS = 4_500_000


class Hardware(NamedTuple):
    """The settings that depend on the chips."""

    accumulation: int = 1  # micro-batches; each has 256 / accumulation rows, which are on the chips at the same time
    remat: str = "full"
    rank: int = 0  # the rank of the low-rank adapters; 0 = all parameters are tuned


# The comments say how many rows of a micro-batch are on each chip.
HARDWARE = {
    "": Hardware(),
    "v5e-8x8": Hardware(accumulation=2),  # 2
    "v5p-4x4x4": Hardware(remat="dots"),  # 4
    "h200-8": Hardware(accumulation=8, remat="dots"),  # 4
    "lora-h200-1": Hardware(accumulation=64, remat="dots", rank=16),  # 4
}


def get_config(hardware: str = "") -> Config:
    """Returns the config of the paper's fine-tuning run, for a name in HARDWARE."""
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
    if config.model.lora.rank:  # our choice: adapters take a larger learning rate than the full weights
        config.optimizer.peak_learning_rate = 2e-4
    return config
