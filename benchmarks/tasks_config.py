"""A small model that adds and sorts, on two CPU cores: what benchmarks/tasks.py measures the rules of sampling with.

    python benchmarks/problems.py --output=problems
    python -m llada_jax.prepare --input=problems/text.jsonl --output=data/digits --train_tokenizer=340 \
        --sequence_length=64
    cp problems/chat_template.jinja data/digits/tokenizer/
    python -m llada_jax.prepare --chat --input=problems/train.jsonl.gz --output=data/problems \
        --tokenizer=data/digits/tokenizer --sequence_length=48 --validation_fraction=0.005
    python -m llada_jax.train --config=benchmarks/tasks_config.py --workdir=runs/tasks

The objective is that of conversations, with new weights: only answers are masked. So all of the loss is about what can
be known, and a row is one problem, as it is when the model answers.

With these settings the model adds without a mistake and sorts nearly all (benchmarks/RESULTS.md). After 500 steps it
has learned about half of that: such a model tells the rules of sampling apart. The command of prepare leaves some
letters two tokens long, so that a few sorted rows are longer than the 24 tokens that tasks.py lets the model write.
"""

from llada_jax.config import Config


def get_config() -> Config:
    """Returns the config of a model with about 0.8 million parameters."""
    config = Config(steps=2000, batch_size=128, sequence_length=48)
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.kv_heads = 4
    config.model.feed_forward = 320
    config.model.tied_embeddings = True
    config.model.rope_theta = 10_000.0

    config.diffusion.objective = "sft"
    config.diffusion.random_length_every = 0
    config.diffusion.loss_weight = "count"
    config.data.path = "data/problems"

    config.compute.unroll = 0
    config.compute.remat = "none"
    config.compute.loss_chunk = 512

    config.optimizer.name = "muon"
    config.optimizer.peak_learning_rate = 3e-3
    config.optimizer.muon_scale = 0.7
    config.optimizer.schedule = ((0.0, 0.0), (0.02, 1.0), (1.0, 0.0))
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 0.01

    config.logging.every = 100
    config.logging.tensorboard = False
    config.checkpoint.every = 500
    config.checkpoint.permanent_every = 500  # a model that has not learned all yet tells the rules apart better
    config.validation.every = 500
    config.validation.rows = 256
    config.validation.samples = 4
    config.sampling.every = 500
    config.sampling.steps = 24
    config.sampling.gen_length = 24
    config.sampling.block_length = 24
    config.sampling.prompts = ("add 0 4 7 3 2 9 0 5 1 + 0 5 2 6 7 3 8 1 2 =", "sort g c x a m k b z q e =")
    return config
