"""Tests the exact likelihoods of causal models against transformers and plain sums of log-probabilities."""

import jax
import numpy as np
import pytest
from paths import PARITY_AR

import llada_jax
from llada_jax.config import NonFinite, SamplerConfig, UserError
from llada_jax.sampling.sampler import generate
from llada_jax.scoring.likelihood import greedy_matches, log_likelihoods, rolling_log_likelihoods

KEY = jax.random.key(0)


def test_likelihoods_are_those_of_transformers(causal_case):
    model, cases = causal_case
    tokens_BT, nll_BT = cases["tokens"].astype(np.int32), cases["nll"]
    requests = [
        (tokens_BT[b, :at], tokens_BT[b, at:end]) for b in range(len(tokens_BT)) for at, end in ((1, 99), (7, 9))
    ]
    wanted = [-nll_BT[b, at - 1 : end - 1].sum() for b in range(len(tokens_BT)) for at, end in ((1, 99), (7, 9))]
    scores = log_likelihoods(model, requests, key=KEY)
    np.testing.assert_allclose([score.value for score in scores], wanted, rtol=1e-4, atol=1e-4)
    assert {score.standard_error for score in scores} == {0.0}
    value, standard_error = llada_jax.log_likelihood(model, *requests[0], key=KEY)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-4)
    assert standard_error == 0.0


def test_any_batch_and_any_mesh_gives_the_same(make_mesh, rng):
    requests = [(rng.integers(3, 300, p), rng.integers(3, 300, a)) for p, a in ((1, 5), (30, 1), (4, 20), (9, 0))]
    model = llada_jax.load(PARITY_AR / "qwen2")[0]
    done = []
    alone = [log_likelihoods(model, [request], key=KEY)[0].value for request in requests]
    together = log_likelihoods(model, requests, key=KEY, batch_size=2, report=done.append)
    assert done == sorted(done) and done[-1] == 4 and together[3] == (0.0, 0.0)
    spread = log_likelihoods(llada_jax.load(PARITY_AR / "qwen2", mesh=make_mesh(2, 2, 2))[0], requests, key=KEY)
    for found in (together, spread):
        np.testing.assert_allclose([score.value for score in found], alone, rtol=1e-5, atol=1e-5)


def test_greedy_answers_match(llama, rng):
    prompt_BT = rng.integers(3, 300, (2, 5)).astype(np.int32)
    answer_BT = np.asarray(generate(llama, prompt_BT, SamplerConfig(gen_length=20), KEY))[:, 5:]
    other_BT = np.where(np.arange(20) == 17, (answer_BT + 1) % 300, answer_BT)
    requests = [(p, a) for x in (answer_BT, other_BT) for p, a in zip(prompt_BT, x, strict=True)]
    assert greedy_matches(llama, [*requests, ([5], [])]) == [True, True, False, False, True]


def test_an_answer_without_prompt_follows_eos(llama, rng):
    document = rng.integers(3, 300, 23)
    (wanted,) = log_likelihoods(llama, [([2], document)], key=KEY)
    (alone,) = log_likelihoods(llama, [([], document)], key=KEY)
    (whole,) = rolling_log_likelihoods(llama, [document], max_length=64, key=KEY)
    (cut,) = rolling_log_likelihoods(llama, [document], max_length=8, key=KEY)
    assert alone == wanted == whole and cut.standard_error == 0.0 and cut.value != whole.value
    qwen = llada_jax.load(PARITY_AR / "qwen2")[0]
    with pytest.raises(UserError, match="a prompt is empty"):
        log_likelihoods(qwen, [([], [5])], key=KEY)


def test_what_cannot_be_is_named(llama):
    with pytest.raises(UserError, match="cfg_scale=1.0: this model is causal"):
        log_likelihoods(llama, [([5], [6])], key=KEY, cfg_scale=1.0)
    with pytest.raises(UserError, match="ids from 320 to 320"):
        log_likelihoods(llama, [([5], [320])], key=KEY)
    spoilt = llada_jax.load(PARITY_AR / "llama")[0]
    spoilt.final_norm[...] = spoilt.final_norm[...].at[3].set(np.nan)
    for call in (lambda: log_likelihoods(spoilt, [([5], [6])], key=KEY), lambda: greedy_matches(spoilt, [([5], [6])])):
        with pytest.raises(NonFinite):
            call()
    with pytest.raises(NonFinite):
        generate(spoilt, np.array([[5]], np.int32), SamplerConfig(gen_length=3), KEY)
