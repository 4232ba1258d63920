"""Tests the masked loss against a plain computation: values, gradients, meshes, and chunks that do not fit evenly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from jax.sharding import PartitionSpec as P

from llada_jax.devices import mesh
from llada_jax.diffusion.cross_entropy import linear_cross_entropy

B, T, D, V = 8, 12, 16, 64
# A logit is a sum over D and of size sqrt(D); its error is the relative error of a probability. The sum over the
# vocabulary is that of a softmax and of the product of a gradient with the head. The loss and the gradient of the head
# are sums over all positions.
TOLERANCE = rounding.of_sum(D) + rounding.of_chain(V, V, B * T, roundings=4 * rounding.FUNCTION)


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
        # The same numbers, but other devices than CPUs may sum in another order in another program.
        rounding.assert_close(np.asarray(nll), np.asarray(nll_alone), TOLERANCE)
        rounding.assert_close(np.asarray(total), np.asarray(alone), TOLERANCE)
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
            rounding.assert_close(got, wanted, TOLERANCE)


def test_rows_unevenly_masked_over_devices(rng, make_mesh):
    """If one device has all masked positions and the others have none, all must still make as many turns."""
    h, head, targets, weight = case(rng, 1.0)
    weight[1:] = 0
    one = ours(make_mesh(), (h, head, targets, weight), 3)
    eight = ours(make_mesh(data=2, fsdp=2, tensor=2), (h, head, targets, weight), 3)
    for a, b in zip(one, eight, strict=True):
        rounding.assert_close(a, b, TOLERANCE)


def test_logits_are_fp32_for_bfloat16_inputs(rng, make_mesh):
    """Products of bfloat16 numbers are exact in fp32, so the loss has no other error than that of fp32 sums."""
    h, head, *rest = case(rng, 0.5)
    h, head = (np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (h, head))
    with jax.enable_x64(True):
        wide = plain(jnp.asarray(h, jnp.float64), jnp.asarray(head, jnp.float64), *rest)
        total, nll = map(np.asarray, wide)
    got_total, got_nll, _, dhead = ours(make_mesh(), (h, head.astype(np.float32), *rest), 5)
    rounding.assert_close(got_total, total, TOLERANCE)
    rounding.assert_close(got_nll, nll * (rest[1] > 0), TOLERANCE)
    assert got_nll.dtype == dhead.dtype == np.float32
    # On CPUs the compiler may keep more digits than the program asks for. Other devices round as the program says.
    with jax.set_mesh(make_mesh()):
        specs = (mesh.HIDDEN_BTD, mesh.PARAMETERS["head"], mesh.TOKENS_BT, mesh.TOKENS_BT)
        placed = [jax.device_put(x, spec) for x, spec in zip((h, head.astype(np.float32), *rest), specs, strict=True)]
        program = str(jax.make_jaxpr(functools.partial(linear_cross_entropy, chunk=5))(*placed))
    assert f"f32[5,{V}]" in program and f"bf16[5,{V}]" not in program


def test_gradient_scales_with_cotangent(rng, make_mesh):
    """The gradients are computed in the forward pass, and must still be multiplied by the cotangent of the loss."""
    h, head, targets, weight = case(rng, 0.5)
    with jax.set_mesh(make_mesh()):
        h, targets, weight = (jax.device_put(x, P(mesh.BATCH, *(None,) * (x.ndim - 1))) for x in (h, targets, weight))
        head = jax.device_put(head, mesh.PARAMETERS["head"])
        loss = lambda h, head, scale: scale * linear_cross_entropy(h, head, targets, weight, 7)[0]  # noqa: E731
        gradients = jax.grad(loss, (0, 1))
        # One product more on either side.
        for tripled, single in zip(gradients(h, head, 3.0), gradients(h, head, 1.0), strict=True):
            np.testing.assert_allclose(tripled, 3 * single, rtol=rounding.of_chain(roundings=2))


def test_large_logits_do_not_overflow(make_mesh):
    h = np.full((1, 1, D), 50.0, np.float32)
    head = np.zeros((D, V), np.float32)
    head[:, 3] = 1.0
    total, nll, dh, dhead = ours(make_mesh(), (h, head, np.array([[4]], np.int32), np.ones((1, 1), np.float32)), 4)
    assert total == pytest.approx(50.0 * D, rel=TOLERANCE)
    assert np.isfinite(dh).all() and np.isfinite(dhead).all()
