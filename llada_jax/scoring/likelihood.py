"""How likely a model finds answers (Eq. 6 and 14 of arXiv 2502.09992).

log p(answer | prompt) >= E[ L / l * sum_i 1[x_l^i = MASK] log p(x_0^i | prompt, x_l) ], l uniform in 1..L and
exactly l of the answer's L tokens masked. Each sample of each request is a row; rows of like length go
through the model together, whatever request they belong to.

The noise of a request depends on the key and its own tokens only: not on other requests, their order, the
batches or the mesh. Letters in names, beside those of model.py: R requests, N rows of all requests.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import UserError
from llada_jax.devices import mesh
from llada_jax.diffusion.forward import unit_interval
from llada_jax.model.transformer import Transformer
from llada_jax.scoring.batching import HEAD_CHUNK, Requests, check_requests, check_settings, hidden, in_batches, layout
from llada_jax.scoring.bound import exact_mask, masked_nats, moved
from llada_jax.scoring.greedy import greedy_matches

__all__ = [
    "Score",
    "greedy_matches",
    "log_likelihood",
    "log_likelihoods",
    "rolling_log_likelihoods",
    "rolling_requests",
]

MOST_ENUMERATED = 20  # tokens: answers of more are never enumerated, whatever the number of samples


class Score(NamedTuple):
    """The bound on an answer's log-likelihood, summed over its tokens."""

    value: float  # nats
    standard_error: float  # nats; 0 = exact, nan = unknown (a single sample)


def log_likelihood(
    model: Transformer,
    prompt_T: jax.typing.ArrayLike,
    answer_T: jax.typing.ArrayLike,
    samples: int = 128,
    *,
    key: jax.Array,
    cfg_scale: float = 0.0,
) -> Score:
    """`log_likelihoods` of one answer: `value, standard_error = log_likelihood(...)`."""
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
    """The bound on log p(answer | prompt) of each request, in nats, by Monte Carlo or exactly.

    The samples' numbers of masked tokens are spread evenly over 1..L (one sample in each of as many strata). The
    standard error is that of this estimate, rather too large than too small; below some ten samples it is a
    rough guess itself. Where the 2**L - 1 ways to mask an answer are no more than `samples`, each is computed
    once and weighed: the bound is exact, its error 0. No mesh needs to be set; on a mesh the rows are split
    over its batch axes; in a run of several processes all make the same call.

    Args:
      model: the mask predictor.
      requests: (prompt, answer) ids, on the host or a device; both may be empty. An empty answer scores 0.
      samples: of each request, at least 1.
      key: of the noise.
      cfg_scale: w of Eq. 16; 0 = no guidance.
      batch_size: rows at most that go through the model together; None = what keeps the devices busy.
      report: told after each batch how many requests are done.

    Returns:
      Scores in the order of the requests.

    Raises:
      UserError: ids beyond the vocabulary, MASK in an answer, an impossible setting.
    """
    checked = check_requests(requests, model.config)
    check_settings(cfg_scale, batch_size)
    length_R = np.array([len(request.answer_T) for request in checked], np.int64)
    if not isinstance(samples, int | np.integer) or not 1 <= samples < 2**31 // length_R.max(initial=1):
        raise UserError(f"samples={samples}: it must be a whole number from 1 to below 2**31 / tokens of an answer")
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
    """From the values of all subsets: l is uniform, and so are the subsets of size l."""
    chance_N = [1 / (length * math.comb(length, subset.bit_count())) for subset in range(1, 2**length)]
    return Score(float(np.dot(value_N, chance_N)), 0.0)


def _estimate(value_N: np.ndarray) -> Score:
    """From samples ordered by their number of masked tokens.

    One sample falls into each of N strata of like size. The variance within a stratum is told by the squared
    difference from its neighbour, half of it for each of the two; the first and the last have one neighbour
    only. That the means of neighbouring strata differ makes the error slightly too large.
    """
    count = len(value_N)
    if count == 1:
        return Score(float(value_N[0]), math.nan)
    share_N = np.full(count - 1, 0.5)
    share_N[[0, -1]] = 1.0
    return Score(float(value_N.mean()), math.sqrt(np.dot(share_N, np.diff(value_N) ** 2)) / count)


def _draw(model, requests, rows_R, samples_R, key, cfg_scale, batch_size, report) -> list[np.ndarray]:
    """L / l * sum log p of every row, float64 (N,) for each request.

    Args:
      rows_R: rows of each request.
      samples_R: the samples they are; 0 = not drawn, but all subsets of its tokens in the order of their bits.
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
        return batch | {"digest": digest_R2[request_B]}

    with mesh.mesh_of(model.embedding[...]):
        # By way of the host: the key's device need not be one of the mesh, nor all of the mesh be here.
        key_data = jax.device_put(jax.device_get(jax.random.key_data(key)), P())
        scale = jax.device_put(np.float32(cfg_scale), P())
        compute = functools.partial(
            _row_values, model, key_data, scale, kind=jax.random.key_impl(key), guided=cfg_scale > 0
        )
        for rows_B, got_B in in_batches(requests, request_N, columns, compute, batch_size):
            value_N[rows_B] = got_B
            np.subtract.at(left_R, request_N[rows_B], 1)
            report(int(np.count_nonzero(left_R <= 0)))
    return [value_N[start : start + rows] for start, rows in zip(start_R, rows_R, strict=True)]


def _masks(key: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """bool (B, T), which tokens of the answers are masked, and L / l, fp32 (B,)."""
    answer_B, sample_B, samples_B = batch["answer"], batch["sample"], batch["samples"]
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    key_B = jax.vmap(jax.random.fold_in)(fold_in(key, batch["digest"][:, 0]), batch["digest"][:, 1])
    offset_key_B, mask_key_B = jnp.unstack(jax.vmap(jax.random.split)(key_B), axis=1)

    # l = floor(L (sample + u) / samples) + 1 with u in [0, 1), in integers. Each sample has a u of its own: one for all
    # would be an error that all have in common, of which their differences tell nothing.
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
    # Counted from the answer's first token so far.
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
    """L / l * sum of the masked tokens' log p: fp32 nats (B,), whole on every device."""
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


def rolling_requests(document_T: jax.typing.ArrayLike, max_length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A document as requests that fit into the model, every token in one answer, given what can be before it.

    The first answer is as long as the model allows and has no prompt; those that follow have max_length // 2
    tokens (the last one what is left) and, as prompt, as many tokens before them as fit.

    Args:
      document_T: ids.
      max_length: tokens of prompt and answer together, at least 1.

    Raises:
      UserError: max_length is less than 1, the document is no sequence.
    """
    if max_length < 1:
        raise UserError(f"max_length={max_length}: it must be at least 1")
    document_T = np.asarray(document_T)
    if document_T.ndim != 1:
        raise UserError(f"a document must be ids of shape (T,), not of shape {document_T.shape}")
    requests, first, stop = [], 0, min(max_length, len(document_T))
    while first < stop:
        requests.append((document_T[max(0, stop - max_length) : first], document_T[first:stop]))
        first, stop = stop, min(stop + max(1, max_length // 2), len(document_T))
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
) -> list[Score]:
    """The bound on log p of whole documents, each the sum over its `rolling_requests`.

    A document of up to max_length tokens is seen whole: Eq. 6 with an empty prompt. Arguments and errors beside
    max_length are those of `log_likelihoods`; `report` is told how many windows are done.
    """
    windows_R = [rolling_requests(document_T, max_length) for document_T in documents]
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
