"""Tests the masked loss against a plain computation: values, gradients, meshes, and chunks that do not fit evenly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llada_jax.devices import mesh
from llada_jax.diffusion.cross_entropy import linear_cross_entropy

B, T, D, V = 8, 12, 16, 64


def case(rng, density):
    h = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weight = (rng.uniform(size=(B, T)) < density) * rng.uniform(0.5, 3, (B, T))
    return h, head, targets, weight.astype(np.float32)


def plain(h, head, targets, weight):
    """Computes the loss from all logits at once. The test calls it in float64 and lets JAX differentiate it."""
    log_p = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", h, head), axis=-1)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return (nll * weight).sum(), nll


def ours(device_mesh, arrays, chunk):
    h, head, targets, weight = arrays
    with jax.set_mesh(device_mesh):
        h = jax.device_put(h, mesh.HIDDEN_BTD)
        head = jax.device_put(head, mesh.PARAMETERS["head"])
        targets, weight = (jax.device_put(x, mesh.TOKENS_BT) for x in (targets, weight))
        run = jax.jit(
            jax.value_and_grad(lambda h, w: linear_cross_entropy(h, w, targets, weight, chunk), (0, 1), has_aux=True)
        )
        (total, nll), (dh, dhead) = run(h, head)
        assert jax.typeof(dhead).sharding.spec == mesh.PARAMETERS["head"]
        alone, nll_alone = jax.jit(linear_cross_entropy, static_argnums=4)(h, head, targets, weight, chunk)
        np.testing.assert_array_equal(np.asarray(nll), np.asarray(nll_alone))
        np.testing.assert_array_equal(np.asarray(total), np.asarray(alone))
        return [np.asarray(x) for x in (total, nll, dh, dhead)]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 2, 4)])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_equals_plain_form(rng, make_mesh, sizes, density):
    arrays = case(rng, density)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64 if x.dtype == np.float32 else x.dtype) for x in arrays]
        (total, nll), grads = jax.value_and_grad(lambda h, w: plain(h, w, *wide[2:]), (0, 1), has_aux=True)(*wide[:2])
        expected = [np.asarray(x) for x in (total, nll * (arrays[3] > 0), *grads)]
    for chunk in (5, 1000):  # 5 does not divide the number of positions; 1000 is greater than it
        for got, wanted in zip(ours(make_mesh(*sizes), arrays, chunk), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_rows_unevenly_masked_over_devices(rng, make_mesh):
    """If one device has all masked positions and the others have none, all must still make as many turns."""
    h, head, targets, weight = case(rng, 1.0)
    weight[1:] = 0
    one = ours(make_mesh(), (h, head, targets, weight), 3)
    eight = ours(make_mesh(data=2, fsdp=2, tensor=2), (h, head, targets, weight), 3)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_scales_with_cotangent(rng, make_mesh):
    """The gradients are computed in the forward pass, and must still be multiplied by the cotangent of the loss."""
    h, head, targets, weight = case(rng, 0.5)
    with jax.set_mesh(make_mesh()):
        h, targets, weight = (jax.device_put(x, P(mesh.BATCH, *(None,) * (x.ndim - 1))) for x in (h, targets, weight))
        head = jax.device_put(head, mesh.PARAMETERS["head"])
        loss = lambda h, scale: scale * linear_cross_entropy(h, head, targets, weight, 7)[0]  # noqa: E731
        np.testing.assert_allclose(jax.grad(loss)(h, 3.0), 3 * jax.grad(loss)(h, 1.0), rtol=1e-6)


def test_large_logits_do_not_overflow(make_mesh):
    h = np.full((1, 1, D), 50.0, np.float32)
    head = np.zeros((D, V), np.float32)
    head[:, 3] = 1.0
    total, nll, dh, dhead = ours(make_mesh(), (h, head, np.array([[4]], np.int32), np.ones((1, 1), np.float32)), 4)
    assert total == pytest.approx(50.0 * D)
    assert np.isfinite(dh).all() and np.isfinite(dhead).all()
