"""The models of benchmarks/stories.py: --config=benchmarks/stories_config.py:llada, or :arm for autoregressive.

    python -m llada_jax.prepare --input=stories.jsonl.gz --output=data/stories --train_tokenizer=1024 \
        --sequence_length=128 --validation_fraction=0.03
    python -m llada_jax.train --config=benchmarks/stories_config.py:llada --workdir=runs/stories_llada
    python -m llada_jax.train --config=benchmarks/stories_config.py:arm --workdir=runs/stories_arm

Both have the same parameters, see the same rows in the same order and take the same steps, so they cost about the same
compute. They differ in the attention mask and in the objective: Eq. 3 of LLaDA's paper, or the prediction of the next
token. The rows are packed, so EOS stands in front of every story that begins within one, as it does when they continue
a story. A model takes a quarter of an hour on one core of an Intel Xeon with AVX-512. LLaDA is then far from having
learned all that it could, so this is a test with a model that is unsure (benchmarks/RESULTS.md).
"""

from llada_jax.config import Config, UserError

MODELS = ("arm", "llada")


def get_config(model: str = "llada") -> Config:
    """Returns the config of a model of MODELS with about 1.4 million parameters."""
    if model not in MODELS:
        raise UserError(f"--config=benchmarks/stories_config.py:{model}: choose {' or '.join(MODELS)}")
    config = Config(steps=1200, batch_size=32, sequence_length=128)
    config.model.layers = 4
    config.model.width = 160
    config.model.heads = 5
    config.model.kv_heads = 5
    config.model.feed_forward = 448
    config.model.tied_embeddings = True
    config.model.rope_theta = 10_000.0
    config.model.causal = model == "arm"

    if model == "arm":
        config.diffusion.objective = "next_token"
    else:
        config.diffusion.loss_weight = "count"  # in the mean the same loss as the paper's, with less variance
    config.diffusion.random_length_every = 4  # the texts to be continued are shorter than the rows
    config.data.path = "data/stories"

    config.compute.unroll = 0
    config.compute.remat = "none"
    config.compute.loss_chunk = 1024

    config.optimizer.name = "muon"
    config.optimizer.peak_learning_rate = 3e-3
    config.optimizer.muon_scale = 0.7
    config.optimizer.schedule = ((0, 0.0), (20, 1.0), (0.5, 1.0), (1.0, 0.0))
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 0.01

    config.logging.every = 20
    config.logging.tensorboard = False
    config.checkpoint.every = 300
    config.validation.every = 600
    config.validation.rows = 64
    config.sampling.every = 600
    config.sampling.prompts = ("Once upon a time, there was a little girl",)
    return config
