import jax
import jax.numpy as jnp
import numpy as np
import plain_sampler
import pytest
import rounding

from llada_jax.sampling.remasking import choose, gumbel, schedule

# Two exponentials of differences that fp32 holds exactly, the sum over four of them, and a quotient.
SOFTMAX = rounding.of_chain(4, roundings=2 * rounding.FUNCTION + 1)


@pytest.mark.parametrize("block_length", [1, 3, 6, 64])
def test_schedule_is_the_plain_one(block_length):
    """The schedule agrees with the plain one for many numbers of masks and steps.

    The cases include uneven shares, a short last block, fewer steps than blocks, and more steps than tokens.
    """
    masks_B = jnp.arange(40)
    compiled = jax.jit(lambda steps, step: schedule(masks_B, steps, block_length, step))
    for steps in (1, 2, 3, 5, 7, 11, 16, 39, 64, 200):
        expected = [plain_sampler.schedule(int(masks), steps, block_length) for masks in masks_B]
        for step in range(max(map(len, expected)) + 2):
            block_B, inner_B, count_B, total_B = map(np.asarray, compiled(steps, step))
            assert total_B.tolist() == [len(row) for row in expected]
            for i, row in enumerate(expected):
                if step < len(row):
                    assert (block_B[i], inner_B[i], count_B[i]) == row[step], (i, steps, step)
                else:
                    assert count_B[i] == 0


def test_choose_leaves_out_what_is_not_allowed_but_not_from_the_softmax():
    logits = jnp.array([[[5.0, 1.0, 2.0, 9.0]]])
    allowed = jnp.array([False, True, True, False])
    token, probability = choose(logits, None, allowed)
    assert token.tolist() == [[2]]
    np.testing.assert_allclose(probability, jax.nn.softmax(logits)[:, :, 2], rtol=SOFTMAX)
    noise = jnp.array([[[0.0, 3.0, 0.0, 0.0]]])
    token, probability = choose(logits, noise, allowed)
    assert token.tolist() == [[1]]
    np.testing.assert_allclose(probability, jax.nn.softmax(logits)[:, :, 1], rtol=SOFTMAX)
    near_one = jnp.zeros((1, 2, 300)).at[0, :, 7].set(jnp.array([30.0, 31.0]))
    scores = choose(near_one, None, jnp.ones(300, bool))[1][0]
    # exp(0) / sum has a single rounding; exp(logit - logsumexp) has the error of a logit of 30, 16 times as much.
    np.testing.assert_allclose(scores, 1 / (1 + 299 * np.exp([-30.0, -31.0])), rtol=rounding.EPS)


@pytest.fixture(scope="module")
def on_one_device(make_mesh):
    with jax.set_mesh(make_mesh()):
        yield


def test_unsure_tokens_may_be_chosen_but_have_no_part_in_the_softmax():
    logits, unsure = jnp.array([[[5.0, 1.0, 2.0, 9.0]]]), jnp.array([True, False, False, False])
    token, probability = choose(logits, None, jnp.array([True, True, True, False]), unsure)
    assert token.tolist() == [[0]] and probability.tolist() == [[0.0]]
    token, probability = choose(logits, None, jnp.array([False, True, True, False]), unsure)
    assert token.tolist() == [[2]]
    np.testing.assert_allclose(probability, jax.nn.softmax(logits[:, :, 1:])[:, :, 1], rtol=SOFTMAX)


def test_draws_have_the_frequencies_of_the_softmax(on_one_device):
    """The temperature is 0.8, and 10 tokens have probabilities from 0.53 down to 1e-4."""
    draws, temperature = 200_000, 0.8
    logits = jnp.array([0.0, -0.5, -1, -2, -3, -4, -5, -6, -6.5, -7])
    keys = jax.random.split(jax.random.key(0), (1, draws))
    noise = temperature * jax.jit(gumbel, static_argnums=1)(keys, 10)
    tokens, _ = choose(jnp.broadcast_to(logits, noise.shape), noise, jnp.ones(10, bool))
    counts = np.bincount(np.asarray(tokens[0]), minlength=10)
    expected = draws * np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi square, 9 degrees of freedom, 0.1 %


def test_rare_noise_is_there(on_one_device):
    """Noise above 16 occurs as often as the Gumbel distribution says.

    A share of 1.1e-7 of the distribution lies above 16, which 23-bit uniform numbers cannot reach. With a vocabulary of
    10^5 tokens such noise decides one draw in a hundred.
    """
    bounds = (10.0, 16.0, 18.0)
    # These 10^8 draws take longer than compiling them well (see conftest.py).
    optimized = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    optimized["xla_backend_extra_options"] = ""
    draw = jax.jit(
        lambda key: jnp.stack([jnp.sum(gumbel(key, 2**20) > x, dtype=jnp.int32) for x in bounds]),
        compiler_options=optimized,
    )
    many, few, very_few = np.sum([draw(jax.random.split(jax.random.key(i), (1, 8))) for i in range(16)], axis=0)
    drawn = 2**27
    assert abs(many / (drawn * -np.expm1(-np.exp(-10.0))) - 1) < 0.05  # 6,093 expected, 4 sigma
    assert 5 <= few <= 29 and very_few <= 9  # 15.1 and 2.0 expected
