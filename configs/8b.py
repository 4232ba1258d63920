"""LLaDA 8B, pre-trained as in the paper (arXiv 2502.09992, Section 2.2 and Appendix B).

    python -m llada_jax.prepare --input='gs-or-mounted/text/*.parquet' --output=DATA --tokenizer=LLADA_TOKENIZER_DIR
    python -m llada_jax.train --config=configs/8b.py --workdir=runs/8b --config.data.path=DATA

Model: 8,015,581,184 parameters, 6.98 B without embedding and head; multi-head attention, 4096 tokens.
Data: 2.3 T tokens, one epoch; one sequence in a hundred cut to a length uniform in 1..4096.
Batch: 1280 sequences of 4096 tokens = 5,242,880 tokens; 438,690 steps.
Schedule: 0 -> 4e-4 over 2,000 steps, held until 1.2 T tokens; 1e-4 for the next 0.8 T; linear to 1e-5 over
the last 0.3 T. AdamW, weight decay 0.1. The paper does not state betas and clipping: 0.9, 0.95 and 1.0 here.

Hardware is an argument of this file, a name in HARDWARE below:

    python -m llada_jax.train --config=configs/8b.py:v5p-4x4x8 --workdir=runs/8b --config.data.path=DATA
    python -m llada_jax.plan  --config=configs/8b.py:v5p-4x4x8 --topology=v5p:4x4x8

Each is accepted by the plan, whose output is kept in benchmarks/plans; none has been run by us. Parameters, gradients
and Adam's moments take 16 bytes per parameter, 128 GB in all; the paper used 0.13 million H800 hours.
"""

from typing import NamedTuple

from llada_jax.config import Config, UserError

TOKENS_PER_STEP = 1280 * 4096


class Hardware(NamedTuple):
    """What depends on the chips."""

    accumulation: int = 1  # micro-batches; the rest of the 1280 sequences lies on the chips at once
    remat: str = "full"
    data: int = 1  # slices or nodes, each with a whole copy of the parameters


# Kept of a layer per sequence of 4096, GiB in all 32 layers: full 1.0 (its input), attention 2.0, dots 13; executed
# FLOPs beyond the model's: full 28 %, attention 24 %, dots 2 %. So dots where the memory is there for it.
HARDWARE = {
    "": Hardware(),
    "v5e-16x16": Hardware(accumulation=1, remat="full"),  # 5 sequences per chip
    "v6e-8x8": Hardware(accumulation=5, remat="attention"),  # 4
    "v6e-16x16": Hardware(accumulation=1, remat="attention"),  # 5
    "v5p-4x4x4": Hardware(accumulation=5, remat="dots"),  # 4
    "v5p-4x4x8": Hardware(accumulation=2, remat="dots"),  # 5
    "v5p-4x8x8": Hardware(accumulation=1, remat="dots"),  # 5
    "2xv5p-4x4x8": Hardware(accumulation=1, remat="dots", data=2),  # 5; two slices
    "h200-8": Hardware(accumulation=40, remat="dots"),  # 4
    "16xh100-8": Hardware(accumulation=5, remat="dots"),  # 2; parameters sharded over all 16 nodes
}


def step_at(tokens: float) -> int:
    """The step at which this many tokens have been seen."""
    return round(tokens / TOKENS_PER_STEP)


def paper_recipe() -> Config:
    """What the paper's 8B and 1B runs share: data, batch, objective, schedule."""
    config = Config(steps=step_at(2.3e12), batch_size=1280, sequence_length=4096)

    # The published tokenizer and its special tokens.
    config.model.vocab_size = 126_464
    config.model.token_count = 126_349
    config.model.bos_id = 126_080
    config.model.eos_id = 126_081
    config.model.mask_id = 126_336
    config.model.eot_id = 126_348

    config.diffusion.t_sampling = "independent"
    config.diffusion.random_length_every = 100
    config.data.path = "data/pretrain"

    config.optimizer.peak_learning_rate = 4e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = (
        (0, 0.0),
        (2_000, 1.0),
        (step_at(1.2e12), 1.0),
        (step_at(1.2e12), 0.25),
        (step_at(2.0e12), 0.25),
        (config.steps, 0.025),
    )

    config.checkpoint.every = 500
    config.checkpoint.permanent_every = 10_000
    config.validation.every = 2_000
    config.validation.rows = 1_280
    config.sampling.every = 2_000
    config.sampling.prompts = ("The capital of France is", "The answer to 17 + 25 is [MASK][MASK], because")
    return config


def get_config(hardware: str = "") -> Config:
    """The paper's 8B run, for a name in HARDWARE."""
    if hardware not in HARDWARE:
        raise UserError(f"configs/8b.py:{hardware}: choose one of {', '.join(filter(None, HARDWARE))}")
    config = paper_recipe()
    config.model.layers = 32
    config.model.width = 4096
    config.model.heads = 32
    config.model.kv_heads = 32
    config.model.feed_forward = 12_288
    config.accumulation, config.compute.remat, config.mesh.data = HARDWARE[hardware]
    return config
