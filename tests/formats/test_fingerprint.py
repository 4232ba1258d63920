"""Tests the fingerprints, which reveal damaged arrays in a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.formats.fingerprint import fingerprint
from llada_jax.training.step import make_state


def test_the_fingerprint_does_not_depend_on_the_mesh_and_sees_every_bit(config, state, make_mesh, one_device):
    with jax.set_mesh(one_device):
        prints, broken = fingerprint(state.params)
        assert not broken and len(prints) == len(jax.tree.leaves(state.params))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert fingerprint(make_state(config).params)[0] == prints
    with jax.set_mesh(one_device):
        head = np.array(state.params["head"])
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
