"""Small-scale instruction tuning: a model pre-trained with llada_jax learns to answer, on two CPU cores or one GPU.

    python -m llada_jax.prepare --chat --input='chats/*.jsonl.gz' --output=data/chats --tokenizer=runs/base \
        --sequence_length=512
    python -m llada_jax.train --config=configs/small_sft.py --workdir=runs/tuned --config.init_from=runs/base \
        --config.data.path=data/chats
    python -m llada_jax.chat --model=runs/tuned

The architecture is taken from config.init_from (config.model.layers=0). An epoch has as many rows as there are
conversations. A step has 32 rows, so set --config.steps to 3 * conversations / 32 for three epochs, as in the paper.
The paper's learning rate of 2.5e-5 is for 8 billion parameters; small models take a larger learning rate.
"""

from llada_jax.config import Config


def get_config() -> Config:
    """Returns the paper's recipe (`configs/8b_sft.py`), adapted to a model of a few million parameters.

    Its learning rate and batch size differ from the paper's.
    """
    config = Config(steps=2_000, batch_size=32, sequence_length=512, init_weights_only=True)
    config.init_from = "runs/base"
    config.model.layers = 0
    config.diffusion.objective = "sft"
    config.diffusion.random_length_every = 0
    config.data.path = "data/chats"

    config.compute.unroll = 0
    config.compute.remat = "none"
    config.compute.loss_chunk = 128

    config.optimizer.peak_learning_rate = 1e-3
    config.optimizer.schedule = ((0.0, 0.0), (0.03, 1.0), (0.9, 1.0), (1.0, 0.1))

    config.logging.every = 50
    config.checkpoint.every = 500
    config.validation.every = 500
    config.validation.samples = 4
    config.sampling.every = 500
    config.sampling.steps = 48
    config.sampling.gen_length = 48
    config.sampling.block_length = 16
    config.sampling.prompts = ("What is the name of the girl who lived in the forest?",)
    return config
