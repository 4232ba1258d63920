"""Compares greedy matches with `generate`, and with a plain re-implementation that applies guidance to the logits."""

import jax
import numpy as np
import pytest
import rounding

from llada_jax.config import ComputeConfig, ModelConfig, SamplerConfig, UserError
from llada_jax.model.transformer import initialise
from llada_jax.sampling.sampler import generate
from llada_jax.scoring import greedy
from llada_jax.scoring.likelihood import greedy_matches

MASK = 60
# Half of the vocabulary must never be chosen. loss_chunk is small, so that few positions go through the head at once.
SIZES = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, feed_forward=96, vocab_size=64, mask_id=MASK, token_count=32
)
COMPUTE = ComputeConfig(dtype="float32", loss_chunk=32)
LENGTHS = (5, 12)


def make_model(mesh):
    with jax.set_mesh(mesh):
        return initialise(SIZES, COMPUTE, jax.random.key(1))


@pytest.fixture(scope="module")
def model(make_mesh):
    return make_model(make_mesh())


def some_prompts(count=4):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60, n).astype(np.int32) for n in rng.integers(1, 12, count)]


@pytest.fixture(scope="module")
def generated(model):
    """Returns pairs (prompt, its continuation by `generate`) for all prompts and both answer lengths."""
    prompts = some_prompts()
    real = np.arange(12) >= np.array([12 - len(prompt) for prompt in prompts])[:, None]
    padded = np.zeros(real.shape, np.int32)
    padded[real] = np.concatenate(prompts)
    requests = []
    for length in LENGTHS:
        config = SamplerConfig(steps=length, gen_length=length, block_length=length)
        canvas = np.asarray(generate(model, padded, config, jax.random.key(0), real))
        requests += zip(prompts, canvas[:, 12:], strict=True)
    return requests


def changed(requests):
    """Yields copies of each request with one token of the answer changed, for several positions of this token."""
    for prompt, answer in requests:
        for place in range(0, len(answer), 3):
            other = answer.copy()
            other[place] = (other[place] + 1) % 32
            yield prompt, other


def plain_greedy(model, prompt, length, scale):
    """Generates in numpy, one token per step, the most confident one first, on a canvas padded to 32 tokens.

    No choice may be closer than the rounding of logits, because it could go the other way on another machine.
    """
    n = len(prompt)
    canvas = np.zeros(32, np.int32)
    canvas[: n + length] = [*prompt, *[MASK] * length]
    real = np.arange(32) < n + length
    for _ in range(length):
        both = np.stack([canvas, np.where(np.arange(32) < n, MASK, canvas)])
        logits, without = np.asarray(model(both, np.stack([real, real])), np.float64)
        logits = without + (scale + 1) * (logits - without)
        probability = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        probability[:, 32:] = -1.0
        score = np.where((canvas == MASK) & (np.arange(32) >= n) & real, probability.max(axis=-1), -2.0)
        best = score.argmax()
        canvas[best] = probability[best].argmax()
        off = 2 * (2 * scale + 1) * rounding.of_logits(SIZES, 32) * rounding.size(logits)
        token, position = (np.sort(x)[-2:] for x in (probability[best], score))
        assert np.log(token[1] / token[0]) > off and (position[0] < 0 or np.log(position[1] / position[0]) > 2 * off)
    return canvas[n : n + length]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_what_generate_gives_matches_and_nothing_else(make_mesh, generated, sizes):
    """Tests answers of two lengths and empty answers in one call, which keeps their order, and in small batches."""
    requests = [*generated, ([1, 2], []), *changed(generated), ([], [])]
    wanted = [True] * (len(generated) + 1) + [False] * (len(requests) - len(generated) - 2) + [True]
    reported = []
    model = make_model(make_mesh(*sizes))
    assert greedy_matches(model, requests, report=reported.append) == wanted
    assert reported == sorted(reported) and reported[-1] == len(requests)
    if sizes == (1, 1, 1):
        assert greedy_matches(model, requests[::-1], batch_size=8) == wanted[::-1]


def test_guided_generation(model):
    plain = {scale: [(p, plain_greedy(model, p, 7, scale)) for p in some_prompts()] for scale in (0.0, 2.0)}
    assert all(not np.array_equal(plain[0.0][i][1], plain[2.0][i][1]) for i in range(2))
    for scale, requests in plain.items():
        assert greedy_matches(model, requests, cfg_scale=scale) == [True] * len(requests)
        assert not any(greedy_matches(model, list(changed(requests)), cfg_scale=scale))


def test_masks_in_the_prompt_stay(model):
    prompt = [3, MASK, 5]
    answer = plain_greedy(model, prompt, 4, 0.0)
    assert greedy_matches(model, [(prompt, answer), (prompt, answer[::-1])]) == [True, False]


def test_rows_that_are_decided_are_not_computed_again(model, generated, monkeypatch):
    """Tests that answers whose first token is wrong take one step, and that the others go on in smaller batches."""
    compute = greedy._steps
    rows = []

    def counted(*args, guided):
        rows.append(len(args[-1]["tokens"]))
        return compute(*args, guided=guided)

    monkeypatch.setattr(greedy, "_steps", counted)
    prompt, answer = generated[-1]
    requests = [(prompt, [61] * 12)] * 16 + [(prompt, answer)]
    assert greedy_matches(model, requests, batch_size=64) == [False] * 16 + [True]
    assert rows == [64, 1, 1, 1]  # rounds of 1, 2 and 4 steps, then the remaining 5 steps


@pytest.mark.parametrize(
    ("request_", "settings"), [(([1], [64]), {}), (([1], [2]), {"cfg_scale": -1.0}), (([1], [2]), {"batch_size": 0})]
)
def test_mistakes_are_refused(model, request_, settings):
    with pytest.raises(UserError):
        greedy_matches(model, [request_], **settings)
