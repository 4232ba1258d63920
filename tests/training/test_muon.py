"""Tests Muon: each matrix gets an orthogonal update of AdamW's size, and the updates are the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.config import ComputeConfig, ModelConfig, OptimizerConfig, UserError
from llada_jax.model import transformer
from llada_jax.training.optimizer import UPDATE_RMS, make_optimizer, orthogonalise

SHAPE = ModelConfig(layers=4, width=32, heads=4, kv_heads=2, feed_forward=64, vocab_size=128)


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 2, 50, 20), (7, 7)])
def test_orthogonalise(rng, shape):
    """The result is U V^T of the singular value decomposition, except for the spread that the iteration leaves."""
    x = rng.normal(size=shape)
    got = np.asarray(orthogonalise(jnp.asarray(x, jnp.float32)))
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    rows, columns = sorted(shape[-2:])
    values = np.linalg.svd(got / (UPDATE_RMS * columns**0.5), compute_uv=False)
    assert 0.3 < values.min() and values.max() < 1.3
    exact = UPDATE_RMS * columns**0.5 * (u @ vt)
    cosine = (got * exact).sum() / np.sqrt((got**2).sum() * (exact**2).sum())
    assert cosine > 0.95
    assert np.sqrt(np.mean(got**2)) == pytest.approx(UPDATE_RMS, rel=0.3)


def updates_on(device_mesh, grads):
    with jax.set_mesh(device_mesh):
        _, params = transformer.split(transformer.initialise(SHAPE, ComputeConfig(), jax.random.key(0)))
        grads = jax.tree.map(lambda p, g: jax.device_put(g, jax.typeof(p).sharding.spec), params, grads)
        optimizer = make_optimizer(OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=0.0))
        updates, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
        for update, parameter in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert jax.typeof(update).sharding.spec == jax.typeof(parameter).sharding.spec
        return jax.tree.map(np.asarray, updates)


def test_same_on_every_mesh_and_adam_for_the_rest(rng, make_mesh):
    with jax.set_mesh(make_mesh()):
        abstract = transformer.split(transformer.abstract_model(SHAPE, ComputeConfig()))[1]
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), abstract)
    one = updates_on(make_mesh(), grads)
    # These meshes divide the four layers among fsdp x tensor, among all devices, not at all, and among fsdp.
    for sizes in ((2, 2, 2), (1, 4, 1), (1, 8, 1), (1, 4, 2)):
        other = updates_on(make_mesh(*sizes), grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)
    for name in ("embedding", "head", "final_norm"):
        # Adam's first update is the sign of the gradient.
        np.testing.assert_allclose(one[name], np.sign(grads[name]), rtol=1e-4)
    np.testing.assert_allclose(one["blocks"]["attn_norm"], np.sign(grads["blocks"]["attn_norm"]), rtol=1e-4)


def test_heads_are_matrices_of_their_own(rng, make_mesh):
    with jax.set_mesh(make_mesh()):
        abstract = transformer.split(transformer.abstract_model(SHAPE, ComputeConfig()))[1]
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), abstract)
    updates = updates_on(make_mesh(), grads)["blocks"]
    nesterov = 1 + 0.95  # Nesterov momentum scales the first gradient by this factor; orthogonalising removes it.
    for name in ("q_proj", "k_proj"):
        one_head = np.asarray(orthogonalise(jnp.asarray(nesterov * grads["blocks"][name][1, :, 1, :])))
        np.testing.assert_allclose(updates[name][1, :, 1, :], one_head, rtol=1e-3, atol=1e-5)
    one_head = np.asarray(orthogonalise(jnp.asarray(grads["blocks"]["attn_out"][2, 3])))
    np.testing.assert_allclose(updates["attn_out"][2, 3], one_head, rtol=1e-3, atol=1e-5)


def test_unknown_name():
    with pytest.raises(UserError, match="optimizer.name='sgd'"):
        make_optimizer(OptimizerConfig(name="sgd"))
