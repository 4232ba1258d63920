"""Tests Muon: each matrix gets an orthogonal update of AdamW's size, and the updates are the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from llada_jax.config import ComputeConfig, ModelConfig, OptimizerConfig, UserError
from llada_jax.model import transformer
from llada_jax.training.optimizer import UPDATE_RMS, make_optimizer, orthogonalise

SHAPE = ModelConfig(layers=4, width=32, heads=4, kv_heads=2, feed_forward=64, vocab_size=128)
# Adam's bias corrections are 1 - 0.9 and the root of 1 - 0.95, which are rounded at the size of 1.
ADAM = rounding.of_chain(roundings=10 + 20 // 2)


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
    # Like most singular values, which the iteration leaves between about 0.7 and 1.2.
    assert np.sqrt(np.mean(got**2)) == pytest.approx(UPDATE_RMS, rel=0.3)


def tolerance_of(grads):
    """Returns the relative bound for the updates of all matrices in the layers; each head is a matrix of its own."""
    heads = lambda name, x: x.swapaxes(1, 2) if name in ("q_proj", "k_proj", "v_proj") else x  # noqa: E731
    matrices = [heads(name, x) for name, x in grads["blocks"].items() if not name.endswith("norm")]
    return max(map(rounding.of_newton_schulz, matrices))


def updates_on(device_mesh, grads):
    with jax.set_mesh(device_mesh):
        abstract = transformer.split(transformer.abstract_model(SHAPE, ComputeConfig()))[1]
        grads = jax.tree.map(lambda p, g: jax.device_put(g, p.sharding.spec), abstract, grads)
        params = grads  # without weight decay, the updates do not depend on the parameters
        optimizer = make_optimizer(OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=0.0))
        updates, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
        for update, parameter in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert jax.typeof(update).sharding.spec == jax.typeof(parameter).sharding.spec
        return jax.tree.map(np.asarray, updates)


@pytest.mark.slow
def test_same_on_every_mesh_and_adam_for_the_rest(rng, make_mesh):
    with jax.set_mesh(make_mesh()):
        abstract = transformer.split(transformer.abstract_model(SHAPE, ComputeConfig()))[1]
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), abstract)
    one = updates_on(make_mesh(), grads)
    # These meshes divide the four layers among fsdp x tensor, among all devices, not at all, and among fsdp.
    for sizes in ((2, 2, 2), (1, 4, 1), (1, 8, 1), (1, 4, 2)):
        other = updates_on(make_mesh(*sizes), grads)
        jax.tree.map(lambda a, b: rounding.assert_close(a, b, tolerance_of(grads)), one, other)
    for name in ("embedding", "head", "final_norm"):
        # Adam's first update is the sign of the gradient, unless the gradient is nearly zero.
        g = grads[name].astype(np.float64)
        np.testing.assert_allclose(one[name], g / (np.abs(g) + 1e-8), rtol=ADAM)
    g = grads["blocks"]["attn_norm"].astype(np.float64)
    np.testing.assert_allclose(one["blocks"]["attn_norm"], g / (np.abs(g) + 1e-8), rtol=ADAM)


def test_heads_are_matrices_of_their_own(rng, make_mesh):
    with jax.set_mesh(make_mesh()):
        abstract = transformer.split(transformer.abstract_model(SHAPE, ComputeConfig()))[1]
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), abstract)
    updates = updates_on(make_mesh(), grads)["blocks"]
    nesterov = 1 + 0.95  # Nesterov momentum scales the first gradient by this factor; orthogonalising removes it.
    for name in ("q_proj", "k_proj"):
        one_head = np.asarray(orthogonalise(jnp.asarray(nesterov * grads["blocks"][name][1, :, 1, :])))
        rounding.assert_close(updates[name][1, :, 1, :], one_head, tolerance_of(grads))
    one_head = np.asarray(orthogonalise(jnp.asarray(grads["blocks"]["attn_out"][2, 3])))
    rounding.assert_close(updates["attn_out"][2, 3], one_head, tolerance_of(grads))


def test_unknown_name():
    with pytest.raises(UserError, match="optimizer.name='sgd'"):
        make_optimizer(OptimizerConfig(name="sgd"))
