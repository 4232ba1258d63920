"""Tests the attention and the projections for CPUs against the plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from llada_jax.devices import mesh
from llada_jax.model import cpu
from llada_jax.model.attention import reference_attention

B, T, H, K = 2, 13, 4, 8
SCORE = 5  # no score of these inputs is larger; the components of queries and keys are normal


def inputs(rng, groups, dtype=jnp.float32, keys=T):
    shapes = ((B, T, H, K), (B, keys, groups, K), (B, keys, groups, K), (B, T, H, K))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def values_and_gradients(function, q, k, v, dout, real):
    def loss(q, k, v):
        out = function(q, k, v, real)
        return jnp.sum((out * dout).astype(jnp.float32)), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    alone = jax.jit(lambda *inputs: function(*inputs))  # a new function, so that no program with other tiles is used
    np.testing.assert_array_equal(np.asarray(out), np.asarray(alone(q, k, v, real)))
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


REAL = {
    "all": None,
    "mask": np.arange(T)[None, :] >= np.array([[3], [0]]),
    "lengths": np.array([5, T], np.int32),
    "a row without any": np.array([0, T], np.int32),
}


@pytest.mark.parametrize(("name", "groups"), [("all", 4), ("mask", 2), ("lengths", 1), ("a row without any", 4)])
def test_attention_equals_reference(rng, name, groups):
    real = REAL[name]
    *qkv, dout = inputs(rng, groups)
    lengths = None if real is None else jnp.asarray(real if real.ndim == 2 else np.arange(T) < real[:, None])
    wanted = values_and_gradients(reference_attention, *qkv, dout, lengths)
    got = values_and_gradients(cpu.cpu_attention, *qkv, dout, None if real is None else jnp.asarray(real))
    rows = slice(None) if name != "a row without any" else slice(1, None)
    for one, other in zip(got, wanted, strict=True):
        assert np.isfinite(one).all()
        # The gradient of a row without any real token may have any values, as long as they are finite.
        np.testing.assert_allclose(one[rows], other[rows], **rounding.of_attention(T, K, T * H // groups, SCORE))
    np.testing.assert_allclose(got[0], wanted[0], **rounding.of_attention(T, K, score=SCORE))


@pytest.mark.parametrize(("scores", "groups"), [(1, 2), (T * 16, 4), (T * T, 2), (3 * T * T, 4), (10**6, 2)])
def test_cuts_do_not_change_attention(rng, monkeypatch, scores, groups):
    """Tiles with chunks of queries that do not fit evenly, with one head, with several heads, and with all heads."""
    *qkv, dout = inputs(rng, groups)
    real = jnp.asarray(REAL["mask"])
    wanted = values_and_gradients(reference_attention, *qkv, dout, real)
    monkeypatch.setattr(cpu, "SCORES", scores)
    for one, other in zip(values_and_gradients(cpu.cpu_attention, *qkv, dout, real), wanted, strict=True):
        np.testing.assert_allclose(one, other, **rounding.of_attention(T, K, T * H // groups, SCORE))


@pytest.mark.parametrize(("rows", "heads"), [(1, 2), (2, 4)])
def test_turns_of_several_rows_or_heads(rng, monkeypatch, rows, heads):
    """Of 4 rows and 4 key/value heads, each with two query heads, each turn takes some."""
    shapes = ((4, T, 8, K), (4, T, 4, K), (4, T, 4, K), (4, T, 8, K))
    *qkv, dout = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    real = jnp.asarray([T, 3, 8, 1], jnp.int32)
    wanted = values_and_gradients(reference_attention, *qkv, dout, jnp.arange(T) < real[:, None])
    monkeypatch.setattr(cpu, "SCORES", rows * heads * 2 * T * T)
    tiles = cpu._Tiles(shapes[0], shapes[1])
    assert (tiles.rows, tiles.heads, tiles.turns) == (rows, heads, 16 // (rows * heads))
    for one, other in zip(values_and_gradients(cpu.cpu_attention, *qkv, dout, real), wanted, strict=True):
        np.testing.assert_allclose(one, other, **rounding.of_attention(T, K, T * 2, SCORE))


def test_attention_with_other_keys_than_queries_and_in_bfloat16(rng):
    *qkv, dout = inputs(rng, 2, jnp.bfloat16, keys=21)
    wide = [x.astype(jnp.float32) for x in (*qkv, dout)]
    wanted = values_and_gradients(reference_attention, *wide, None)
    for one, other in zip(values_and_gradients(cpu.cpu_attention, *qkv, dout, None), wanted, strict=True):
        # The weights, the outputs, their gradients divided by the sums of weights, the gradients of the scores and the
        # results are rounded to bfloat16; sums are in fp32.
        rounding.assert_close(one, other, rounding.of_chain(roundings=5, eps=rounding.BF16_EPS / 2))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("equation", "x", "weight", "x_spec", "weight_spec", "spec"),
    [
        ("btd,df->btf", (8, 5, 16), (16, 12), mesh.HIDDEN_BTD, "ff_proj", mesh.FEED_FORWARD_BTF),
        ("btd,dhk->bthk", (8, 5, 16), (16, 4, 8), mesh.HIDDEN_BTD, "q_proj", mesh.HEADS_BTHK),
        ("btd,dhk->bthk", (8, 5, 16), (16, 2, 4), mesh.HIDDEN_BTD, "k_proj", mesh.HEADS_BTHK),
        ("bthk,hkd->btd", (8, 5, 4, 8), (4, 8, 16), mesh.HEADS_BTHK, "attn_out", mesh.HIDDEN_BTD),
        ("btf,fd->btd", (8, 5, 12), (12, 16), mesh.FEED_FORWARD_BTF, "ff_out", mesh.HIDDEN_BTD),
        # Here the output is so narrow that its gradient is transposed, not the input.
        ("btf,fd->btd", (8, 5, 24), (24, 4), mesh.FEED_FORWARD_BTF, "ff_out", mesh.HIDDEN_BTD),
    ],
)
def test_project_equals_einsum(rng, make_mesh, sizes, dtype, equation, x, weight, x_spec, weight_spec, spec):
    x, weight = jnp.asarray(rng.normal(size=x), dtype), jnp.asarray(rng.normal(size=weight), dtype)
    with jax.set_mesh(make_mesh(*sizes)):
        x = jax.device_put(x, x_spec)
        weight = jax.device_put(weight, mesh.gathered(mesh.PARAMETERS[weight_spec]))

        y = jax.eval_shape(lambda: jnp.einsum(equation, x, weight, out_sharding=spec))
        dy = jnp.asarray(rng.normal(size=y.shape))

        def run(function):
            def loss(x, weight):
                y = function(equation, x, weight, spec)
                return jnp.sum(y.astype(jnp.float32) * dy), y

            gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, weight)
            for one, other in zip((y, *gradients), (None, x, weight), strict=True):
                assert one.dtype == dtype
                assert other is None or jax.typeof(one) == jax.typeof(other)
            return [np.asarray(value, np.float32) for value in (y, *gradients)]

        plain = run(lambda equation, x, weight, spec: jnp.einsum(equation, x, weight, out_sharding=spec))
        # A gradient of the weights is a sum over 8 x 5 tokens, the others are sums over at most 4 x 8 inputs or
        # outputs. In bfloat16 both forms round the fp32 sum, the plain form also the partial sums of up to 4 shards.
        tolerance = rounding.of_chain(8 * 5)
        if dtype == jnp.bfloat16:
            tolerance = rounding.of_chain(roundings=2 + 3, eps=rounding.BF16_EPS / 2)
        for one, other in zip(run(cpu.project), plain, strict=True):
            rounding.assert_close(one, other, tolerance)
