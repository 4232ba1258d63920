"""Requests (prompt, answer) laid out as rows of like length, so that few programs are compiled for all of them.

A row is [prompt | answer | padding]. Letters in names, beside those of model.py: N rows of all requests.
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

SHORTEST = 16  # tokens: lengths are multiples of this, longer ones of larger steps
# Tokens of a batch on each device: enough to keep it busy. A CPU is so with few, and its caches are small.
BATCH_TOKENS = {"cpu": 2048}
ACCELERATOR_TOKENS = 16384
# Positions that go through the head together: of an answer's tokens few are masked, and a chunk is computed whole.
HEAD_CHUNK = 128

Requests = Sequence[tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]]


class Request(NamedTuple):
    """A prompt and the answer that is judged."""

    prompt_T: np.ndarray  # int32, may be empty
    answer_T: np.ndarray  # int32, may be empty

    @property
    def length(self) -> int:
        return len(self.prompt_T) + len(self.answer_T)

    @property
    def digest(self) -> np.ndarray:
        """uint32 (2,): a hash of the tokens."""
        content = np.concatenate([np.int32([len(self.prompt_T)]), self.prompt_T, self.answer_T]).astype("<i4")
        return np.frombuffer(hashlib.blake2b(content.tobytes(), digest_size=8).digest(), "<u4").astype(np.uint32)


def check_requests(requests: Requests, config: ModelConfig) -> list[Request]:
    """The requests as int32 ids. UserError names the first that is none, or that this model cannot judge."""
    if config.mask_id is None:
        raise UserError("the model does not say which token is MASK: answers cannot be judged")
    checked = []
    for i, request in enumerate(requests):
        if not isinstance(request, Sequence) or len(request) != 2:
            raise UserError(f"request {i}: it must be a pair (prompt, answer)")
        prompt_T, answer_T = (
            _ids(name, i, ids, config.vocab_size) for name, ids in zip(("prompt", "answer"), request, strict=True)
        )
        if config.mask_id in answer_T:
            raise UserError(f"request {i}: MASK (id {config.mask_id}) in the answer: it has no likelihood")
        checked.append(Request(prompt_T, answer_T))
    return checked


def _ids(name: str, i: int, ids: Any, vocab_size: int) -> np.ndarray:
    try:
        ids_T = np.asarray(ids)
    except (TypeError, ValueError) as error:  # ragged
        raise UserError(f"request {i}: the {name} must be a sequence of ids") from error
    if ids_T.ndim != 1 or (ids_T.size and ids_T.dtype.kind not in "iu"):
        raise UserError(f"request {i}: the {name} must be ids of shape (T,), not {ids_T.dtype} of shape {ids_T.shape}")
    if ids_T.size and not (0 <= ids_T.min() and ids_T.max() < vocab_size):
        raise UserError(
            f"request {i}: the {name} has ids from {ids_T.min()} to {ids_T.max()}, "
            f"the model's vocabulary is {vocab_size}"
        )
    return ids_T.astype(np.int32)


def check_settings(cfg_scale: float, batch_size: int | None) -> None:
    """UserError if guidance or the number of rows is impossible."""
    if not 0 <= cfg_scale < math.inf:
        raise UserError(f"cfg_scale={cfg_scale}: it must be 0 (no guidance) or a positive number")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size}: it must be at least 1")


def padded_length(length: int) -> int:
    """What a row of `length` tokens is filled up to: a multiple of 16, beyond 128 of an eighth of a power of two."""
    step = max(SHORTEST, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def layout(requests: Sequence[Request], length: int) -> dict[str, np.ndarray]:
    """Rows of the requests: `tokens` int32 (B, length), `prompt` and `answer` int32 (B,), the tokens of each."""
    tokens_BT = np.zeros((len(requests), length), np.int32)
    for row_T, request in zip(tokens_BT, requests, strict=True):
        row_T[: request.length] = np.concatenate(request)
    prompt_B, answer_B = (np.array([len(request[part]) for request in requests], np.int32) for part in (0, 1))
    return {"tokens": tokens_BT, "prompt": prompt_B, "answer": answer_B}


def hidden(
    model: Transformer, canvas_BT: jax.Array, batch: dict[str, jax.Array], scale: jax.Array, guided: bool
) -> jax.Array:
    """Hidden states (B, T, D) of the rows of `layout`, with some of their tokens masked; guided by `scale` if so."""
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
    """Runs all rows through `compute`, the longest first, and does not wait for a batch before the next is started.

    Args:
      requests: as `check_requests` gives them.
      request_N: int, the request that each row belongs to.
      columns: the arrays (B, ...) of the rows with these numbers, filled up to this length.
      compute: of these arrays, split over the mesh in use, arrays (B, ...) that are whole on every device.
      batch_size: rows at most in a batch, over all devices; None = as many as have BATCH_TOKENS tokens.

    Yields:
      Row numbers, and what was computed of them as numpy arrays.
    """
    before = None
    for rows_N, length, size in _batches(requests, request_N, batch_size):
        # Filled up with its first row, the results of which are dropped.
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
    """(row numbers, length, rows to fill them up to) of each batch. Of each length, rows of like answers together."""
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
            # The last batch is a power of four smaller: few shapes, little that is computed in vain.
            while size % 4 == 0 and size // 4 * shards >= len(rows_N):
                size //= 4
            yield rows_N, length, shards * size
            first += len(rows_N)
