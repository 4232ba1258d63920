"""Tests that guidance of hidden states gives the logits of Eq. 16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from llada_jax.devices import mesh
from llada_jax.model.transformer import initialise
from llada_jax.sampling.guidance import guide, guided_trunk


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_logits_of_guided_hidden_states_are_equation_16(toy, make_mesh, rng, sizes):
    tokens = rng.integers(0, 16, (4, 6)).astype(np.int32)
    given = np.arange(6) < np.array([0, 1, 3, 6])[:, None]
    real = np.array([6, 5, 6, 6], np.int32)
    with jax.set_mesh(make_mesh(*sizes)):
        model = initialise(toy.config, toy.compute, jax.random.key(3))
        guided = jax.jit(lambda m, x, g, n, w: m.logits(guided_trunk(m, x, g, n, w)))
        got = np.asarray(guided(model, *mesh.place_rows(tokens, given, real), 1.5))
    attended = np.arange(6) < real[:, None]
    with_prompt = np.asarray(toy.model(tokens, attended), np.float64)
    without = np.asarray(toy.model(np.where(given, toy.config.mask_id, tokens).astype(np.int32), attended), np.float64)
    wanted = without + 2.5 * (with_prompt - without)
    # Guidance takes 2.5 times the logits of one pass and 1.5 times those of the other.
    off = rounding.of_logits(toy.config, 6) * rounding.size(with_prompt[attended])
    np.testing.assert_allclose(got[attended], wanted[attended], rtol=0, atol=(2.5 + 1.5) * off)
    assert np.abs(wanted - with_prompt)[1:].max() > 0.1  # guidance changes the logits
    np.testing.assert_allclose(got[0], with_prompt[0], rtol=0, atol=off)  # without a prompt, guidance changes nothing


def test_combination_is_rounded_once(rng):
    """The combination is computed in fp32, although the hidden states are bfloat16, and rounded at the end."""
    h_cond, h_un = (jnp.asarray(rng.normal(size=(1, 4, 50)), jnp.bfloat16) for _ in range(2))
    wanted = np.asarray(h_un, np.float64) + 2.5 * (np.asarray(h_cond, np.float64) - np.asarray(h_un, np.float64))
    # fp32 holds every difference, product and sum of these bfloat16 numbers exactly, so only the cast rounds.
    np.testing.assert_array_equal(guide(h_cond, h_un, 1.5), jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16))
