"""The models of benchmarks/reversal.py: --config=benchmarks/reversal_config.py:llada, or :arm for autoregressive.

Both have the same parameters, see the same rows in the same order and take the same steps. They differ in the attention
mask and in the objective: Eq. 3 of LLaDA's paper, or the prediction of the next token.
"""

from llada_jax.config import Config, UserError

MODELS = ("arm", "llada")


def get_config(model: str = "llada") -> Config:
    """Returns the config of a model of MODELS with about 0.8 million parameters in its layers."""
    if model not in MODELS:
        raise UserError(f"--config=benchmarks/reversal_config.py:{model}: choose {' or '.join(MODELS)}")
    config = Config(steps=1500, batch_size=64)
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.kv_heads = 4
    config.model.feed_forward = 320
    config.model.tied_embeddings = True
    config.model.rope_theta = 10_000.0
    config.model.causal = model == "arm"

    config.diffusion.random_length_every = 0
    if model == "arm":
        config.diffusion.objective = "next_token"
    else:
        config.diffusion.loss_weight = "count"  # in the mean the same loss as the paper's, with less variance

    config.compute.unroll = 0
    config.compute.remat = "none"
    config.compute.loss_chunk = 512

    config.optimizer.name = "muon"
    config.optimizer.peak_learning_rate = 1e-2
    config.optimizer.muon_scale = 0.5
    config.optimizer.schedule = ((0.0, 0.0), (0.02, 1.0), (1.0, 0.0))
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 0.01

    config.logging.every = 100
    config.logging.tensorboard = False
    config.checkpoint.every = 1000
    config.validation.rows = 0
    config.sampling.prompts = ()
    return config
