"""Tests that requests are checked, padded to few lengths, and each computed once, longest rows first."""

import jax
import numpy as np
import pytest

from llada_jax.config import ModelConfig, UserError
from llada_jax.scoring import batching
from llada_jax.scoring.batching import Request, check_requests, in_batches, padded_length

CONFIG = ModelConfig(vocab_size=16, mask_id=15)


def test_ids_of_every_kind_are_taken():
    given = [([1, 2], [3]), (np.array([1, 2], np.uint8), (3,)), (jax.numpy.array([1, 2]), np.array([3])), ([], [])]
    checked = check_requests(given, CONFIG)
    assert [(r.prompt_T.tolist(), r.answer_T.tolist()) for r in checked] == [([1, 2], [3])] * 3 + [([], [])]
    assert all(ids.dtype == np.int32 for request in checked for ids in request)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([1], [16]), "request 1: the answer has ids from 16 to 16, but the model's vocabulary size is 16"),
        (([-1, 3], [2]), "request 1: the prompt has ids from -1 to 3"),
        (([1], [2**40]), "request 1: the answer has ids"),
        (([[1]], [2]), "of shape (1, 1)"),
        (([1.0], [2]), "not float64"),
        (("text", [2]), "request 1: the prompt must be integer token ids"),
        (([[1], [1, 2]], [2]), "request 1: the prompt must be"),
        (([15], [15]), "request 1: the answer contains MASK (id 15)"),
        (([1],), "request 1: it must be a pair"),
        (5, "request 1: it must be a pair"),
    ],
)
def test_what_is_no_request_is_refused_in_one_line(request_, message):
    with pytest.raises(UserError) as error:
        check_requests([([15], [2]), request_], CONFIG)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_model_without_mask_is_refused():
    with pytest.raises(UserError, match="which token is MASK"):
        check_requests([], ModelConfig(vocab_size=16))


def test_padded_lengths_are_few_and_waste_little():
    padded = {n: padded_length(n) for n in range(1, 4097)}
    assert all(n <= length < 1.25 * n + 16 for n, length in padded.items())
    assert len(set(padded.values())) == 28 and all(length % 16 == 0 for length in padded.values())
    assert padded[128] == 128 and padded[129] == 160 and padded[4096] == 4096


def test_digest_tells_prompt_from_answer():
    digests = [Request(np.int32(p), np.int32(a)).digest for p, a in (([1, 2], [3]), ([1], [2, 3]), ([1, 2], [4]))]
    assert len({tuple(d) for d in digests}) == 3
    assert digests[0].tolist() == Request(np.int32([1, 2]), np.int32([3])).digest.tolist()


@pytest.mark.parametrize("batch_size", [None, 1, 5, 64])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_every_row_is_computed_once_the_longest_first(make_mesh, rng, monkeypatch, batch_size, sizes):
    monkeypatch.setitem(batching.BATCH_TOKENS, jax.devices()[0].platform, 512)
    requests = [Request(np.zeros(n, np.int32), np.zeros(1 + n % 7, np.int32)) for n in rng.integers(0, 150, 20)]
    request_N = rng.integers(0, 20, 90)
    seen, lengths, shapes, running = [], [], [], []

    def columns(rows_B, length):
        assert all(requests[i].length <= length for i in request_N[rows_B])
        lengths.append(length)
        return {"row": rows_B.astype(np.int32)}

    def compute(batch):
        running.append(len(seen))
        shapes.append((lengths[-1], len(batch["row"])))
        return (batch["row"] * 2,)

    with jax.set_mesh(make_mesh(*sizes)):
        for rows_N, (twice_N,) in in_batches(requests, request_N, columns, compute, batch_size):
            np.testing.assert_array_equal(twice_N, 2 * rows_N)
            seen.append(rows_N)
    assert sorted(np.concatenate(seen).tolist()) == list(range(90))
    assert lengths == sorted(lengths, reverse=True)
    assert running[1:3] == [0, 1]  # the results of a batch are fetched after the next batch was started
    shards = sizes[0] * sizes[1]
    for length, rows in shapes:
        most = max(1, batch_size // shards) * shards if batch_size else 512 // length * shards
        assert rows % shards == 0 and rows <= max(most, shards)


def test_no_requests_no_batches(make_mesh):
    with jax.set_mesh(make_mesh()):
        assert not list(in_batches([], np.array([], int), None, None, None))
