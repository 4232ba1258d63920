"""Tests the mask predictor against a plain float64 model, its initialisation, and its equality on any mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from llada_jax.config import ComputeConfig, ModelConfig, UserError
from llada_jax.devices import mesh
from llada_jax.model import transformer as models
from llada_jax.model.compute import compute_dtype
from llada_jax.model.transformer import Transformer, added_columns, initialise, merge, split

CONFIG = ModelConfig(layers=2, width=32, heads=8, kv_heads=4, feed_forward=48, vocab_size=64, mask_id=63)
TIED = dataclasses.replace(CONFIG, tied_embeddings=True, kv_heads=8)
UNEVEN = dataclasses.replace(CONFIG, feed_forward=44)  # the matrices are used with zeros added
COMPUTE = ComputeConfig(dtype="float32", query_chunk=4, unroll=1)
B, T = 4, 10


@pytest.fixture(scope="module")
def built():
    """Returns built(config, compute), which returns the model on one device and makes each model only once."""

    @functools.cache
    def make(config=CONFIG, compute=COMPUTE) -> Transformer:
        with jax.set_mesh(mesh.one_device_mesh()):
            model = initialise(config, compute, jax.random.key(1))
            graphdef, params = split(model)
            # If the weights of norms were one, a test could not see where they are applied.
            noise = lambda x: x * (1 + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape))  # noqa: E731
            change = lambda path, x: noise(x) if path[-1].key.endswith("norm") else x  # noqa: E731
            return merge(graphdef, jax.tree_util.tree_map_with_path(change, params))

    return make


@pytest.fixture
def tokens(rng):
    return rng.integers(0, 64, (B, T)).astype(np.int32)


def plain(params, tokens, config, mask=None, order=1):
    """Computes the published architecture with numpy in float64, one row and one head at a time.

    With order=-1, RoPE rotates in the opposite direction.
    """
    as64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * w  # noqa: E731
    blocks, width = {name: as64(x) for name, x in params["blocks"].items()}, config.width // config.heads
    rows = []
    for b, row in enumerate(tokens):
        real = np.ones(len(row), bool) if mask is None else mask[b]
        x = as64(params["embedding"])[row]
        angle = order * np.arange(len(row))[:, None] / config.rope_theta ** (np.arange(0, width, 2) / width)
        turn = np.exp(1j * angle)  # RoPE as complex numbers: component i and i + K / 2 form a pair

        def rope(h, turn=turn):
            z = (h[:, : width // 2] + 1j * h[:, width // 2 :]) * turn
            return np.concatenate([z.real, z.imag], axis=-1)

        for layer in range(config.layers):
            w = {name: value[layer] for name, value in blocks.items()}
            h, attended = norm(x, w["attn_norm"]), 0
            for head in range(config.heads):
                group = head // (config.heads // config.kv_heads)
                q, k = rope(h @ w["q_proj"][:, head]), rope(h @ w["k_proj"][:, group])
                scores = np.where(real, q @ k.T / np.sqrt(width), -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                attended = attended + weights @ (h @ w["v_proj"][:, group]) @ w["attn_out"][head]
            x = x + attended
            h = norm(x, w["ff_norm"])
            gate = h @ w["ff_proj"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"])) @ w["ff_out"]
        head_weight = as64(params["embedding"]).T if config.tied_embeddings else as64(params["head"])
        rows.append(norm(x, as64(params["final_norm"])) @ head_weight)
    return np.stack(rows)


@pytest.mark.parametrize("config", [CONFIG, TIED, UNEVEN], ids=["grouped", "tied", "uneven"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_plain_form(built, tokens, config, padded):
    model = built(config)
    real = np.arange(T) < np.array([T, 1, 4, 9])[:, None]
    real[3] = np.arange(T) >= 3  # padding on the left
    mask = real if padded else None
    logits = model(tokens, mask)
    assert logits.shape == (B, T, 64) and logits.dtype == jnp.float32
    expected = plain(split(model)[1], tokens, config, mask)
    rounding.assert_close(np.asarray(logits)[real], expected[real], rounding.of_logits(config, T))
    # The comparison is sensitive enough to notice if RoPE rotated in the opposite direction.
    other = plain(split(model)[1], tokens, config, mask, order=-1)
    assert np.abs(other - expected)[real].max() > 1e-2


def test_parameter_counts_of_the_paper():
    """The parameter counts are exactly the published numbers, and no parameter is allocated for them."""
    eight = ModelConfig(vocab_size=126464)
    one = ModelConfig(layers=22, width=2048, heads=32, kv_heads=4, feed_forward=5634, vocab_size=126464)
    baseline = ModelConfig(layers=28, width=4096, heads=32, kv_heads=8, feed_forward=13440, vocab_size=126464)
    tied = ModelConfig(kv_heads=8, feed_forward=14336, vocab_size=155136, tied_embeddings=True)
    assert models.parameter_count(eight) == 8_015_581_184
    assert models.parameter_count(one) == 1_487_243_264
    assert models.parameter_count(baseline) == 6_834_851_840
    assert models.parameter_count(tied) == 7_615_025_152
    assert models.parameter_count(one) - 2 * 2048 * 126464 == 969_246_720


def test_abstract_model_states_shapes_and_shardings(make_mesh):
    with jax.set_mesh(make_mesh(2, 2, 2)):
        abstract = split(models.abstract_model(CONFIG, COMPUTE))[1]
        real = split(initialise(CONFIG, COMPUTE, jax.random.key(1)))[1]
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(real), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct) and (a.shape, a.dtype) == (b.shape, b.dtype)
        spec = mesh.PARAMETERS[path[-1].key]
        if path[0].key == "blocks":
            spec = jax.sharding.PartitionSpec(None, *spec)
        assert tuple(a.sharding.spec) == tuple(b.sharding.spec) == tuple(spec), path
        parts = b.size // b.addressable_shards[0].data.size
        assert parts == (1 if path[-1].key.endswith("norm") else 4)  # fsdp x tensor


def test_initial_sigmas(make_mesh):
    """Each matrix is normal, truncated at 3 sigma, with its own sigma; no two matrices have the same numbers."""
    config = ModelConfig(layers=4, width=128, heads=4, kv_heads=4, feed_forward=512, vocab_size=512)
    with jax.set_mesh(make_mesh()):
        params = jax.device_get(split(initialise(config, COMPUTE, jax.random.key(0)))[1])
    truncated = 0.98658  # standard deviation of a standard normal distribution truncated at 3
    seen = []

    def check(x, sigma):
        assert x.dtype == np.float32
        # The standard deviation of n random numbers is off by about 1 / sqrt(2 n), 0.6 % for the smallest matrix.
        assert x.std() == pytest.approx(truncated * sigma, rel=0.02)
        assert abs(x.mean()) < 5 * sigma / np.sqrt(x.size)
        assert 2.7 * sigma < np.abs(x).max() <= 3 * sigma * (1 + 1e-6)
        seen.append(x.ravel()[:16384] / sigma)

    check(params["embedding"], 128**-0.5)
    check(params["head"], 128**-0.5)
    for layer in range(4):
        depth = (2 * (layer + 1)) ** -0.5
        for name in ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj"):
            check(params["blocks"][name][layer], 128**-0.5)
        check(params["blocks"]["attn_out"][layer], 128**-0.5 * depth)
        check(params["blocks"]["ff_out"][layer], 512**-0.5 * depth)
    correlation = np.corrcoef(np.stack(seen)) - np.eye(len(seen))
    assert np.abs(correlation).max() < 5 / np.sqrt(16384)
    for norm in (params["final_norm"], params["blocks"]["attn_norm"], params["blocks"]["ff_norm"]):
        np.testing.assert_array_equal(norm, 1)
    assert set(params) == {"embedding", "blocks", "final_norm", "head"}


@pytest.mark.parametrize(("sizes", "config"), [((2, 2, 2), UNEVEN), ((1, 8, 1), CONFIG), ((1, 2, 4), TIED)])
def test_same_parameters_and_logits_on_any_mesh(make_mesh, tokens, config, sizes):
    real = np.arange(T) < np.array([T, 2, 7, T])[:, None]

    def run(sizes):
        with jax.set_mesh(make_mesh(*sizes)):
            model = initialise(config, COMPUTE, jax.random.key(1))
        return jax.tree.map(np.asarray, split(model)[1]), np.asarray(model(tokens, real))

    (one, one_logits), (many, many_logits) = run((1, 1, 1)), run(sizes)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        # The inverse of the error function, by which normal numbers are made, is a logarithm and a polynomial.
        rounding.assert_close(a, b, rounding.of_chain(roundings=10))
    rounding.assert_close(many_logits, one_logits, rounding.of_logits(config, T))


def test_every_token_sees_every_other(built, tokens):
    """There is no causal mask: a change of any token changes the logits of all positions, before and after it."""
    model = built()
    before = np.asarray(model(tokens))
    for place in (0, 5, T - 1):
        changed = tokens.copy()
        changed[:, place] = (changed[:, place] + 1) % 64
        assert (np.abs(np.asarray(model(changed)) - before).max(axis=-1) > 1e-4).all()


def test_rows_do_not_see_each_other(built, tokens):
    model = built()
    changed = tokens.copy()
    changed[1] = 0
    before, after = np.asarray(model(tokens)), np.asarray(model(changed))
    np.testing.assert_array_equal(np.delete(after, 1, axis=0), np.delete(before, 1, axis=0))


def test_padding_is_not_attended_to(built, tokens):
    """The logits of real tokens are those of the row without padding, whatever the ids in the padding are."""
    model = built()
    length = 6
    real = np.broadcast_to(np.arange(T) < length, (B, T))
    other = np.where(real, tokens, 63).astype(np.int32)
    padded, changed = np.asarray(model(tokens, real)), np.asarray(model(other, real))
    np.testing.assert_array_equal(padded[:, :length], changed[:, :length])
    alone = np.asarray(model(tokens[:, :length]))
    rounding.assert_close(padded[:, :length], alone, rounding.of_logits(CONFIG, T))
    assert np.abs(np.asarray(model(tokens))[:, :length] - alone).max() > 1e-2


def test_only_distances_count_but_order_does(built, tokens):
    """RoPE gives the same logits to text that is moved to the right, but not to its tokens in another order."""
    model, length = built(), 6
    alone = np.asarray(model(tokens[:, :length]))
    right = np.concatenate([np.zeros((B, T - length), np.int32), tokens[:, :length]], axis=1)
    real = np.broadcast_to(np.arange(T) >= T - length, (B, T))
    rounding.assert_close(np.asarray(model(right, real))[:, T - length :], alone, rounding.of_logits(CONFIG, T))
    backwards = np.asarray(model(tokens[:, :length][:, ::-1]))[:, ::-1]
    assert np.abs(backwards - alone).max() > 1e-2


def test_rope_table_and_rotation():
    cos, sin = models.rope_table(5, 8, 500_000.0)

    def tolerance(position, i):
        """The power is computed as exp(x log theta), so that the rounding of x log theta is its relative error."""
        exponent = 2 * i / 8 * np.log(500_000.0)
        turned = position * np.exp(-exponent)
        return rounding.of_chain(roundings=rounding.FUNCTION + turned * (exponent + rounding.FUNCTION + 1))

    for position in range(5):
        for i in range(4):
            angle = position * 500_000.0 ** (-2 * i / 8)
            for component, sign in ((i, -1), (i + 4, 1)):
                assert cos[position, component] == pytest.approx(np.cos(angle), abs=tolerance(position, i))
                assert sin[position, component] == pytest.approx(sign * np.sin(angle), abs=tolerance(position, i))
    x = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8).repeat(5, axis=1)
    turned = np.asarray(models.apply_rope(x, cos, sin))[0, :, 0]
    np.testing.assert_array_equal(turned[0], np.arange(1.0, 9.0))
    for i in range(4):  # the pair (i, i + K / 2) is rotated anticlockwise
        z = complex(i + 1, i + 5) * np.exp(1j * 3 * 500_000.0 ** (-2 * i / 8))
        off = abs(z) * (tolerance(3, i) + rounding.of_chain(2))  # a component is the sum of two products
        np.testing.assert_allclose([turned[3, i], turned[3, i + 4]], [z.real, z.imag], rtol=0, atol=off)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rotation_for_tpus_is_the_same(rng, dtype):
    """It computes the same products in fp32 and their sum, so that only a fused multiplication may round otherwise."""
    cos, sin = models.rope_table(6, 16, 500_000.0)
    x, gradient = (jnp.asarray(rng.normal(size=(2, 6, 3, 16)), dtype) for _ in range(2))
    # The sum of two products of numbers that are normal. It is rounded to bfloat16 in the end.
    eps = {"float32": {}, "bfloat16": {"eps": rounding.BF16_EPS}}[dtype]
    off = 8 * rounding.of_chain(2, **eps)

    def both(rotate):
        out, back = jax.vjp(lambda x: rotate(x, cos, sin), x)
        return [np.asarray(y, np.float32) for y in (out, *back(gradient))]

    for a, b in zip(both(models.apply_rope_on_tpu), both(models.apply_rope), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=off)


def test_rms_norm_casts_back_before_the_weight(rng):
    x, weight = rng.normal(size=(3, 16)).astype(np.float32) * 7, rng.normal(size=16).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
    # A mean over 16 squares, a root, and a few products.
    tolerance = rounding.of_chain(16, roundings=rounding.FUNCTION + 4)
    np.testing.assert_allclose(models.rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5), expected, rtol=tolerance)
    low = models.rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight), 1e-5)
    as_bf16 = np.asarray(x, jnp.bfloat16).astype(np.float32)
    inner = (as_bf16 / np.sqrt((as_bf16**2).mean(-1, keepdims=True) + 1e-5)).astype(jnp.bfloat16)
    # Equal to the bit on any machine: no number before the cast is closer than 1e-4 to where its rounding changes.
    np.testing.assert_array_equal(np.asarray(low), inner * weight.astype(jnp.bfloat16))
    assert not np.asarray(models.rms_norm(jnp.zeros((1, 4)), jnp.ones(4), 1e-5)).any()


def test_remat_and_unroll_change_no_gradient(built, tokens):
    """Recomputing within layers and unrolling layers change only speed and memory."""
    real = np.arange(T) < np.array([T, 2, 7, T])[:, None]
    params = split(built())[1]

    def gradients(compute):
        with jax.set_mesh(mesh.one_device_mesh()):
            graphdef = split(models.abstract_model(CONFIG, compute))[0]
            placed = mesh.place_rows(tokens, real)

            def loss(params):
                model = merge(graphdef, params)
                return (jax.nn.log_softmax(model.logits(model.trunk(*placed))) ** 2).mean()

            return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))

    reference = gradients(ComputeConfig(dtype="float32", remat="none", unroll=1, attention="reference"))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(reference))
    for remat, unroll, attention in (("full", 1, "xla"), ("dots", 2, "xla"), ("none", 0, "xla")):
        compute = ComputeConfig(dtype="float32", remat=remat, unroll=unroll, attention=attention, query_chunk=4)
        for a, b in zip(jax.tree.leaves(gradients(compute)), jax.tree.leaves(reference), strict=True):
            rounding.assert_close(a, b, rounding.of_gradient(CONFIG, T, B * T))


def test_a_width_that_is_no_multiple_of_8_is_used_as_one(make_mesh):
    """Products with rows of 5634 numbers took three times as long on a GPU as those with rows of 5696."""
    for sizes in (1, 1, 1), (1, 2, 2):
        with jax.set_mesh(make_mesh(*sizes)):
            graphdef, params = split(models.abstract_model(UNEVEN, COMPUTE))
            tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=jax.P(mesh.BATCH, None))
            run = jax.jit(jax.grad(lambda p, t: merge(graphdef, p).trunk(t).sum()))  # noqa: B023
            assert re.search(rf"f32\[{B}(@\(data,fsdp\))?,{T},48(@tensor)?\]", str(run.trace(params, tokens).jaxpr)), (
                sizes
            )
            # No columns move between the tensor shards.
            assert "collective-permute" not in run.lower(params, tokens).compile().as_text()


def test_added_columns():
    added = {5634: 62, 2817: 63, 12_288: 0, 84: 4, 44: 4, 22: 2, 2688: 0}
    assert {width: added_columns(width) for width in added} == added


def test_bfloat16_is_close_to_fp32(built, tokens):
    model = built()
    low = built(CONFIG, dataclasses.replace(COMPUTE, dtype="bfloat16"))
    exact, rough = np.asarray(model(tokens)), low(tokens)
    assert rough.dtype == jnp.float32  # logits are fp32 whatever the compute dtype is
    difference = np.abs(np.asarray(rough) - exact)
    # Sums are in fp32, but in each layer about 20 arrays are rounded to bfloat16: 7 matrices, 2 norms with their
    # weights, and what is computed from them. Each rounding is off by half an eps at most, on average they cancel.
    roundings = 20 * CONFIG.layers + 4
    assert 0 < difference.mean() < roundings**0.5 * rounding.BF16_EPS / 2 * exact.std()
    assert difference.max() < roundings * rounding.BF16_EPS / 2 * exact.std()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(split(low)[1]))
    with jax.set_mesh(mesh.one_device_mesh()):
        assert jax.eval_shape(low.trunk, *mesh.place_rows(tokens)).dtype == jnp.bfloat16


def test_compute_dtype():
    assert compute_dtype(ComputeConfig(), "cpu") == jnp.float32
    assert compute_dtype(ComputeConfig(dtype="bfloat16")) == jnp.bfloat16
    with pytest.raises(UserError, match=r"config\.compute\.dtype='float16'"):
        compute_dtype(ComputeConfig(dtype="float16"))


def test_tied_head_is_the_embedding(built):
    model = built(TIED)
    assert "head" not in split(model)[1]
    np.testing.assert_array_equal(np.asarray(model.head_weight()), np.asarray(model.embedding[...]).T)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_embedding_lookup_and_its_gradient(make_mesh, rng, sizes):
    table, ids = rng.normal(size=(16, 8)).astype(np.float32), rng.integers(0, 16, (4, 5)).astype(np.int32)
    ids[:, :3] = 15  # like MASK: many positions have the same row of the table
    cotangent = rng.normal(size=(4, 5, 8)).astype(np.float32)
    with jax.set_mesh(make_mesh(*sizes)):
        put, weight = jax.device_put(table, mesh.PARAMETERS["embedding"]), jax.device_put(cotangent, mesh.HIDDEN_BTD)
        place = jax.device_put(ids, mesh.TOKENS_BT)
        run = jax.jit(lambda table: jax.vjp(lambda t: models.embed(t, place, jnp.float32), table))
        out, backward = run(put)
        gradient = backward(weight)[0]
    np.testing.assert_array_equal(np.asarray(out), table[ids])
    expected = np.zeros_like(table)
    np.add.at(expected, ids, cotangent)
    # An element of a row is a sum over the positions of its id, at most all of them, in numpy as well as here.
    np.testing.assert_allclose(np.asarray(gradient), expected, rtol=0, atol=rounding.of_sum(ids.size))


def test_gradients_of_a_frequent_token_are_summed_in_fp32(make_mesh):
    """A sum of ones in bfloat16 would stop at 256."""
    with jax.set_mesh(make_mesh()):
        table = jnp.zeros((16, 8), out_sharding=mesh.PARAMETERS["embedding"])
        ids = jnp.full((4, 300), 15, out_sharding=mesh.TOKENS_BT)
        ones = jnp.ones((4, 300, 8), jnp.bfloat16, out_sharding=mesh.HIDDEN_BTD)
        _, backward = jax.vjp(lambda table: models.embed(table, ids, jnp.bfloat16), table)
        gradient = np.asarray(jax.jit(backward)(ones)[0])
    assert gradient.dtype == np.float32
    assert (gradient[15] == 1200).all() and not gradient[:15].any()


def test_split_and_merge_are_inverse(built):
    graphdef, params = split(built())
    again = split(merge(graphdef, params))
    assert again[0] == graphdef and jax.tree.structure(again[1]) == jax.tree.structure(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))


def test_config_of_a_model_is_its_own(make_mesh):
    config = ModelConfig(layers=1, width=8, heads=2, kv_heads=2, feed_forward=8, vocab_size=8)
    with jax.set_mesh(make_mesh()):
        model = models.abstract_model(config, COMPUTE)
    config.layers = 99
    assert model.config.layers == 1
