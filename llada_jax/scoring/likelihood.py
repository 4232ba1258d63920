"""Computes how likely a model finds answers (Eq. 6 and 14 of arXiv 2502.09992).

log p(answer | prompt) >= E[ L / l * sum_i 1[x_l^i = MASK] log p(x_0^i | prompt, x_l) ], where l is uniform in 1..L
and exactly l of the answer's L tokens are masked. Each sample of each request is a row. Rows of similar length go
through the model together, no matter which requests they belong to.

The noise of a request depends only on the key and on the request's own tokens. It does not depend on other requests,
on their order, on the batches or on the mesh.

Letters in names, in addition to those of `model/transformer.py`: R requests, N rows of all requests.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import NonFinite, UserError
from llada_jax.devices import mesh
from llada_jax.diffusion.forward import unit_interval
from llada_jax.model.transformer import Transformer
from llada_jax.scoring.batching import HEAD_CHUNK, Requests, check_requests, check_settings, hidden, in_batches, layout
from llada_jax.scoring.bound import exact_mask, masked_nats, moved
from llada_jax.scoring.greedy import greedy_matches
from llada_jax.scoring.next_token import exact

__all__ = [
    "Score",
    "greedy_matches",
    "log_likelihood",
    "log_likelihoods",
    "rolling_log_likelihoods",
    "rolling_requests",
]

MOST_ENUMERATED = 20  # tokens; longer answers are never enumerated, whatever the number of samples


class Score(NamedTuple):
    """A lower bound on an answer's log-likelihood, summed over its tokens."""

    value: float  # nats
    standard_error: float  # nats; 0 means that the value is exact, nan that the error is unknown (a single sample)


def log_likelihood(
    model: Transformer,
    prompt_T: jax.typing.ArrayLike,
    answer_T: jax.typing.ArrayLike,
    samples: int = 128,
    *,
    key: jax.Array,
    cfg_scale: float = 0.0,
) -> Score:
    """Scores one answer with `log_likelihoods`: `value, standard_error = log_likelihood(...)`."""
    return log_likelihoods(model, [(prompt_T, answer_T)], samples=samples, key=key, cfg_scale=cfg_scale)[0]


def log_likelihoods(
    model: Transformer,
    requests: Requests,
    *,
    samples: int = 128,
    key: jax.Array,
    cfg_scale: float = 0.0,
    batch_size: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Computes the lower bound on log p(answer | prompt) of each request in nats, by Monte Carlo or exactly.

    Of a causal model, the likelihood is exact and its standard error 0, without samples and noise. Where the prompt is
    empty, the answer follows EOS, the end of the text before it.

    The range 1..L is cut into as many strata as there are samples, and the number of masked tokens of each sample is
    drawn from its own stratum, so that the samples are spread evenly over the range. The standard error is that of this
    stratified estimate. It tends to be too large rather than too small; with fewer than about ten samples it is itself
    only a rough guess. There are 2**L - 1 ways to mask an answer. If these are no more than `samples`, each of them is
    computed once and weighted with its probability; the bound is then exact and its standard error is 0.

    If no mesh is set, the mesh of the model's parameters is used. The rows are split over the batch axes of the mesh.
    In a run of several processes every process must make the same call.

    Args:
      model: The mask predictor.
      requests: Pairs (prompt, answer) of token ids, on the host or on a device. Both may be empty. The score of an
        empty answer is 0.
      samples: The number of samples per request, at least 1.
      key: The key of the noise.
      cfg_scale: The guidance scale w of Eq. 16. 0 means no guidance.
      batch_size: The largest number of rows that go through the model together. None means as many as keep the devices
        busy.
      report: A function that is called after each batch with the number of requests that are done so far.

    Returns:
      The scores in the order of the requests.

    Raises:
      UserError: If a request has ids outside the vocabulary or MASK in its answer, or if a setting is out of range.
      NonFinite: If the output of the model is NaN or infinite where a token is masked.
    """
    if model.config.causal:
        return [Score(nats, 0.0) for nats, _ in exact(model, requests, cfg_scale, batch_size, report)]
    checked = check_requests(requests, model.config)
    check_settings(cfg_scale, batch_size)
    length_R = np.array([len(request.answer_T) for request in checked], np.int64)
    if not isinstance(samples, int | np.integer) or not 1 <= samples < 2**31 // length_R.max(initial=1):
        raise UserError(
            f"samples={samples}: it must be a whole number, at least 1 and below 2**31 / (tokens of the longest answer)"
        )
    subsets_R = 2 ** np.minimum(length_R, MOST_ENUMERATED + 1) - 1
    exact_R = (length_R <= MOST_ENUMERATED) & (subsets_R <= samples)
    value_RN = _draw(
        model,
        checked,
        rows_R=np.where(exact_R, subsets_R, samples).astype(np.int64),
        samples_R=np.where(exact_R, 0, samples),
        key=key,
        cfg_scale=cfg_scale,
        batch_size=batch_size,
        report=report,
    )
    return [
        _expectation(value_N, length) if exact else _estimate(value_N)
        for value_N, length, exact in zip(value_RN, length_R.tolist(), exact_R, strict=True)
    ]


def _expectation(value_N: np.ndarray, length: int) -> Score:
    """Computes the exact score from the values of all subsets: l is uniform, and so are the subsets of size l."""
    chance_N = [1 / (length * math.comb(length, subset.bit_count())) for subset in range(1, 2**length)]
    return Score(float(np.dot(value_N, chance_N)), 0.0)


def _estimate(value_N: np.ndarray) -> Score:
    """Estimates the score from samples that are ordered by their number of masked tokens.

    There are N strata of equal size, and each holds one sample. The squared difference between the samples of two
    neighbouring strata estimates the sum of the two variances within these strata. Most strata have two neighbours and
    take part in two differences, so each difference counts half; the first and the last stratum have only one
    neighbour, so their difference counts in full. The means of neighbouring strata differ as well, which makes the
    standard error slightly too large.
    """
    count = len(value_N)
    if count == 1:
        return Score(float(value_N[0]), math.nan)
    share_N = np.full(count - 1, 0.5)
    share_N[[0, -1]] = 1.0
    return Score(float(value_N.mean()), math.sqrt(np.dot(share_N, np.diff(value_N) ** 2)) / count)


def _draw(model, requests, rows_R, samples_R, key, cfg_scale, batch_size, report) -> list[np.ndarray]:
    """Computes L / l * the sum of log p over the masked tokens of every row.

    The arguments that are not described here are those of `log_likelihoods`.

    Args:
      requests: The requests as `check_requests` returns them.
      rows_R: The number of rows of each request.
      samples_R: The number of samples of each request. 0 means that its rows are not drawn: they enumerate all
        non-empty subsets of the answer's tokens in the order of their bit patterns.

    Returns:
      For each request float64 (N,), the values of its rows.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    request_N = np.repeat(np.arange(len(requests)), rows_R)
    start_R = np.cumsum(rows_R) - rows_R
    sample_N = np.arange(len(request_N)) - start_R[request_N]
    digest_R2 = np.array([request.digest for request in requests], np.uint32).reshape(-1, 2)
    value_N, left_R = np.zeros(len(request_N)), rows_R.copy()

    def columns(rows_B: np.ndarray, length: int) -> dict[str, np.ndarray]:
        request_B = request_N[rows_B]
        batch = layout([requests[i] for i in request_B], length)
        batch |= {"sample": sample_N[rows_B].astype(np.int32), "samples": samples_R[request_B].astype(np.int32)}
        # Two columns, because JAX cannot tell how a column of an array of one row is split.
        return batch | {"digest_0": digest_R2[request_B, 0], "digest_1": digest_R2[request_B, 1]}

    with mesh.mesh_of(model.embedding[...]):
        # Move the key through the host: its device may be outside the mesh, and the mesh may extend over other hosts.
        key_data = jax.device_put(jax.device_get(jax.random.key_data(key)), P())
        scale = jax.device_put(np.float32(cfg_scale), P())
        compute = functools.partial(
            _row_values, model, key_data, scale, kind=jax.random.key_impl(key), guided=cfg_scale > 0
        )
        for rows_B, got_B in in_batches(requests, request_N, columns, compute, batch_size):
            if not np.isfinite(got_B).all():
                raise NonFinite
            value_N[rows_B] = got_B
            np.subtract.at(left_R, request_N[rows_B], 1)
            report(int(np.count_nonzero(left_R <= 0)))
    return [value_N[start : start + rows] for start, rows in zip(start_R, rows_R, strict=True)]


def _masks(key: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns bool (B, T), True where a token of an answer is masked, and the weights L / l, fp32 (B,)."""
    answer_B, sample_B, samples_B = batch["answer"], batch["sample"], batch["samples"]

    def row_keys(first, second):
        return tuple(jax.random.split(jax.random.fold_in(jax.random.fold_in(key, first), second)))

    offset_key_B, mask_key_B = jax.vmap(row_keys)(batch["digest_0"], batch["digest_1"])

    # l = floor(L (sample + u) / samples) + 1 with u in [0, 1), computed with integers. Each sample draws its own u. A
    # single u would give all samples an error in common, which the standard error, made of differences, could not show.
    offset_key_B = jax.vmap(jax.random.fold_in)(offset_key_B, sample_B)
    unit_B = unit_interval(jax.vmap(lambda k: jax.random.bits(k, (), jnp.uint32))(offset_key_B))
    offset_B = jnp.minimum((unit_B * answer_B).astype(jnp.int32), answer_B - 1)
    drawn_B = (sample_B * answer_B + offset_B) // jnp.maximum(samples_B, 1) + 1
    subset_B = jnp.where(samples_B == 0, sample_B + 1, 0)
    masked_B = jnp.where(samples_B == 0, jax.lax.population_count(subset_B), drawn_B)

    width = batch["tokens"].shape[1]
    drawn_BT = exact_mask(jax.vmap(jax.random.fold_in)(mask_key_B, sample_B), answer_B, masked_B, width)
    bits_BT = (subset_B[:, None] >> jnp.minimum(jnp.arange(width), 31)) & 1 == 1
    mask_BT = jnp.where((samples_B == 0)[:, None], bits_BT, drawn_BT)
    # The mask starts at the first token of the answer: move it behind the prompt.
    return moved(mask_BT, batch["prompt"]), answer_B / masked_B


@functools.partial(jax.jit, static_argnames=("kind", "guided"))
def _row_values(
    model: Transformer,
    key_data: jax.Array,
    scale: jax.Array,
    batch: dict[str, jax.Array],
    *,
    kind: Hashable,
    guided: bool,
) -> jax.Array:
    """Returns L / l * the sum of log p over the masked tokens of each row, fp32 nats (B,), on every device."""
    mask_BT, weight_B = _masks(jax.random.wrap_key_data(key_data, impl=kind), batch)
    return -masked_nats(
        model,
        lambda canvas_BT: hidden(model, canvas_BT, batch, scale, guided),
        batch["tokens"],
        mask_BT,
        weight_B,
        min(model.compute.loss_chunk, HEAD_CHUNK),
        model.config.mask_id,
    )


def rolling_requests(
    document_T: jax.typing.ArrayLike, max_length: int, prefix: Sequence[int] = ()
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cuts a document into requests that fit into the model, so that every token is in exactly one answer.

    The prompt of the first answer is the prefix, and the answer has as many tokens as fit. Each of the following
    answers has max_length // 2 tokens (at least 1; the last answer has the tokens that are left). Its prompt consists
    of as many of the tokens before it as fit.

    Args:
      document_T: The token ids of the document.
      max_length: The largest number of tokens of a prompt and its answer together, at least 1.
      prefix: Token ids that stand in front of the document, such as BOS, and are in no answer. Where they leave no room
        for an answer, their beginning is left out.

    Returns:
      The requests (prompt, answer) in the order of the document.

    Raises:
      UserError: If max_length is less than 1, or if the document does not have the shape (T,).
    """
    if max_length < 1:
        raise UserError(f"max_length={max_length}: it must be at least 1")
    document_T = np.asarray(document_T)
    if document_T.ndim != 1:
        raise UserError(f"a document must be token ids of shape (T,), not an array of shape {document_T.shape}")
    prefix = list(prefix)[-max_length + 1 :] if max_length > 1 else []
    requests, first = [], len(prefix)
    text_T = np.concatenate([np.asarray(prefix, document_T.dtype), document_T])
    stop = min(max_length, len(text_T))
    while first < stop:
        requests.append((text_T[max(0, stop - max_length) : first], text_T[first:stop]))
        first, stop = stop, min(stop + max(1, max_length // 2), len(text_T))
    return requests


def rolling_log_likelihoods(
    model: Transformer,
    documents: Sequence[jax.typing.ArrayLike],
    *,
    max_length: int,
    samples: int = 128,
    key: jax.Array,
    cfg_scale: float = 0.0,
    batch_size: int | None = None,
    report: Callable[[int], None] = lambda done: None,
    prefix: Sequence[int] = (),
) -> list[Score]:
    """Computes the lower bound on log p of whole documents, each as the sum over its `rolling_requests`.

    A document that fits is scored as a whole: Eq. 6 with the prefix as the prompt. The arguments that are not described
    here, and the errors, are those of `log_likelihoods`.

    Args:
      documents: The token ids of each document.
      max_length: The largest number of tokens that go through the model at once, see `rolling_requests`.
      prefix: Token ids in front of every document, see `rolling_requests`.
      report: A function that is called after each batch with the number of windows (requests) that are done so far.

    Returns:
      One score per document, in the order of the documents.
    """
    windows_R = [rolling_requests(document_T, max_length, prefix) for document_T in documents]
    scores = iter(
        log_likelihoods(
            model,
            [window for windows in windows_R for window in windows],
            samples=samples,
            key=key,
            cfg_scale=cfg_scale,
            batch_size=batch_size,
            report=report,
        )
    )
    return [_total([next(scores) for _ in windows]) for windows in windows_R]


def _total(scores: list[Score]) -> Score:
    return Score(sum((score.value for score in scores), 0.0), math.hypot(*(score.standard_error for score in scores)))
