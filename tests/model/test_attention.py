"""Tests all kernels against the reference kernel, and the reference kernel against the definition, written in numpy.

The splash kernel is interpreted. The call of cuDNN cannot run without a GPU. There, a plain function with the same
arguments takes its place, so that the code around the call is tested; on a GPU the same tests run the call itself.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from jax.sharding import PartitionSpec as P

from llada_jax.config import UserError
from llada_jax.devices import mesh
from llada_jax.model import attention as kernels
from llada_jax.model.attention import attention, choose_kernel, cudnn_attention, reference_attention, xla_attention

B, T, H, G, K = 8, 11, 8, 4, 6
SCORE = 6  # no score of these cases is larger; the components of queries and keys are normal


def case(rng, groups=G, keys=T):
    q = rng.normal(size=(B, T, H, K)).astype(np.float32)
    k = rng.normal(size=(B, keys, groups, K)).astype(np.float32)
    v = rng.normal(size=(B, keys, groups, K)).astype(np.float32)
    mask = rng.uniform(size=(B, keys)) < 0.6
    mask[:, 0] = True
    mask[2] = True
    return q, k, v, mask


def definition(q, k, v, mask):
    """Computes softmax(q k^T / sqrt(K)) v in float64, one head at a time."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        seen = slice(None) if mask is None else mask[b]
        for h in range(q.shape[2]):
            keys, values = k[b, seen, h // group].astype(np.float64), v[b, seen, h // group].astype(np.float64)
            scores = q[b, :, h].astype(np.float64) @ keys.T / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ values
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [8, 4, 1])
def test_reference_is_the_definition(rng, groups, masked):
    q, k, v, mask = case(rng, groups, keys=9)
    mask = mask if masked else None
    tolerance = rounding.of_attention(9, K, score=SCORE)
    np.testing.assert_allclose(reference_attention(q, k, v, mask), definition(q, k, v, mask), **tolerance)


@pytest.mark.parametrize(("chunk", "masked"), [(4, False), (4, True), (512, True)])  # 4 does not divide 11
def test_chunks_equal_the_reference_in_values_and_gradients(rng, chunk, masked):
    q, k, v, mask = case(rng)
    mask = mask if masked else None
    cotangent = rng.normal(size=(B, T, H, K)).astype(np.float32)

    def run(function, *inputs):
        loss = lambda q, k, v: (out := function(q, k, v), (out * cotangent).sum())[::-1]  # noqa: E731
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
        return out, *gradients

    chunked = run(lambda q, k, v: xla_attention(q, k, v, mask, query_chunk=chunk), q, k, v)
    for a, b in zip(chunked, run(lambda q, k, v: reference_attention(q, k, v, mask), q, k, v), strict=True):
        np.testing.assert_allclose(a, b, **rounding.of_attention(T, K, T * H // G, SCORE))


REAL = ("all", "mask", "lengths")


def real_of(kind, rng, batch, keys):
    if kind == "all":
        return None
    if kind == "lengths":
        return np.concatenate([[keys, 1], rng.integers(1, keys + 1, batch - 2)]).astype(np.int32)
    mask = rng.uniform(size=(batch, keys)) < 0.6  # with gaps, like the rows of a left-padded prompt with its canvas
    mask[:, 3] = True
    return mask


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the call of cuDNN by XLA's plain attention if there is no GPU; it accepts only lengths as a mask."""
    if jax.default_backend() == "gpu":
        return
    plain = jax.nn.dot_product_attention

    def call(q, k, v, *, key_value_seq_lengths, is_causal, implementation):
        assert implementation == "cudnn" and not is_causal
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0  # JAX refuses odd lengths
        assert key_value_seq_lengths is None or key_value_seq_lengths.dtype == jnp.int32
        return plain(q, k, v, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)


KERNELS = [
    ("splash_interpreted", 200, 4, 2, 64),  # padded to 256
    ("splash_interpreted", 128, 2, 2, 128),
    ("splash_interpreted", 640, 2, 1, 64),  # 128 divides 640, but 512 does not
    ("cudnn", 50, 4, 2, 64),
    ("cudnn", 33, 2, 2, 128),
    ("cpu", 50, 4, 2, 64),
    ("xla", 1100, 2, 1, 64),
]


def kinds_of_real(kernel, length, *rest):
    """Yields the case with each kind of real keys; of some kernels, all kinds but one are slow."""
    for kind in REAL:
        slow = kind != {128: "all", 640: "mask", 1100: "lengths"}.get(length, kind)
        yield pytest.param(kernel, length, *rest, kind, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(
    ("kernel", "length", "heads", "groups", "width", "kind"), [x for kernel in KERNELS for x in kinds_of_real(*kernel)]
)
def test_kernels_equal_the_reference(rng, stand_in, kernel, length, heads, groups, width, kind):
    dtype = jnp.bfloat16 if kernel == "cudnn" and jax.default_backend() == "gpu" else jnp.float32
    q, k, v, dout = (jnp.asarray(rng.normal(size=(3, length, n, width)), dtype) for n in (heads, groups, groups, heads))
    rows = real_of(kind, rng, 3, length)

    def run(name):
        def loss(q, k, v):
            real = None if rows is None else jax.reshard(jnp.asarray(rows), P(mesh.BATCH, *(None,) * (rows.ndim - 1)))
            out = attention(q, k, v, real, kernel=name)
            return (out * jax.reshard(dout, mesh.HEADS_BTHK)).astype(jnp.float32).sum(), out

        with jax.set_mesh(mesh.one_device_mesh()):
            placed = [jax.device_put(x, mesh.HEADS_BTHK) for x in (q, k, v)]
            (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*placed)
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    tolerance = rounding.of_attention(length, width, length * heads // groups, SCORE)
    if dtype != jnp.float32:
        # Each kernel rounds weights, their gradients, outputs and gradients to bfloat16, and sums them in fp32.
        tolerance = dict.fromkeys(("rtol", "atol"), rounding.of_chain(roundings=4, eps=rounding.BF16_EPS))
    for a, b in zip(run(kernel), run("reference"), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_cudnn_is_given_the_real_keys_first(rng, stand_in):
    """Keys that are not real have no influence, wherever they are in a row, although cuDNN takes only lengths."""
    q, k, v = (jnp.asarray(rng.normal(size=(B, 16, n, 64)), jnp.bfloat16) for n in (H, G, G))
    mask = real_of("mask", rng, B, 16)
    run = jax.jit(lambda k, v: cudnn_attention(q, k, v, mask))
    far = [jnp.where(mask[:, :, None, None], x, 100) for x in (k, v)]
    np.testing.assert_array_equal(np.asarray(run(k, v)), np.asarray(run(*far)))


class Device:
    def __init__(self, platform, capability=None):
        self.platform = platform
        if capability:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("device", "dtype", "kernel"),
    [
        (Device("tpu"), "bfloat16", "splash"),
        (Device("gpu", "9.0"), "bfloat16", "cudnn"),
        (Device("gpu"), "bfloat16", "cudnn"),  # a device that is only described
        (Device("gpu", "9.0"), "float32", "xla"),
        (Device("gpu", "7.5"), "bfloat16", "xla"),
        (Device("gpu", "gfx942"), "bfloat16", "xla"),
        (Device("cpu"), "float32", "cpu"),
    ],
)
def test_kernel_is_chosen_by_device(device, dtype, kernel):
    assert choose_kernel("auto", jnp.dtype(dtype), 64, device) == kernel


def test_deterministic_steps_do_without_cudnn():
    gpu = Device("gpu", "9.0")
    assert choose_kernel("auto", jnp.dtype("bfloat16"), 64, gpu, deterministic=True) == "xla"
    assert choose_kernel("auto", jnp.dtype("bfloat16"), 64, Device("tpu"), deterministic=True) == "splash"
    with pytest.raises(UserError, match="cudnn: XLA fails on it with config.compute.deterministic"):
        choose_kernel("cudnn", jnp.dtype("bfloat16"), 64, gpu, deterministic=True)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "width", "problem"),
    [
        ("splash", Device("cpu"), "float32", 64, "runs on tpu, but the device is cpu"),
        ("splash", Device("gpu"), "bfloat16", 64, "runs on tpu, but the device is gpu"),
        ("cpu", Device("tpu"), "bfloat16", 64, "runs on cpu, but the device is tpu"),
        ("cudnn", Device("cpu"), "bfloat16", 64, "runs on gpu, but the device is cpu"),
        ("cudnn", Device("gpu"), "float32", 64, "--config.compute.dtype=bfloat16"),
        ("cudnn", Device("gpu", "7.5"), "bfloat16", 64, "capability 8.0"),
        ("cudnn", Device("gpu", "gfx942"), "bfloat16", 64, "capability 8.0 or higher, but this device has gfx942"),
        ("cudnn", Device("gpu", "9.0"), "bfloat16", 512, "a width of 512"),
        ("cudnn", Device("gpu", "9.0"), "bfloat16", 12, "a width of 12"),
        ("flash", Device("gpu"), "bfloat16", 64, "choose one of auto, xla"),
    ],
)
def test_a_kernel_that_cannot_run_is_an_error(name, device, dtype, width, problem):
    with pytest.raises(UserError, match=problem):
        choose_kernel(name, jnp.dtype(dtype), width, device)


@pytest.mark.parametrize("name", ["splash_interpreted", "xla", "reference", "cpu"])
def test_a_kernel_that_can_run_is_taken(name):
    assert choose_kernel(name, jnp.dtype("float32"), 64, Device("cpu")) == name
    assert set(kernels.KERNELS) | {"auto"} == set(kernels.CHOICES)


def test_scores_of_all_queries_are_never_held():
    """With chunks, neither the forward nor the backward pass has an array of T * T numbers, whatever its shape."""
    length, chunk = 96, 8
    q = jnp.zeros((1, length, 1, 4))

    def largest(function):
        text = str(jax.make_jaxpr(jax.grad(lambda q: function(q).sum()))(q))
        return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text))

    assert largest(lambda q: xla_attention(q, q, q, None, query_chunk=chunk)) < length * length / 4
    assert largest(lambda q: reference_attention(q, q, q, None)) == length * length


@pytest.mark.parametrize("kernel", [functools.partial(xla_attention, query_chunk=4), reference_attention])
def test_masked_keys_have_no_influence(rng, kernel):
    q, k, v, mask = case(rng)
    run = jax.jit(lambda k, v: kernel(q, k, v, mask))
    changed = [np.where(mask[:, :, None, None], x, other).astype(np.float32) for x, other in ((k, 100), (v, -100))]
    np.testing.assert_array_equal(np.asarray(run(k, v)), np.asarray(run(*changed)))
    moved = np.asarray(run(k + 0.1 * mask[:, :, None, None] * rng.normal(size=k.shape).astype(np.float32), v))
    assert (np.abs(moved - np.asarray(run(k, v))).max(axis=(1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("kernel", [functools.partial(xla_attention, query_chunk=4), reference_attention])
def test_row_without_any_real_key_is_finite(rng, kernel):
    q, k, v, mask = case(rng)
    mask[3] = False
    loss = lambda q, k, v: (kernel(q, k, v, mask) ** 2).sum()  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("kernel", ["xla", "cpu", "cudnn", "splash_interpreted"])
@pytest.mark.parametrize(("sizes", "masked"), [((2, 2, 2), True), ((1, 2, 4), False)])
def test_same_on_any_mesh(rng, make_mesh, stand_in, kernel, sizes, masked):
    if kernel == "cudnn" and jax.default_backend() == "gpu":
        pytest.skip("cuDNN computes in bfloat16, but this test compares fp32")
    q, k, v, mask = case(rng)
    cotangent = rng.normal(size=(B, T, H, K)).astype(np.float32)

    def run(sizes):
        with jax.set_mesh(make_mesh(*sizes)):
            put = lambda x: jax.device_put(x, mesh.HEADS_BTHK)  # noqa: E731
            key_mask = jax.device_put(mask, mesh.TOKENS_BT) if masked else None
            loss = lambda q, k, v: (attention(q, k, v, key_mask, kernel=kernel, query_chunk=4) * put(cotangent)).sum()  # noqa: E731
            value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(put(q), put(k), put(v))
            return [np.asarray(x) for x in (value, *gradients)]

    tolerance = rounding.of_attention(T, K, T * H // G, SCORE)
    value, *gradients = zip(run(sizes), run((1, 1, 1)), strict=True)
    # The value is a sum over all elements, whose terms have the error of an output and the size of the cotangent.
    terms = B * T * H * K
    np.testing.assert_allclose(*value, rtol=0, atol=rounding.of_sum(terms) + terms**0.5 * tolerance["atol"])
    for a, b in gradients:
        np.testing.assert_allclose(a, b, **tolerance)


def test_softmax_is_fp32_for_bfloat16_inputs(rng):
    q, k, v, mask = case(rng)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = reference_attention(*low, mask)
    assert out.dtype == jnp.bfloat16
    exact = definition(*(np.asarray(x, np.float64) for x in low), mask)
    # Only the weights and the output are rounded to bfloat16. The scores are not: an error of eps / 2 of a score of 5
    # would be an error of 2 % of its weight.
    tolerance = rounding.of_chain(roundings=2, eps=rounding.BF16_EPS / 2)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=tolerance, atol=tolerance)
    text = str(jax.make_jaxpr(lambda q, k, v: reference_attention(q, k, v, mask))(*low))
    assert not any("exp" in line.split() and "bf16" in line for line in text.splitlines())


def test_unknown_kernel():
    x = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(UserError, match="config.compute.attention='flash'.* xla, reference"):
        attention(x, x, x, None, kernel="flash")
