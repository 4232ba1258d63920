"""LLaDA 8B, pre-trained as in the paper (arXiv 2502.09992, Section 2.2 and Appendix B).

    python -m llada_jax.prepare --input='gs-or-mounted/text/*.parquet' --output=DATA --tokenizer=LLADA_TOKENIZER_DIR
    python -m llada_jax.train --config=configs/8b.py --workdir=runs/8b --config.data.path=DATA

Model: 8,015,581,184 parameters, 6.98 B without embedding and head; multi-head attention, 4096 tokens.
Data: 2.3 T tokens, one epoch; one sequence in a hundred is cut to a random length, uniform in 1..4096.
Batch: 1280 sequences of 4096 tokens = 5,242,880 tokens; 438,690 steps.
Schedule: the learning rate rises from 0 to 4e-4 over 2,000 steps and stays there until 1.2 T tokens; it is 1e-4 for the
next 0.8 T tokens, and falls linearly to 1e-5 over the last 0.3 T tokens.
Optimizer: AdamW with weight decay 0.1. The paper does not state the betas and the clipping norm; they are 0.9, 0.95 and
1.0 here.

The hardware is an argument of this file. It is a name in HARDWARE below:

    python -m llada_jax.train --config=configs/8b.py:v5p-4x4x8 --workdir=runs/8b --config.data.path=DATA
    python -m llada_jax.plan  --config=configs/8b.py:v5p-4x4x8 --topology=v5p:4x4x8

llada_jax.plan accepts every entry, and its output is kept in benchmarks/plans. We have run none of them. Parameters,
gradients and Adam's moments take 16 bytes per parameter, 128 GB in all. The paper used 0.13 million H800 GPU hours.
"""

from typing import NamedTuple

from llada_jax.config import Config, UserError

TOKENS_PER_STEP = 1280 * 4096


class Hardware(NamedTuple):
    """The settings that depend on the chips."""

    accumulation: int = 1  # micro-batches; the 1280 / accumulation sequences of each are on the chips at the same time
    remat: str = "full"
    data: int = 1  # slices or nodes; each holds a complete copy of the parameters


# The choices of remat differ in what all 32 layers store for the backward pass, per sequence of 4096 tokens: full
# 1.0 GiB (the inputs of the layers), attention 2.0 GiB, rotated 4.0 GiB, dots 13 GiB. They also differ in the FLOPs
# that they execute beyond those of the model: full 28 %, attention 24 %, rotated 19 %, dots 2 %. So dots is chosen
# wherever memory suffices for it.
# The comments below say how many sequences of a micro-batch are on each chip.
HARDWARE = {
    "": Hardware(),
    "v5e-16x16": Hardware(accumulation=1, remat="full"),  # 5
    "v6e-8x8": Hardware(accumulation=5, remat="attention"),  # 4
    "v6e-16x16": Hardware(accumulation=1, remat="rotated"),  # 5
    "v5p-4x4x4": Hardware(accumulation=5, remat="dots"),  # 4
    "v5p-4x4x8": Hardware(accumulation=2, remat="dots"),  # 5
    "v5p-4x8x8": Hardware(accumulation=1, remat="dots"),  # 5
    "2xv5p-4x4x8": Hardware(accumulation=1, remat="dots", data=2),  # 5; two slices
    "h200-8": Hardware(accumulation=40, remat="dots"),  # 4
    "16xh100-8": Hardware(accumulation=5, remat="dots"),  # 2; the parameters are sharded over all 16 nodes
}


def step_at(tokens: float) -> int:
    """Returns the step after which the run has seen this many tokens."""
    return round(tokens / TOKENS_PER_STEP)


def paper_recipe() -> Config:
    """Returns what the paper's 8B and 1B runs share: data, batch, objective and schedule."""
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
    """Returns the config of the paper's 8B run, for a name in HARDWARE."""
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
