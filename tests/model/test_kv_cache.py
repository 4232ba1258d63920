"""Passes that keep keys and values, and passes that read them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.devices import mesh
from llada_jax.model.kv_cache import cache_bytes, empty_cache, reading_trunk, writing_trunk
from llada_jax.model.transformer import initialise, merge, split

SIZES = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, feed_forward=96, vocab_size=64)
B, T = 2, 20


@pytest.fixture(scope="module")
def model(make_mesh):
    with jax.set_mesh(make_mesh()):
        return initialise(SIZES, ComputeConfig(dtype="float32"), jax.random.key(1))


@pytest.mark.parametrize("kernel", ["reference", "xla", "cpu", "splash_interpreted"])
def test_fewer_queries_than_keys(model, rng, kernel):
    """Every kernel gives a few tokens, in any order, the hidden states that they have in a pass over all tokens."""
    used = merge(*split(model))
    used.compute = dataclasses.replace(used.compute, attention=kernel)
    tokens_BT = rng.integers(0, 64, (B, T)).astype(np.int32)
    real_BT = rng.uniform(size=(B, T)) < 0.7
    fed_BN = np.stack([rng.permutation(T)[:5] for _ in range(B)]).astype(np.int32)

    @jax.jit
    def run(model, tokens_BT, real_BT, tokens_BN, fed_BN, is_fed_BS):
        cache = empty_cache(model.config, model.compute, B, T + 3)
        h_BTD, cache = writing_trunk(model, tokens_BT, None, real_BT, cache)
        # What is kept of the tokens that are fed is replaced in every layer, so that it may be anything.
        cache = jax.tree.map(lambda x: jnp.where(is_fed_BS[:, :, None, None], 1e3, x), cache)
        h_BND = reading_trunk(model, tokens_BN, fed_BN, fed_BN, real_BT, cache, T)
        return h_BTD, model.trunk(tokens_BT, real_BT), h_BND

    is_fed_BS = np.zeros((B, T + 3), bool)
    np.put_along_axis(is_fed_BS, fed_BN, True, axis=1)
    rows = tokens_BT, real_BT, np.take_along_axis(tokens_BT, fed_BN, axis=1), fed_BN, is_fed_BS
    with mesh.mesh_of(model.embedding[...]):
        h_BTD, plain_BTD, h_BND = run(used, *mesh.place_rows(*rows))
    bound = rounding.of_logits(SIZES, T)
    rounding.assert_close(h_BTD, plain_BTD, bound)
    rounding.assert_close(h_BND, np.take_along_axis(np.asarray(plain_BTD), fed_BN[:, :, None], axis=1), bound)


def test_bytes_are_those_of_the_arrays(model):
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        compute = ComputeConfig(dtype=dtype)
        with mesh.mesh_of(model.embedding[...]):
            cache = jax.jit(empty_cache, static_argnums=(0, 1, 2, 3))(SIZES, compute, B, T)
        assert sum(x.nbytes for x in jax.tree.leaves(cache)) == cache_bytes(SIZES, compute, B, T)
        assert cache_bytes(SIZES, compute, B, T) == 2 * 2 * B * T * 2 * 8 * size


def test_keys_and_values_are_split_as_heads_and_rows_are(make_mesh):
    with jax.set_mesh(make_mesh(2, 2, 2)):
        cache = jax.jit(empty_cache, static_argnums=(0, 1, 2, 3))(SIZES, ComputeConfig(dtype="float32"), 4, T)
    assert cache.k_LBSGK.sharding.shard_shape(cache.k_LBSGK.shape) == (2, 1, T, 1, 8)
