"""Tests the likelihood of answers: exact values, unbiased estimates, correct errors, equal results on every mesh."""

import functools
import itertools
import json
import math
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import rounding
import tiny
from paths import PARITY

from llada_jax import load
from llada_jax.config import UserError
from llada_jax.model.transformer import initialise
from llada_jax.scoring import likelihood
from llada_jax.scoring.batching import Request, layout
from llada_jax.scoring.likelihood import (
    Score,
    log_likelihood,
    log_likelihoods,
    rolling_log_likelihoods,
    rolling_requests,
)

MASK = 15
KEY = jax.random.key(0)
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def enumerated(model, prompt, answer, scale=0.0) -> float:
    """Computes Eq. 6 by enumerating every l and every subset on unpadded canvases, with Eq. 16 applied to logits."""
    length, n, mask_id = len(answer), len(prompt), model.config.mask_id
    subsets = [list(s) for size in range(1, length + 1) for s in itertools.combinations(range(length), size)]
    canvas = np.tile(np.array([*prompt, *answer], np.int32), (len(subsets), 1))
    for row, subset in zip(canvas, subsets, strict=True):
        row[[n + i for i in subset]] = mask_id
    logits = np.asarray(model(canvas), np.float64)
    if scale:
        canvas[:, :n] = mask_id
        without = np.asarray(model(canvas), np.float64)
        logits = without + (scale + 1) * (logits - without)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    total = 0.0
    for row, subset in zip(log_p, subsets, strict=True):
        size = len(subset)
        value = length / size * sum(row[n + i, answer[i]] for i in subset)
        total += value / length / math.comb(length, size)
    return total


def tolerance(toy, samples: int = 1) -> float:
    """Returns the relative bound for a likelihood, the mean of so many samples; the longest canvas has 41 tokens."""
    return rounding.of_nll(toy.config, 41, samples)


def assert_same_scores(toy, got, wanted, samples=20):
    """Checks that scores differ only by rounding. The error of a score has that of the samples it is the spread of."""
    wanted = np.array(wanted)
    rounding.assert_within(got, wanted, tolerance(toy, samples) * np.abs(wanted[..., :1]))


def some_requests():
    """Returns requests of two padded lengths, some of them without a prompt, an answer or both."""
    rng = np.random.default_rng(2)
    sizes = zip(rng.integers(17, 21, 10), rng.integers(0, 12, 10), strict=True)
    requests = [(rng.integers(0, 15, p).tolist(), rng.integers(0, 15, a)) for p, a in sizes]
    return [*requests, ([1, 2, 3], []), ([], [4] * 12), ([], [])]


@pytest.fixture(scope="module")
def whole(toy):
    """Returns the scores of `some_requests` from a single call, in the order of the requests."""
    return np.array(log_likelihoods(toy.model, some_requests(), samples=20, key=KEY))


@pytest.mark.parametrize(
    ("prompt", "answer", "scale"),
    [
        ([3, 1, 4], [1, 5, 9, 2, 6], 0.0),
        ([3, 1, 4], [1, 5, 9, 2, 6], 0.7),
        ([], [3, 1, 4, 1, 5], 0.0),
        ([7] * 40, [8], 0.7),
    ],
    ids=["plain", "guided", "no-prompt", "guided-by-a-long-prompt"],
)
def test_few_masks_are_enumerated(toy, prompt, answer, scale):
    """Tests that a short answer gets the enumerated value and the error zero, with and without padding."""
    exact = enumerated(toy.model, prompt, answer, scale)
    masks = 2 ** len(answer) - 1
    got = log_likelihoods(toy.model, [(prompt, answer)], samples=masks, key=KEY, cfg_scale=scale)
    # Guided logits are (scale + 1) times some logits minus scale times others.
    within = (2 * scale + 1) * tolerance(toy, masks)
    assert got[0].value == pytest.approx(exact, rel=within) and got[0].standard_error == 0.0
    if masks > 1:
        drawn = log_likelihood(toy.model, prompt, answer, masks - 1, key=KEY, cfg_scale=scale)
        assert drawn.standard_error > 0 and drawn.value != got[0].value


@pytest.mark.parametrize("samples", [pytest.param(5, marks=pytest.mark.slow), 16])
def test_estimate_is_unbiased_and_its_error_honest(toy, samples):
    prompt, answer = [2, 7], toy.x_0.tolist()
    exact = enumerated(toy.model, prompt, answer)
    scores = [
        log_likelihood(toy.model, prompt, answer, samples, key=jax.random.fold_in(KEY, i), cfg_scale=0)
        for i in range(500)
    ]
    value, error = np.array(scores).T
    off = value - exact
    assert abs(off.mean()) < 3.5 * off.std() / math.sqrt(len(off))
    # Compare mean squares, because the error of few samples is itself uncertain. It must not be far off either way.
    assert 0.85 < math.sqrt((error**2).mean() / (off**2).mean()) < 1.3
    if samples == 16:
        assert 0.75 < math.sqrt(((off / error) ** 2).mean()) < 1.25


@pytest.mark.parametrize("count", [2, 3, 8, 32, 128])
def test_error_where_few_masked_tokens_vary_most(count):
    """Tests samples whose standard deviation is sqrt((1 - r) / r) at mask ratio r, and whose mean changes with r."""
    rng = np.random.default_rng(1)
    ratio = (np.arange(count) + 0.5) / count
    value = np.sqrt((1 - ratio) / ratio) * rng.normal(size=(20_000, count)) - 2 * ratio
    error = np.array([likelihood._estimate(row).standard_error for row in value])
    assert 0.98 < math.sqrt((error**2).mean()) / value.mean(axis=1).std() < 1.35


def masks_of(requests, samples, device_mesh, length=64):
    """Returns the masks and weights of all samples of the requests as numpy arrays."""
    repeated = [Request(*map(np.int32, request)) for request in requests for _ in range(samples)]
    batch = layout(repeated, length)
    batch |= {
        "sample": np.tile(np.arange(samples, dtype=np.int32), len(requests)),
        "samples": np.full(len(repeated), samples, np.int32),
        "digest_0": np.array([request.digest[0] for request in repeated]),
        "digest_1": np.array([request.digest[1] for request in repeated]),
    }
    with jax.set_mesh(device_mesh):
        placed = {name: jax.device_put(x, jax.P(("data", "fsdp"))) for name, x in batch.items()}
        mask, weight = jax.jit(likelihood._masks)(KEY, placed)
    return np.asarray(mask).reshape(len(requests), samples, length), np.asarray(weight).reshape(-1, samples)


def test_masks_lie_in_the_answer_and_their_numbers_are_spread_evenly(make_mesh):
    requests = [([1] * prompt, [2] * answer) for prompt, answer in ((0, 10), (30, 5), (3, 40), (9, 1))]
    mask, weight = masks_of(requests, 40, make_mesh())
    position = np.arange(64)
    for (prompt, answer), mask_ST, weight_S in zip(requests, mask, weight, strict=True):
        here = (position >= len(prompt)) & (position < len(prompt) + len(answer))
        assert not mask_ST[:, ~here].any()
        masked = mask_ST.sum(axis=1)
        np.testing.assert_allclose(weight_S, len(answer) / masked, rtol=rounding.EPS)  # a quotient
        # 40 is a multiple of each length, so every l occurs equally often, in ascending order.
        np.testing.assert_array_equal(masked, np.repeat(np.arange(1, len(answer) + 1), 40 // len(answer)))


def test_masks_depend_on_key_and_tokens_alone(make_mesh):
    requests = [([1, 2], [3] * 20), ([5] * 9, [6] * 11), ([1, 2], [3] * 19)]
    mask, _ = masks_of(requests, 8, make_mesh())
    on_mesh, _ = masks_of(requests[::-1], 8, make_mesh(2, 2, 2))
    np.testing.assert_array_equal(on_mesh[::-1], mask)
    padded_further, _ = masks_of(requests[:1], 8, make_mesh(), length=128)
    np.testing.assert_array_equal(padded_further[0, :, :64], mask[0])
    offsets = {tuple(masks_of([([i], [3] * 40)], 8, make_mesh())[0].sum(axis=2)[0]) for i in range(10)}
    assert len(offsets) > 3  # each request draws its own offset


def test_masks_are_those_of_earlier_versions(make_mesh):
    """Cached scores stay valid only as long as a key draws the same masks."""
    mask, _ = masks_of([([1, 2], [3] * 20)], 4, make_mesh())
    assert ["".join("01"[m] for m in row[2:22].astype(int)) for row in mask[0]] == [
        "01000000000100000011",
        "00100111000010000101",
        "01100111000111111000",
        "01111011101111111111",
    ]


def test_requests_alone_and_in_other_batches_score_the_same(toy, whole):
    """Tests that the other requests of a call do not matter, so that an interrupted evaluation can be continued."""
    requests = some_requests()
    done = []
    rest = log_likelihoods(toy.model, requests[:4:-1], samples=20, key=KEY, batch_size=32, report=done.append)
    assert_same_scores(toy, rest[::-1], whole[5:])
    assert done == sorted(done) and done[-1] == len(rest)
    rest = log_likelihoods(toy.model, requests[3:5], samples=20, key=KEY, batch_size=1)
    assert_same_scores(toy, rest, whole[3:5])
    alone = log_likelihood(toy.model, *requests[3], 20, key=KEY)
    assert_same_scores(toy, alone, whole[3])
    assert not np.allclose(log_likelihoods(toy.model, requests, samples=20, key=jax.random.key(1)), whole)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)])
def test_any_mesh_gives_the_same_scores(toy, make_mesh, whole, sizes):
    with jax.set_mesh(make_mesh(*sizes)):
        model = initialise(toy.config, toy.compute, jax.random.key(3))
        inside = log_likelihoods(model, some_requests(), samples=20, key=KEY)
    assert_same_scores(toy, inside, whole)
    # Outside the context of the mesh, with guidance: the mesh of the model's parameters is used.
    guided = log_likelihood(model, [1, 2, 3], [4, 5, 6], key=jax.random.PRNGKey(0), cfg_scale=1.0)
    assert guided.value == pytest.approx(enumerated(toy.model, [1, 2, 3], [4, 5, 6], 1.0), rel=3 * tolerance(toy))


TWO_PROCESSES = """
import json, sys
import jax
port, process, *text = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from llada_jax.devices import mesh
from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.model.transformer import initialise
from llada_jax.scoring.likelihood import log_likelihoods
config, compute, requests = (json.loads(part) for part in text)
with jax.set_mesh(mesh.mesh_over((2, 2, 1), jax.devices())):
    model = initialise(ModelConfig(**config), ComputeConfig(**compute), jax.random.key(3))
scores = log_likelihoods(model, requests, samples=20, key=jax.random.key(0))
print("RESULT", json.dumps(scores), flush=True)
"""


@pytest.mark.slow
def test_two_processes_give_the_same_scores(toy, whole):
    """Tests that rows are spread over the devices of two processes, and that each process gets all results."""
    settings = {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "kv_heads": 2,
        "feed_forward": 32,
        "vocab_size": 16,
        "mask_id": 15,
    }
    requests = [(prompt, answer.tolist()) for prompt, answer in some_requests()[:3]]
    text = [json.dumps(x) for x in (settings, {"dtype": "float32", "unroll": 0, "loss_chunk": 64}, requests)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": tiny.xla_flags(2), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, port, str(process), *text],
            env=environment,
            cwd=PARITY.parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for output, _ in [process.communicate(timeout=300) for process in processes]:
        scores = json.loads(output.split("RESULT ")[1].splitlines()[0])
        assert_same_scores(toy, scores, whole[:3])


def test_nothing_and_single_samples(toy, whole):
    requests = some_requests()
    empty = [i for i, (_, answer) in enumerate(requests) if not len(answer)]
    assert len(empty) >= 2 and (whole[empty] == 0).all()
    assert log_likelihoods(toy.model, [], key=KEY) == []
    one = log_likelihood(toy.model, [1], [2, 3, 4], 1, key=KEY)
    assert math.isnan(one.standard_error) and math.isfinite(one.value)
    value, error = log_likelihood(toy.model, [1], [2], 1, key=KEY)
    assert error == 0 and value == pytest.approx(enumerated(toy.model, [1], [2]), rel=tolerance(toy))


def test_guidance_needs_a_prompt(toy):
    answer = list(range(9))
    without, guided = (log_likelihood(toy.model, [], answer, 8, key=KEY, cfg_scale=w) for w in (0.0, 2.0))
    assert_same_scores(toy, guided, without, 8)


def test_nothing_is_compiled_twice(toy):
    score = functools.partial(log_likelihoods, toy.model, batch_size=16)
    score([([1] * 20, [2] * 9)], samples=16, key=KEY, cfg_scale=0.5)
    COMPILED.clear()
    score([([3] * 11, [4] * 19), ([], [5] * 30)], samples=16, key=jax.random.key(9), cfg_scale=1.5)
    score([([3] * 14, [4] * 4)], samples=16, key=KEY, cfg_scale=0.1)  # enumerated: 15 rows are filled up to 16
    assert not COMPILED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 2.5}, "samples=2.5"),
        ({"samples": 2**30}, "samples=1073741824"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
        ({"cfg_scale": math.inf}, "cfg_scale=inf"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_impossible_settings_are_refused(toy, settings, message):
    with pytest.raises(UserError, match=message):
        log_likelihoods(toy.model, [([1], [2, 3])], **{"key": KEY} | settings)


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_published_code_estimates_the_same(kind):
    """Compares with four published estimates of 4,096 samples each; our error of one sample gives the tolerance."""
    model, _ = load(PARITY / kind)
    with np.load(PARITY / kind / "cases.npz") as cases:
        prompt, answer, theirs = cases["ll_prompt"], cases["ll_answer"], cases["ll"]
    exact = log_likelihood(model, prompt, answer, 63, key=KEY)
    assert exact.standard_error == 0
    drawn = np.array([log_likelihood(model, prompt, answer, 62, key=jax.random.key(i)) for i in range(30)])
    one_sample = math.sqrt((drawn[:, 1] ** 2).mean() * 62)
    assert abs(exact.value - theirs.mean()) < 2 * one_sample / math.sqrt(theirs.size * 4096)
    assert abs(drawn[:, 0].mean() - theirs.mean()) < 2 * one_sample / math.sqrt(30 * 62)


@pytest.mark.parametrize("max_length", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 30])
def test_rolling_windows_score_every_token_once(length, max_length):
    document = np.arange(length)
    requests = rolling_requests(document, max_length)
    answers = np.concatenate([answer for _, answer in requests] or [[]])
    np.testing.assert_array_equal(answers, document)
    for i, (prompt, answer) in enumerate(requests):
        np.testing.assert_array_equal(prompt, np.arange(answer[0] - len(prompt), answer[0]))
        assert len(answer) == (min(length, max_length) if i == 0 else len(answer)) and len(answer) > 0
        if i:  # the prompt has as many of the preceding tokens as fit
            assert len(answer) <= max(1, max_length // 2)
            assert len(prompt) + len(answer) == max_length


def test_rolling_likelihood_is_the_sum_over_windows(toy):
    documents = [[1, 2, 3], np.arange(14), []]
    got = rolling_log_likelihoods(toy.model, documents, max_length=6, samples=10, key=KEY)
    assert got[0].value == pytest.approx(enumerated(toy.model, [], [1, 2, 3]), rel=tolerance(toy))
    assert got[0].standard_error == 0
    parts = log_likelihoods(toy.model, rolling_requests(documents[1], 6), samples=10, key=KEY)
    assert len(parts) == 4
    total = sum(part.value for part in parts), math.sqrt(sum(part.standard_error**2 for part in parts))
    assert_same_scores(toy, got[1], total, 10)
    assert got[2] == Score(0.0, 0.0)


@pytest.mark.parametrize(("document", "max_length"), [([1, 2], 0), ([[1, 2]], 4)])
def test_impossible_windows_are_refused(document, max_length):
    with pytest.raises(UserError):
        rolling_requests(document, max_length)


@pytest.mark.parametrize("max_length", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 30])
def test_a_prefix_is_in_front_of_a_document_and_in_no_answer(length, max_length):
    prefix, document = [99, 98], np.arange(length)
    requests = rolling_requests(document, max_length, prefix)
    kept = prefix[-max_length + 1 :] if max_length > 1 else []
    np.testing.assert_array_equal(np.concatenate([answer for _, answer in requests] or [[]]), document)
    whole = [*kept, *document]
    for prompt, answer in requests:
        end = len(kept) + answer[-1] + 1
        assert [*prompt, *answer] == whole[max(0, end - max_length) : end] and 0 < len(answer) <= max_length
    assert not requests or requests[0][0].tolist() == kept


def test_rolling_likelihood_given_a_prefix(toy):
    (got,) = rolling_log_likelihoods(toy.model, [[1, 2, 3]], max_length=6, samples=10, key=KEY, prefix=[4, 5])
    assert got.value == pytest.approx(enumerated(toy.model, [4, 5], [1, 2, 3]), rel=tolerance(toy))
