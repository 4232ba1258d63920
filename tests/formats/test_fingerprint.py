"""Tests the fingerprints, which reveal damaged arrays in a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.formats.fingerprint import fingerprint
from llada_jax.model.transformer import initialise, split


@pytest.fixture(scope="module")
def one_device(make_mesh):
    return make_mesh(1)


def parameters() -> dict:
    """Returns the parameters of a small model, the same on every mesh."""
    config = ModelConfig(layers=2, width=32, heads=4, kv_heads=4, feed_forward=64, vocab_size=384)
    return split(initialise(config, ComputeConfig(), jax.random.key(0)))[1]


def test_the_fingerprint_does_not_depend_on_the_mesh_and_sees_every_bit(make_mesh, one_device):
    with jax.set_mesh(one_device):
        params = parameters()
        prints, broken = fingerprint(params)
        assert not broken and len(prints) == len(jax.tree.leaves(params))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert fingerprint(parameters())[0] == prints
    with jax.set_mesh(one_device):
        head = np.array(params["head"])
        head[3, 4] = np.nextafter(head[3, 4], np.float32(9))
        assert fingerprint({"head": jnp.asarray(head), "step": jnp.int32(3)})[0]["head"] != prints["head"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", [(), (40,), (7, 9), (3, 4, 5), (2, 3, 4, 5)])
def test_the_fingerprint_is_the_sum_of_all_bits(rng, one_device, dtype, shape):
    array = np.asarray(jnp.asarray(rng.standard_normal(shape) * 100).astype(dtype))
    bits = array.view(np.uint16 if array.itemsize == 2 else np.uint32)
    with jax.set_mesh(one_device):
        assert fingerprint({"x": jnp.asarray(array)}) == ({"x": int(bits.sum(dtype=np.uint32))}, [])
        if dtype == "int32":
            return
        for broken in (np.inf, -np.inf, np.nan):
            array = array.copy()
            array[(-1,) * len(shape)] = broken
            assert fingerprint({"x": jnp.asarray(array)})[1] == ["x"]
