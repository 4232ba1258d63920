"""Lays out requests (prompt, answer) as rows of a few different lengths, so that few programs have to be compiled.

A row is [prompt | answer | padding]. The suffixes of array names are those of `model/transformer.py`, and in addition
N for the rows of all requests and R for the requests.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.config import ModelConfig, UserError
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.guidance import guided_trunk
from llada_jax.sampling.settings import LARGEST

SHORTEST = 16  # tokens; every padded length is a multiple of this, and long rows are padded to larger multiples
# The number of tokens of a batch on each device, enough to keep it busy. A CPU needs few, and its caches are small.
BATCH_TOKENS = {"cpu": 2048}
ACCELERATOR_TOKENS = 16384
# The number of positions that go through the head together. It is small because often only a few tokens of an answer
# are masked, while a chunk is always computed as a whole.
HEAD_CHUNK = 128

Requests = Sequence[tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]]


class Request(NamedTuple):
    """A prompt and the answer to score."""

    prompt_T: np.ndarray  # int32, may be empty
    answer_T: np.ndarray  # int32, may be empty

    @property
    def length(self) -> int:
        return len(self.prompt_T) + len(self.answer_T)

    @property
    def digest(self) -> np.ndarray:
        """Returns a hash of the tokens as uint32 of shape (2,)."""
        content = np.concatenate([np.int32([len(self.prompt_T)]), self.prompt_T, self.answer_T]).astype("<i4")
        return np.frombuffer(hashlib.blake2b(content.tobytes(), digest_size=8).digest(), "<u4").astype(np.uint32)


def check_requests(requests: Requests, config: ModelConfig) -> list[Request]:
    """Checks the requests and converts their token ids to int32.

    Args:
      requests: Pairs (prompt, answer) of token ids, on the host or on a device.
      config: The configuration of the model that scores them.

    Returns:
      The requests in their order, as numpy arrays.

    Raises:
      UserError: If the model has no MASK token, or if a request is malformed, has ids outside the model's vocabulary
        or has MASK in its answer. The message names the first such request.
    """
    if config.mask_id is None and not config.causal:
        raise UserError("the model does not say which token is MASK: set mask_id in its ModelConfig to score answers")
    checked = []
    for i, request in enumerate(requests):
        if not isinstance(request, Sequence) or len(request) != 2:
            raise UserError(f"request {i}: it must be a pair (prompt, answer)")
        prompt_T, answer_T = (
            _ids(name, i, ids, config.vocab_size) for name, ids in zip(("prompt", "answer"), request, strict=True)
        )
        if config.mask_id is not None and config.mask_id in answer_T:
            raise UserError(f"request {i}: the answer contains MASK (id {config.mask_id}), which has no likelihood")
        checked.append(Request(prompt_T, answer_T))
    return checked


def _ids(name: str, i: int, ids: Any, vocab_size: int) -> np.ndarray:
    try:
        ids_T = np.asarray(ids)
    except (TypeError, ValueError) as error:  # a ragged sequence
        raise UserError(f"request {i}: the {name} must be a sequence of token ids") from error
    if ids_T.ndim != 1 or (ids_T.size and ids_T.dtype.kind not in "iu"):
        raise UserError(
            f"request {i}: the {name} must be integer token ids of shape (T,), not {ids_T.dtype} of shape {ids_T.shape}"
        )
    if ids_T.size and not (0 <= ids_T.min() and ids_T.max() < vocab_size):
        raise UserError(
            f"request {i}: the {name} has ids from {ids_T.min()} to {ids_T.max()}, "
            f"but the model's vocabulary size is {vocab_size}"
        )
    return ids_T.astype(np.int32)


def check_settings(cfg_scale: float, batch_size: int | None) -> None:
    """Raises UserError if the guidance scale or the batch size is out of range."""
    if not 0 <= cfg_scale < math.inf:
        raise UserError(f"cfg_scale={cfg_scale}: it must be 0 (no guidance) or a positive number")
    if cfg_scale > LARGEST:
        raise UserError(f"cfg_scale={cfg_scale}: it must be at most {LARGEST:g}, or float32 overflows")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size}: it must be at least 1")


def padded_length(length: int) -> int:
    """Returns the length that a row of `length` tokens is padded to.

    Up to 128 tokens this is the next multiple of 16. Above 128 tokens it is the next multiple of one eighth of the
    smallest power of two that is not less than `length`.
    """
    step = max(SHORTEST, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def layout(requests: Sequence[Request], length: int) -> dict[str, np.ndarray]:
    """Lays out each request as one row.

    Args:
      requests: The requests, each of at most `length` tokens.
      length: The length that the rows are padded to.

    Returns:
      A batch with `tokens`, int32 (B, length), and with `prompt` and `answer`, int32 (B,): the number of tokens of
      each prompt and of each answer.
    """
    tokens_BT = np.zeros((len(requests), length), np.int32)
    for row_T, request in zip(tokens_BT, requests, strict=True):
        row_T[: request.length] = np.concatenate(request)
    prompt_B, answer_B = (np.array([len(request[part]) for request in requests], np.int32) for part in (0, 1))
    return {"tokens": tokens_BT, "prompt": prompt_B, "answer": answer_B}


def hidden(
    model: Transformer, canvas_BT: jax.Array, batch: dict[str, jax.Array], scale: jax.Array, guided: bool
) -> jax.Array:
    """Computes the hidden states of rows in which some tokens are masked.

    Args:
      model: The mask predictor.
      canvas_BT: int32, the tokens of the rows with MASK at the masked positions.
      batch: The rows as `layout` returns them.
      scale: The guidance scale w of Eq. 16. It is ignored unless `guided` is true.
      guided: Whether to apply classifier-free guidance.

    Returns:
      The hidden states (B, T, D).
    """
    real_B = batch["prompt"] + batch["answer"]
    if not guided:
        return model.trunk(canvas_BT, real_B)
    given_BT = jnp.arange(canvas_BT.shape[1]) < batch["prompt"][:, None]
    return guided_trunk(model, canvas_BT, given_BT, real_B, scale)


def in_batches(
    requests: Sequence[Request],
    request_N: np.ndarray,
    columns: Callable[[np.ndarray, int], dict[str, np.ndarray]],
    compute: Callable[[dict[str, jax.Array]], Any],
    batch_size: int | None,
) -> Iterator[tuple[np.ndarray, Any]]:
    """Runs all rows through `compute` in batches, longest rows first.

    Each batch is started before the results of the previous one are fetched, so that the devices do not wait.

    Args:
      requests: The requests as `check_requests` returns them.
      request_N: int, the index of the request that each row belongs to.
      columns: A function that takes row numbers and a length, and returns the arrays (B, ...) of these rows, padded to
        this length.
      compute: A function that takes these arrays, split over the mesh in use, and returns arrays (B, ...) that are
        replicated on every device.
      batch_size: The largest number of rows in a batch, over all devices. None means as many rows as fit into
        BATCH_TOKENS tokens (ACCELERATOR_TOKENS on accelerators) on each device. Every batch has at least one row per
        batch shard.

    Yields:
      The row numbers of a batch, and the results for these rows as numpy arrays.
    """
    before = None
    for rows_N, length, size in _batches(requests, request_N, batch_size):
        # Fill the batch up with copies of its first row; the results of the copies are dropped.
        filled_B = np.concatenate([rows_N, np.repeat(rows_N[:1], size - len(rows_N))])
        mesh_ = jax.sharding.get_mesh()
        mine = np.array(mesh.local_rows(mesh_, size))
        placed = mesh.place_batch(columns(filled_B[mine], length), mesh_, size)
        now = rows_N, compute(placed)
        if before is not None:
            yield _fetch(*before)
        before = now
    if before is not None:
        yield _fetch(*before)


def _fetch(rows_N: np.ndarray, computed: Any) -> tuple[np.ndarray, Any]:
    return rows_N, jax.tree.map(lambda x: np.asarray(x)[: len(rows_N)], computed)


def _batches(
    requests: Sequence[Request], request_N: np.ndarray, batch_size: int | None
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields the row numbers of each batch, its padded length, and the number of rows to fill it up to.

    All rows of a batch have the same padded length. Among these, rows with answers of similar length come together.
    """
    shards = mesh.batch_shards()
    platform = jax.sharding.get_mesh().devices.flat[0].platform
    padded_R = np.array([padded_length(max(request.length, 1)) for request in requests], np.int64)
    answer_R = np.array([len(request.answer_T) for request in requests], np.int64)
    order_N = np.lexsort((-answer_R[request_N], -padded_R[request_N]))
    for length in sorted(set(padded_R[request_N].tolist()), reverse=True):
        of_length_N = order_N[padded_R[request_N[order_N]] == length]
        if batch_size is None:
            most = 2 ** (max(1, BATCH_TOKENS.get(platform, ACCELERATOR_TOKENS) // length).bit_length() - 1)
        else:
            most = max(1, batch_size // shards)
        first = 0
        while first < len(of_length_N):
            rows_N, size = of_length_N[first : first + most * shards], most
            # Shrink the last batch by a power of four: this gives few different shapes, and few rows that only fill up.
            while size % 4 == 0 and size // 4 * shards >= len(rows_N):
                size //= 4
            yield rows_N, length, shards * size
            first += len(rows_N)
