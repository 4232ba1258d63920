"""A model of about 150 M parameters for one GPU: large enough to write readable text, small enough for experiments.

    python -m llada_jax.prepare --input='text/*.jsonl.gz' --output=data/150m --train_tokenizer=32000 \
        --sequence_length=1024
    python -m llada_jax.train --config=configs/150m.py --workdir=runs/150m --config.data.path=data/150m

Batch: 256 sequences of 1024 tokens = 262,144 tokens; 20,000 steps = 5.2 B tokens.
Hardware: one GPU, which holds 2.5 GB of parameters, gradients and moments, and the activations of 32 sequences. On an
H200, 32 sequences took 65 ms and 13 GiB: 508,000 tokens/s, so the run would take three hours (benchmarks/RESULTS.md).
The recipe follows the paper's on a smaller scale (warm-up, plateau, linear decay). It has not been tuned.
"""

from llada_jax.config import Config


def get_config() -> Config:
    """Returns the config of a model with about 152 M parameters and a vocabulary of 32,000 tokens."""
    config = Config(steps=20_000, batch_size=256, sequence_length=1024, accumulation=8)
    config.model.layers = 12
    config.model.width = 768
    config.model.heads = 12
    config.model.kv_heads = 12
    config.model.feed_forward = 2_688

    config.data.path = "data/150m"
    config.compute.remat = "none"
    config.compute.unroll = 0

    config.optimizer.peak_learning_rate = 6e-4
    config.optimizer.schedule = ((0, 0.0), (1_000, 1.0), (0.8, 1.0), (1.0, 0.1))

    config.checkpoint.every = 500
    config.checkpoint.permanent_every = 5_000
    config.validation.every = 500
    config.validation.rows = 512
    config.sampling.every = 1_000
    config.sampling.prompts = ("Once upon a time", "She opened the door and[MASK][MASK][MASK][MASK][MASK] in the dark.")
    return config
