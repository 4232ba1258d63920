"""A tiny model, prompts and settings for tests of the sampler."""

import functools

import jax
import numpy as np
import pytest

from llada_jax.config import ComputeConfig, ModelConfig, SamplerConfig
from llada_jax.model.transformer import Transformer, initialise, merge, split
from llada_jax.sampling import cache
from llada_jax.sampling.sampler import denoise

MASK = 60
SIZES = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, feed_forward=96, vocab_size=64, mask_id=MASK)
PROMPT_LENGTH, GEN_LENGTH = 9, 16
ENDS = {"eos_id": 22, "eot_id": 11}  # tokens that this model predicts often


@functools.cache
def _initialised(mesh, sizes: ModelConfig) -> Transformer:
    with jax.set_mesh(mesh):
        return initialise(sizes, ComputeConfig(dtype="float32"), jax.random.key(1))


def make_model(mesh, sizes: ModelConfig = SIZES, sharpness: int = 1) -> Transformer:
    """Returns a model with a head `sharpness` times as large. With 12 it is as sure as real models sometimes are."""
    model = merge(*split(_initialised(mesh, sizes)))
    with jax.set_mesh(mesh):
        if sharpness != 1:
            model.head[...] = model.head[...] * sharpness
    return model


def padded_prompts() -> tuple[np.ndarray, np.ndarray]:
    """Returns three prompts, of which one is left-padded and two contain MASK tokens, and which tokens are real."""
    prompt_BT = np.random.default_rng(0).integers(0, MASK, (3, PROMPT_LENGTH))
    real_BT = np.ones(prompt_BT.shape, bool)
    real_BT[1, :4] = False
    prompt_BT[0, 3] = MASK
    prompt_BT[2, 2:5] = MASK
    return prompt_BT, real_BT


@pytest.fixture(scope="session")
def sharp(make_mesh) -> Transformer:
    """Returns a model that is sure of some predictions, as real models are. Do not change it."""
    return make_model(make_mesh(), sharpness=12)


@pytest.fixture(scope="session")
def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Returns `padded_prompts()`. Do not change them."""
    return padded_prompts()


@pytest.fixture
def several_widths(monkeypatch):
    """Passes over these short canvases have as many widths as those over long ones, which costs time to compile."""
    monkeypatch.setattr(cache, "GRAIN", 8)
    denoise.clear_cache()  # it does not know of the grain
    yield
    denoise.clear_cache()


def settings(**changes) -> SamplerConfig:
    return SamplerConfig(**({"steps": GEN_LENGTH, "gen_length": GEN_LENGTH, "block_length": 6} | changes))
