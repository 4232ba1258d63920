"""Tests that the objectives are unbiased, compared with an enumeration, and that every row has noise of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from jax.sharding import PartitionSpec as P

from llada_jax.config import DiffusionConfig
from llada_jax.devices import mesh
from llada_jax.diffusion import forward
from llada_jax.model.transformer import merge, split
from llada_jax.training.step import masked_loss

KINDS = ["independent", "low_discrepancy"]


def integral(function, eps):
    """Returns the mean of function(p) over t ~ U(0, 1), where p = (1 - eps) t + eps.

    The mean is exact for polynomials in p of degree up to 39.
    """
    node, weight = np.polynomial.legendre.leggauss(20)
    return sum(w / 2 * function(eps + (1 - eps) * (x + 1) / 2) for x, w in zip(node, weight, strict=True))


def exact_loss(nll, eps):
    """Computes Eq. 3 per token by enumerating every masking S.

    This is the mean over t of sum_S p^|S| (1 - p)^(L - |S|) / p sum_{i in S} nll, divided by L.
    """
    count, length = nll.shape
    masked = (np.arange(count)[:, None] >> np.arange(length)) & 1
    size, total = masked.sum(axis=1), (masked * nll).sum(axis=1)
    some = size > 0
    return integral(lambda p: (p ** (size - 1.0) * (1 - p) ** (length - size) * total)[some].sum(), eps) / length


@pytest.fixture(scope="module")
def many_steps():
    """Returns many_steps(config, x_0, lengths, steps), which returns the Corrupted batches of `steps` steps.

    Each batch has the rows 0, 1, ..., one per element of `lengths`.
    """

    @functools.partial(jax.jit, static_argnames=("config", "mask_id"))
    def run(tokens_BT, length_B, step_S, config, mask_id):
        rows = jnp.arange(len(length_B), dtype=jnp.int32)
        one = lambda step: forward.pretrain(  # noqa: E731
            forward.step_key(5, step),
            {"tokens": tokens_BT, "length": length_B},
            rows,
            DiffusionConfig(**dict(config)),
            mask_id,
        )
        return jax.vmap(one)(step_S)

    def call(config, x_0, lengths, steps, mask_id=15):
        tokens = np.tile(x_0, (len(lengths), 1))
        # Static arguments of jit must be hashable.
        settings = tuple({"eps": config.eps, "t_sampling": config.t_sampling}.items())
        noisy = run(tokens, np.array(lengths, np.int32), np.arange(steps), settings, mask_id)
        return forward.Corrupted(*map(np.asarray, noisy))

    return call


def test_enumeration_agrees_with_eq_6(toy):
    """For eps -> 0 the integral is Eq. 6: the mean over l of the mean of sum nll / l over all subsets of size l."""
    for length, nll in toy.nll.items():
        masked = ((np.arange(2**length)[:, None] >> np.arange(length)) & 1).astype(bool)
        sizes = masked.sum(axis=1)
        eq_6 = np.mean([(nll * masked).sum(axis=1)[sizes == n].mean() / n for n in range(1, length + 1)])
        # Both are in float64. The integral begins at 1e-12, and sums over 20 nodes and 64 maskings.
        assert exact_loss(nll, 1e-12) == pytest.approx(eq_6, rel=1e-9)


@pytest.mark.parametrize("eps", [1e-3, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_unbiased(toy, many_steps, kind, eps):
    """The mean of sum(weight * nll) equals the enumeration; each nll is looked up for the masking of its row."""
    lengths = [6, 3] * 16
    noisy = many_steps(DiffusionConfig(eps=eps, t_sampling=kind), toy.x_0, lengths, 8000)
    for length, nll in toy.nll.items():
        rows = slice(0, None, 2) if length == 6 else slice(1, None, 2)
        mask, weight = noisy.mask_BT[:, rows, :length], noisy.weight_BT[:, rows, :length].astype(np.float64)
        number = (mask << np.arange(length)).sum(axis=-1)
        # One mean per step, because the rows of the same step need not be independent.
        loss = (weight * nll[number]).sum(axis=-1).mean(axis=1)
        error = loss.std() / np.sqrt(len(loss))
        exact = exact_loss(nll, eps)
        assert error < 0.006 * exact
        assert abs(loss.mean() - exact) < 3.5 * error


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_the_whole_road_is_unbiased(toy, make_mesh, kind):
    """The loss is also unbiased if noise, model and masked cross-entropy run as in the train step, on 8 devices."""
    config, rows, steps = DiffusionConfig(t_sampling=kind), 1024, 24
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.typeof(x).sharding.spec), split(toy.model)[1])
        graphdef = split(toy.model)[0]

        @jax.jit
        def loss(params, step, tokens_BT, length_B):
            row_B = jnp.arange(rows, dtype=jnp.int32, out_sharding=mesh.ROWS_B)
            noisy = forward.pretrain(
                forward.step_key(1, step),
                {"tokens": tokens_BT, "length": length_B},
                row_B,
                config,
                toy.config.mask_id,
            )
            return masked_loss(merge(graphdef, params), noisy, tokens_BT, length_B, 64)[0] / rows

        length = np.where(np.arange(rows) % 4 == 3, 3, 6).astype(np.int32)
        tokens = np.where(np.arange(6) < length[:, None], toy.x_0, 7).astype(np.int32)  # 7: must be ignored
        tokens, length = mesh.place_rows(tokens, length)
        losses = np.array([float(loss(params, step, tokens, length)) for step in range(steps)])
    exact = 0.75 * exact_loss(toy.nll[6], config.eps) + 0.25 * exact_loss(toy.nll[3], config.eps)
    error = losses.std(ddof=1) / np.sqrt(steps)
    assert error < 0.01 * exact
    assert abs(losses.mean() - exact) < 3.5 * error


def test_low_discrepancy_lowers_the_variance(many_steps):
    """With low discrepancy, the choice of t adds almost no variance to the mean loss, even if nll depends on t."""
    spread = {}
    for kind in KINDS:
        noisy = many_steps(DiffusionConfig(t_sampling=kind), np.zeros(128, np.int32), [128] * 32, 500)
        losses = noisy.weight_BT.sum(axis=-1, dtype=np.float64) * (1 + 2 * noisy.p_mask_B)
        spread[kind] = losses.mean(axis=1).var()
        spread[kind, "t"] = noisy.p_mask_B.mean(axis=1).var()
    assert spread["low_discrepancy"] < 0.5 * spread["independent"]
    assert spread["low_discrepancy", "t"] < 0.15 * spread["independent", "t"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_masking_has_its_probability(many_steps, kind):
    """Each of the 2**4 maskings of a row has as its probability the integral of p^n (1 - p)^(L - n).

    This is a chi-squared test with 15 degrees of freedom.
    """
    eps, length, steps = 0.05, 4, 12000
    noisy = many_steps(DiffusionConfig(eps=eps, t_sampling=kind), np.arange(4), [4, 4, 4, 4], steps)
    sizes = np.array([bin(s).count("1") for s in range(16)])
    expected = np.array([integral(lambda p, n=n: p**n * (1 - p) ** (length - n), eps) for n in sizes])
    assert expected.sum() == pytest.approx(1)
    for row in range(4):  # one row at a time, because low-discrepancy rows of the same step are not independent
        number = (noisy.mask_BT[:, row] << np.arange(length)).sum(axis=-1)
        counts = np.bincount(number, minlength=16)
        assert ((counts - steps * expected) ** 2 / (steps * expected)).sum() < 37.7  # significance level 0.1 %


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [0, 1, 1279, 1_000_003])
def test_t_is_uniform_for_every_row(kind, row):
    """A Kolmogorov-Smirnov test over the steps, at a significance level of 0.1 %."""
    rows = jnp.array([row], jnp.int32)
    draw = jax.jit(jax.vmap(lambda step: forward.sample_t(forward.step_key(2, step), rows, kind)[0]))
    t = np.sort(np.asarray(draw(jnp.arange(4096)), np.float64))
    assert 0 < t[0] and t[-1] < 1
    distance = np.abs(t - (np.arange(4096) + 0.5) / 4096).max() + 0.5 / 4096
    assert distance < 1.95 / np.sqrt(4096)


def star_discrepancy(t):
    t, n = np.sort(np.asarray(t, np.float64)), len(t)
    return (np.abs(t - (np.arange(n) + 0.5) / n) + 0.5 / n).max()


@pytest.mark.parametrize("step", [0, 1, 2])
def test_any_run_of_rows_is_nearly_stratified(step):
    """Any n consecutive rows have a discrepancy of O(log n / n), while independent draws have O(1 / sqrt(n))."""
    key = forward.step_key(0, step)
    t = {k: np.asarray(forward.sample_t(key, jnp.arange(6000, dtype=jnp.int32), k)) for k in KINDS}
    for start in (0, 1, 5, 64, 1279, 3000):
        for n in (1, 2, 3, 5, 8, 20, 64, 100, 256, 1000, 2560):
            limit = (1 + 0.6 * np.log(n)) / n
            assert star_discrepancy(t["low_discrepancy"][start : start + n]) < limit
    assert star_discrepancy(t["independent"][:2560]) > (1 + 0.6 * np.log(2560)) / 2560


def test_independent_rows_are_independent():
    rows = jnp.arange(4096, dtype=jnp.int32)
    t = np.asarray(forward.sample_t(forward.step_key(0, 1), rows, "independent"), np.float64)
    assert star_discrepancy(t) < 1.95 / 64
    for lag in (1, 2, 3):
        assert abs(np.corrcoef(t[lag:], t[:-lag])[0, 1]) < 4 / 64


def test_unit_interval_is_open():
    bits = jnp.array([0, 1, 2**31, 2**32 - 512, 2**32 - 1], jnp.uint32)
    unit = np.asarray(forward.unit_interval(bits))
    assert unit.dtype == np.float32 and (unit > 0).all() and (unit < 1).all()
    # Half of all bits below: the mid-point of a bin is half a bin of 2**-23 above 0.5, which is exact in fp32.
    assert unit[2] == np.float32(0.5 + 2.0**-24) and unit[-1] + unit[0] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_mask_rate_and_weight_of_each_row(rng, kind):
    """In long rows the share of masked tokens is p_mask; they alone become MASK, with weight 1 / (p_mask * length)."""
    eps, width = 1e-3, 4096
    config = DiffusionConfig(eps=eps, t_sampling=kind)
    tokens = rng.integers(0, 50, (24, width)).astype(np.int32)
    length = np.where(np.arange(24) % 3 == 2, rng.integers(1, width, 24), width).astype(np.int32)
    key, rows = forward.step_key(0, 9), jnp.arange(24, dtype=jnp.int32)
    noisy = forward.Corrupted(
        *map(np.asarray, forward.pretrain(key, {"tokens": tokens, "length": length}, rows, config, 50))
    )
    real = np.arange(width) < length[:, None]
    t = np.asarray(forward.sample_t(key, rows, kind))
    p = noisy.p_mask_B.astype(np.float64)
    # 1 - eps, eps, a product and a sum are rounded, and for the weights two products.
    np.testing.assert_allclose(p, (1 - eps) * t + eps, rtol=rounding.of_chain(roundings=4))
    assert not noisy.mask_BT[~real].any()
    np.testing.assert_array_equal(noisy.tokens_BT, np.where(noisy.mask_BT, 50, tokens))
    expected = np.where(noisy.mask_BT, 1 / (p * length)[:, None], 0)
    np.testing.assert_allclose(noisy.weight_BT, expected, rtol=rounding.of_chain(roundings=2))
    deviation = (noisy.mask_BT.sum(axis=1) / length - p) / np.sqrt(p * (1 - p) / length)
    assert np.abs(deviation).max() < 4
    assert 0.5 < (deviation**2).mean() < 2  # the masked tokens of a row are neither clustered nor stratified
    assert noisy.tokens_BT.dtype == np.int32 and noisy.weight_BT.dtype == noisy.p_mask_B.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_sft_is_unbiased_and_leaves_the_prompt(toy, kind):
    """Eq. 5 equals the enumeration of every masking of the response, per token of the response with its EOS padding."""
    config, steps, full = DiffusionConfig(eps=0.02, t_sampling=kind), 8000, len(toy.x_0)
    prompts = np.tile(np.array([0, 2, 4], np.int32), 8)
    batch = {
        "tokens": np.tile(np.r_[toy.x_0, 7, 7].astype(np.int32), (24, 1)),  # two tokens of padding beyond the length
        "length": np.full(24, full, np.int32),
        "prompt": prompts,
    }

    @jax.jit
    def run(step):
        return forward.sft(forward.step_key(5, step), batch, jnp.arange(24, dtype=jnp.int32), config, 15)

    noisy = forward.Corrupted(*map(np.asarray, jax.vmap(run)(np.arange(steps))))
    place = np.arange(full + 2)
    given = (place < prompts[:, None]) | (place >= full)
    assert not noisy.mask_BT[:, given].any() and not noisy.weight_BT[:, given].any()
    assert (noisy.tokens_BT[:, given] == batch["tokens"][given]).all()
    assert (noisy.tokens_BT[noisy.mask_BT] == 15).all()
    for prompt in (0, 2, 4):
        rows = prompts == prompt
        mask, weight = noisy.mask_BT[:, rows, :full], noisy.weight_BT[:, rows, :full].astype(np.float64)
        number = (mask << np.arange(full)).sum(axis=-1)
        loss = (weight * toy.nll[full][number]).sum(axis=-1).mean(axis=1)
        error = loss.std() / np.sqrt(len(loss))
        exact = exact_loss(toy.nll[full][np.arange(2 ** (full - prompt)) << prompt][:, prompt:], config.eps)
        assert error < 0.01 * exact
        assert abs(loss.mean() - exact) < 3.5 * error


def test_objectives_beside_the_prompt(rng):
    """SFT without a prompt and iLLaDA's objective equal pre-training bitwise; with a prompt, SFT never masks it."""
    tokens = rng.integers(0, 50, (8, 40)).astype(np.int32)
    batch = {"tokens": tokens, "length": np.full(8, 33, np.int32), "prompt": np.zeros(8, np.int32)}
    arguments = jnp.arange(8, dtype=jnp.int32), DiffusionConfig(), 50
    key = forward.step_key(1, 2)
    plain = forward.pretrain(key, {"tokens": tokens, "length": batch["length"]}, *arguments)
    for other in (
        forward.sft(key, batch, *arguments),
        forward.sft_whole(key, {**batch, "prompt": None}, *arguments),
    ):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_array_equal(a, b)
    prompted = forward.sft(key, {**batch, "prompt": np.full(8, 20, np.int32)}, *arguments)
    np.testing.assert_array_equal(prompted.mask_BT, plain.mask_BT & (np.arange(40) >= 20))
    np.testing.assert_allclose(
        prompted.weight_BT,
        np.where(prompted.mask_BT, plain.weight_BT * (33 / 13), 0),
        rtol=rounding.of_chain(roundings=4),  # each of the weights is a product and a quotient
    )


def test_smallest_mask_ratio_is_eps():
    """In Eq. 3, p_mask >= eps, so that weights are at most 1 / (eps * length)."""
    config = DiffusionConfig(eps=0.25)
    rows = jnp.arange(2000, dtype=jnp.int32)
    batch = {"tokens": np.zeros((2000, 2), np.int32), "length": np.full(2000, 2, np.int32)}
    p = np.asarray(forward.pretrain(forward.step_key(0, 0), batch, rows, config, 1).p_mask_B)
    assert 0.25 <= p.min() < 0.251 and 0.999 < p.max() <= 1


def test_noise_of_places_rows_and_steps_is_independent():
    """Masking noise without the effect of t is uncorrelated between tokens, rows, steps and seeds, and with t."""
    width, rows = 2048, jnp.arange(16, dtype=jnp.int32)
    batch = {"tokens": np.zeros((16, width), np.int32), "length": np.full(16, width)}
    config = DiffusionConfig()

    def centred(seed, step):
        noisy = forward.pretrain(forward.step_key(seed, step), batch, rows, config, 1)
        p = np.asarray(noisy.p_mask_B, np.float64)[:, None]
        return (np.asarray(noisy.mask_BT) - p) / np.sqrt(p * (1 - p)), p[:, 0]

    (a, p), (b, _), (c, _) = centred(0, 0), centred(0, 1), centred(1, 0)
    limit = 4.5 / np.sqrt(16 * width)
    for other in (b, c, np.roll(a, 1, axis=1), np.roll(a, 1, axis=0), np.roll(b, 1, axis=0), a[:, ::-1]):
        assert abs((a * other).mean()) < limit
    assert abs((a * ((p - p.mean()) / p.std())[:, None]).mean()) < limit


def fields(noisy):
    return [np.asarray(x) for x in noisy if x is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_does_not_depend_on_the_mesh_nor_the_batch(rng, make_mesh, kind):
    """A row of a step has bitwise the same noise on any mesh, in any micro-batch and in any order of the rows."""
    config = DiffusionConfig(t_sampling=kind)
    tokens = rng.integers(0, 50, (16, 32)).astype(np.int32)
    length = np.full(16, 32, np.int32)
    length[3] = 5
    rows = np.arange(16, dtype=np.int32)

    @jax.jit
    def run(step, tokens_BT, length_B, row_B):
        batch = {"tokens": tokens_BT, "length": length_B}
        return forward.pretrain(forward.step_key(0, step), batch, row_B, config, 50)

    with jax.set_mesh(make_mesh()):
        whole = fields(run(4, tokens, length, rows))
    for sizes in ((2, 2, 2), (1, 8, 1)):
        with jax.set_mesh(make_mesh(*sizes)):
            noisy = run(4, *mesh.place_rows(tokens, length, rows))
            assert jax.typeof(noisy.tokens_BT).sharding.spec == P(mesh.BATCH, None)
            for a, b in zip(fields(noisy), whole, strict=True):
                np.testing.assert_array_equal(a, b)
    some = np.array([9, 3, 14, 0])
    for a, b in zip(fields(run(4, tokens[some], length[some], rows[some])), whole, strict=True):
        np.testing.assert_array_equal(a, b[some])
    other = fields(run(5, tokens, length, rows))
    assert (other[1] != whole[1]).any(axis=1)[length > 5].all() and (other[3] != whole[3]).all()


def test_steps_and_seeds_have_keys_of_their_own():
    keys = {tuple(jax.random.key_data(forward.step_key(s, k)).tolist()) for s in range(20) for k in range(20)}
    assert len(keys) == 400
    rows = forward.row_keys(forward.step_key(0, 0), jnp.arange(100))
    assert len(set(map(tuple, jax.random.key_data(rows).tolist()))) == 100
