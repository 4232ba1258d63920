"""Tests the loss weights, the range of t and complementary masks against an enumeration of all maskings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.config import DiffusionConfig
from llada_jax.diffusion import forward

EPS = 0.02
PAIRS = {"complementary": True}


def maskings(count: int) -> np.ndarray:
    """Returns every masking of `count` tokens as bool (2**count, count)."""
    return ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(bool)


def exact_loss(nll: np.ndarray, config: DiffusionConfig) -> float:
    """Returns the mean of a row's loss: over t by quadrature (exact for these polynomials), over maskings by sums."""
    masked = maskings(nll.shape[1])
    size, length, total = masked.sum(axis=1), nll.shape[1], (masked * nll).sum(axis=1)
    most = 1 - config.eps if config.complementary else 1.0
    low, high = (config.eps + (most - config.eps) * t for t in config.t_range)
    node, weight = np.polynomial.legendre.leggauss(20)
    mean = 0.0
    for x, w in zip(node, weight, strict=True):
        p = low + (high - low) * (x + 1) / 2
        per_token = {
            "elbo": 1 / (p * length),
            "count": (length + 1) / (length * np.maximum(size, 1)),
            "plain": 1 / length,
        }[config.loss_weight]
        mean += w / 2 * (p**size * (1 - p) ** (length - size) * per_token * total).sum()
    return mean


def eq_6(nll: np.ndarray) -> float:
    """Returns Eq. 6 per token: the mean over l in 1..L of the mean of sum nll / l over all maskings of l tokens."""
    masked = maskings(nll.shape[1])
    size, total = masked.sum(axis=1), (masked * nll).sum(axis=1)
    return float(np.mean([total[size == n].mean() / n for n in range(1, nll.shape[1] + 1)]))


@pytest.mark.parametrize("settings", [{"loss_weight": "count"}, PAIRS, {"loss_weight": "count", **PAIRS}])
def test_expectation_is_eq_6(toy, settings):
    """Count weights and complementary masks estimate Eq. 6: exactly for eps -> 0, and closely for the default eps."""
    for nll in toy.nll.values():
        assert exact_loss(nll, DiffusionConfig(eps=1e-12, **settings)) == pytest.approx(eq_6(nll), rel=1e-9)
        assert exact_loss(nll, DiffusionConfig(**settings)) == pytest.approx(eq_6(nll), rel=2e-3)


def test_other_expectations_are_not_eq_6(toy):
    """Without this, the tests below could not tell the settings apart."""
    for settings in ({"loss_weight": "plain"}, {"t_range": (0.5, 1.0)}):
        for nll in toy.nll.values():
            assert abs(exact_loss(nll, DiffusionConfig(eps=1e-12, **settings)) / eq_6(nll) - 1) > 0.002


def draw(config: DiffusionConfig, objective, tokens, length, prompt, steps: int) -> forward.Corrupted:
    """Returns the batches of many steps, each with the rows 0, 1, ..., as arrays (steps, B, ...)."""
    batch = {"tokens": np.tile(tokens, (len(length), 1)), "length": np.array(length, np.int32), "prompt": prompt}
    rows = jnp.arange(len(length), dtype=jnp.int32)

    @jax.jit
    def run(step):
        return objective(forward.step_key(5, step), batch, rows, config, 15)

    return forward.Corrupted(*map(np.asarray, jax.vmap(run)(np.arange(steps))))


def losses(noisy, nll, rows, first, last) -> np.ndarray:
    """Returns the mean loss of some rows in each step; each nll is looked up for the masking of its row."""
    mask, weight = (x[:, rows, first:last] for x in (noisy.mask_BT, noisy.weight_BT.astype(np.float64)))
    number = (mask << np.arange(last - first)).sum(axis=-1)
    return (weight * nll[number]).sum(axis=-1).mean(axis=1)


def check_mean(loss: np.ndarray, exact: float) -> None:
    error = loss.std() / np.sqrt(len(loss))
    assert error < 0.006 * exact
    assert abs(loss.mean() - exact) < 3.5 * error


SETTINGS = [
    {"loss_weight": "count"},
    {"loss_weight": "plain"},
    {"t_range": (0.3, 0.9)},
    {"loss_weight": "count", "t_range": (0.3, 0.9), "t_sampling": "independent"},
    PAIRS,
    {"loss_weight": "count", **PAIRS},
    {"t_range": (0.2, 0.8), "t_sampling": "independent", **PAIRS},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pretraining_with_rows_of_all_lengths(toy, settings):
    """The mean loss equals the enumeration, for whole rows and for rows that were cut to a random length."""
    config = DiffusionConfig(eps=EPS, **settings)
    length = [6, 6, 3, 3] * 6
    noisy = draw(config, forward.pretrain, toy.x_0, length, None, 5000)
    for n, nll in toy.nll.items():
        check_mean(losses(noisy, nll, np.array(length) == n, 0, n), exact_loss(nll, config))
    share = noisy.mask_BT.sum() / noisy.mask_BT.shape[0] / sum(length)
    assert -0.004 < share - forward.masked_share(config) < EPS + 0.004


@pytest.mark.parametrize("settings", SETTINGS)
def test_sft(toy, settings):
    """The mean loss equals the enumeration of all maskings of the answer; prompt and padding stay as they are."""
    config = DiffusionConfig(eps=EPS, objective="sft", **settings)
    full = len(toy.x_0)
    prompts = np.tile(np.array([0, 0, 2, 2, 3, 3], np.int32), 4)
    noisy = draw(config, forward.sft, np.r_[toy.x_0, 7, 7].astype(np.int32), [full] * 24, prompts, 5000)
    given = (np.arange(full + 2) < prompts[:, None]) | (np.arange(full + 2) >= full)
    assert not noisy.mask_BT[:, given].any() and not noisy.weight_BT[:, given].any()
    for prompt in (0, 2, 3):
        nll = toy.nll[full][np.arange(2 ** (full - prompt)) << prompt][:, prompt:]
        check_mean(losses(noisy, nll, prompts == prompt, prompt, full), exact_loss(nll, config))


@pytest.mark.parametrize("weight", sorted(forward.LOSS_WEIGHTS))
def test_complementary_rows(toy, weight):
    """Each token that can be masked is masked in exactly one row of a pair; the pairs differ; t stays in its range."""
    config = DiffusionConfig(eps=EPS, loss_weight=weight, t_range=(0.25, 0.75), complementary=True)
    length, prompt = np.array([6, 6, 3, 3] * 4), np.array([1, 1, 0, 0] * 4, np.int32)
    noisy = draw(config, forward.sft, toy.x_0, length, prompt, 200)
    free = (np.arange(6) >= prompt[:, None]) & (np.arange(6) < length[:, None])
    first, second = noisy.mask_BT[:, ::2], noisy.mask_BT[:, 1::2]
    np.testing.assert_array_equal(first ^ second, np.broadcast_to(free[::2], first.shape))
    np.testing.assert_array_equal(noisy.tokens_BT == 15, noisy.mask_BT)
    np.testing.assert_allclose(noisy.p_mask_B[:, ::2] + noisy.p_mask_B[:, 1::2], 1, rtol=3e-7)
    t = np.asarray(forward.t_of(noisy.p_mask_B, config))
    assert 0.25 - 1e-6 < t.min() < 0.26 and 0.74 < t.max() < 0.75 + 1e-6
    assert (first[:, 0] != first[:, 2]).any() and (noisy.p_mask_B[:, 0] != noisy.p_mask_B[:, 2]).all()


def test_counted_weights_have_less_variance(toy):
    """At a given t, the number of masked tokens is random. It changes the weights 1 / p_mask, not those by count."""
    spread = {}
    for weight in ("elbo", "count"):
        noisy = draw(DiffusionConfig(loss_weight=weight), forward.pretrain, toy.x_0, [6] * 16, None, 2000)
        spread[weight] = losses(noisy, np.ones((64, 6)), slice(None), 0, 6).std()
    assert spread["count"] < 0.5 * spread["elbo"]


def test_the_defaults_are_the_papers(toy):
    """Both ends of the default range, and weights 1 / (p_mask L), bit for bit."""
    config = DiffusionConfig()
    assert (config.t_range, config.loss_weight, config.complementary) == ((0.0, 1.0), "elbo", False)
    noisy = draw(config, forward.pretrain, toy.x_0, [6] * 8, None, 50)
    key = jax.vmap(lambda step: forward.step_key(5, step))(np.arange(50))
    t = jax.vmap(lambda k: forward.sample_t(k, jnp.arange(8, dtype=jnp.int32), config.t_sampling))(key)
    np.testing.assert_allclose(forward.t_of(noisy.p_mask_B, config), t, atol=1e-6)
    expected = np.where(noisy.mask_BT, 1 / (noisy.p_mask_B * 6)[..., None], 0)
    np.testing.assert_allclose(noisy.weight_BT, expected, rtol=3e-7)
