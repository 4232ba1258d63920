"""Tests causal attention of all kernels against its definition in numpy, and what a Transformer has of Llama and Qwen.

The splash kernel is interpreted; a plain function takes the place of cuDNN's, with the arguments that cuDNN accepts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from jax.sharding import PartitionSpec as P

from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.devices import mesh
from llada_jax.model import cpu
from llada_jax.model.attention import attention
from llada_jax.model.rope import rope_table
from llada_jax.model.transformer import initialise

SCORE = 6  # no score of these cases is larger; the components of queries and keys are normal


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the call of cuDNN by XLA's plain attention; it accepts only lengths as a mask."""
    plain = jax.nn.dot_product_attention

    def call(q, k, v, *, key_value_seq_lengths, is_causal, implementation):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        return plain(q, k, v, key_value_seq_lengths=key_value_seq_lengths, is_causal=is_causal, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)


def definition(q, k, v, real_BT, dout):
    """Computes causal attention and the gradients of sum(out * dout) in float64, one query at a time.

    Queries that are not real have no output, and dout is taken as zero there.
    """
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    out, (dq, dk, dv) = np.zeros_like(q), (np.zeros_like(x) for x in (q, k, v))
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    for b, i, h in np.ndindex(q.shape[:3]):
        if not real_BT[b, i]:
            continue
        seen, g = np.flatnonzero(real_BT[b, : i + 1]), h // group
        scores = k[b, seen, g] @ q[b, i, h] * scale
        weight = np.exp(scores - scores.max())
        weight /= weight.sum()
        out[b, i, h] = weight @ v[b, seen, g]
        dv[b, seen, g] += weight[:, None] * dout[b, i, h]
        dscores = weight * (v[b, seen, g] @ dout[b, i, h] - out[b, i, h] @ dout[b, i, h]) * scale
        dq[b, i, h] = dscores @ k[b, seen, g]
        dk[b, seen, g] += dscores[:, None] * q[b, i, h]
    return out, dq, dk, dv


def real_of(kind, rows, length):
    """Returns what the attention is told, and the mask that it means: padding is in front, behind, or nowhere."""
    if kind == "all":
        return None, np.ones((rows, length), bool)
    counts = np.array([length, length // 3, 1][:rows], np.int32)
    if kind == "behind":
        return counts, np.arange(length) < counts[:, None]
    mask = np.arange(length) >= length - counts[:, None]
    return mask, mask


@pytest.mark.parametrize("kind", ["all", "behind", "in front"])
@pytest.mark.parametrize(
    ("kernel", "length", "width"),
    [("reference", 11, 6), ("xla", 11, 6), ("cpu", 13, 8), ("cudnn", 9, 8), ("splash_interpreted", 150, 64)],
)
def test_kernels_equal_the_definition(rng, stand_in, monkeypatch, kernel, length, width, kind):
    heads, groups, rows = 4, 2, 3
    if kernel == "splash_interpreted" and kind == "all":
        rows = 1
    monkeypatch.setattr(cpu, "SCORES", 8 * length)  # chunks of queries that begin and end within a head
    told, real_BT = real_of(kind, rows, length)
    shapes = [(rows, length, n, width) for n in (heads, groups, groups, heads)]
    q, k, v, dout = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    dout *= real_BT[:, :, None, None]

    def loss(q, k, v):
        real = None if told is None else jax.reshard(jnp.asarray(told), P(mesh.BATCH, *(None,) * (told.ndim - 1)))
        out = attention(q, k, v, real, kernel=kernel, query_chunk=4, causal=True)
        return (out * jax.reshard(jnp.asarray(dout), mesh.HEADS_BTHK)).sum(), out

    with jax.set_mesh(mesh.one_device_mesh()):
        placed = [jax.device_put(x, mesh.HEADS_BTHK) for x in (q, k, v)]
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*placed)
    assert np.isfinite(out).all()
    out = np.where(real_BT[:, :, None, None], out, 0.0)
    tolerance = rounding.of_attention(length, width, length * heads // groups, SCORE)
    for one, other in zip((out, *gradients), definition(q, k, v, real_BT, dout), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


@pytest.mark.parametrize("kernel", ["cpu", "xla"])
def test_same_on_any_mesh(rng, make_mesh, kernel):
    x = [rng.normal(size=(4, 11, n, 8)).astype(np.float32) for n in (4, 2, 2)]
    lengths = np.array([11, 3, 1, 7], np.int32)

    def run(sizes):
        with jax.set_mesh(make_mesh(*sizes)):
            placed = [jax.device_put(each, mesh.HEADS_BTHK) for each in x]
            real = jax.device_put(lengths, mesh.ROWS_B)
            call = jax.jit(lambda q, k, v, real: attention(q, k, v, real, kernel=kernel, query_chunk=4, causal=True))
            return np.asarray(call(*placed, real))

    np.testing.assert_allclose(run((2, 2, 2)), run((1, 1, 1)), **rounding.of_attention(11, 8, score=SCORE))


SIZES = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, feed_forward=48, vocab_size=64, causal=True)


def test_later_tokens_and_padding_change_nothing(rng, make_mesh):
    with jax.set_mesh(make_mesh()):
        model = initialise(SIZES, ComputeConfig(dtype="float32"), jax.random.key(1))
    tokens_BT = rng.integers(0, 64, (2, 12)).astype(np.int32)
    logits_BTV = np.asarray(model(tokens_BT))
    changed_BT = np.where(np.arange(12) < 7, tokens_BT, rng.integers(0, 64, (2, 12))).astype(np.int32)
    bound = rounding.of_logits(SIZES, 24)
    rounding.assert_close(np.asarray(model(changed_BT))[:, :7], logits_BTV[:, :7], bound)
    assert np.abs(np.asarray(model(changed_BT))[:, 7:] - logits_BTV[:, 7:]).max() > 0.1
    for front in (5, 0):
        around = ((0, 0), (front, 5 - front))
        padded_BT, real_BT = (np.pad(x, around) for x in (tokens_BT, np.ones((2, 12), bool)))
        padded_BTV = np.asarray(model(padded_BT, real_BT))
        rounding.assert_close(padded_BTV[:, front : front + 12], logits_BTV, bound)


def test_biases_start_at_zero_and_the_other_parameters_do_not_change(make_mesh):
    more = dataclasses.replace(SIZES, qkv_bias=True, qk_norm=True)
    with jax.set_mesh(make_mesh(1, 2, 2)):
        plain, new = (initialise(c, ComputeConfig(dtype="float32"), jax.random.key(1)) for c in (SIZES, more))
    np.testing.assert_array_equal(new.blocks.ff_out[...], plain.blocks.ff_out[...])
    assert new.blocks.k_bias[...].shape == (2, 2, 8) and not np.asarray(new.blocks.k_bias[...]).any()
    assert (np.asarray(new.blocks.q_norm[...]) == np.ones((2, 8))).all()


def test_the_scaling_of_llama_3():
    """The frequencies as Llama 3.1 defines them by wavelength, for each component on its own."""
    factor, low, high, length = 8.0, 1.0, 4.0, 8192.0
    cos, sin = rope_table(2, 128, 500_000.0, (factor, low, high, length))
    # The angles at position 1. The sines of the first half have the opposite sign.
    found = np.arctan2(np.asarray(sin[1, 64:], np.float64), np.asarray(cos[1, 64:], np.float64))
    kinds = set()
    for i in range(64):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * np.pi / frequency
        if wavelength < length / high:
            wanted, kind = frequency, "kept"
        elif wavelength > length / low:
            wanted, kind = frequency / factor, "divided"
        else:
            share = (length / wavelength - low) / (high - low)
            wanted, kind = (1 - share) * frequency / factor + share * frequency, "between"
        kinds.add(kind)
        np.testing.assert_allclose(found[i], wanted, rtol=2e-5)
    assert kinds == {"kept", "divided", "between"}
