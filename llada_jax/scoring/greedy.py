"""Tests whether greedy generation gives exactly a certain answer.

Letters in names, in addition to those of `model/transformer.py`: C positions of a row that go through the head
together.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import NonFinite
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.remasking import allowed, choose
from llada_jax.scoring.batching import SHORTEST, Requests, check_requests, check_settings, hidden, in_batches, layout
from llada_jax.scoring.next_token import exact


def greedy_matches(
    model: Transformer,
    requests: Requests,
    *,
    cfg_scale: float = 0.0,
    batch_size: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """Tests for each request whether greedy generation after its prompt gives exactly its answer.

    Greedy generation means low_confidence remasking, one token per step, and a single block. The result is the same
    as if `sampling.sampler.generate` filled as many MASK tokens after the prompt as the answer has tokens, and its
    output were compared with the answer, with two exceptions. MASK tokens in the prompt are not filled in. Without a
    prompt the model is equally confident at all positions in the first step, so that rounding decides, and the result
    may differ from that of `generate`. Of a causal model, it means the most probable token at each position.

    The computation of a row stops at its first token that differs. If no mesh is set, the mesh of the model's
    parameters is used. The rows are split over the batch axes of the mesh. In a run of several processes every process
    must make the same call.

    Args:
      model: The mask predictor.
      requests: Pairs (prompt, answer) of token ids, on the host or on a device. Both may be empty. An empty answer
        matches.
      cfg_scale: The guidance scale w of Eq. 16. 0 means no guidance.
      batch_size: The largest number of rows that go through the model together. None means as many as keep the devices
        busy.
      report: A function that is called after each batch with the number of requests that are decided so far.

    Returns:
      One bool per request, in the order of the requests.

    Raises:
      UserError: If a request has ids outside the vocabulary or MASK in its answer, or if a setting is out of range.
      NonFinite: If the output of the model is NaN or infinite where a token is masked.
    """
    if model.config.causal:
        return [match for _, match in exact(model, requests, cfg_scale, batch_size, report)]
    checked = check_requests(requests, model.config)
    check_settings(cfg_scale, batch_size)
    match_R = np.ones(len(checked), bool)
    open_R = [np.ones(len(request.answer_T), bool) for request in checked]
    pending_N = np.flatnonzero([len(request.answer_T) > 0 for request in checked])
    decided = len(checked) - len(pending_N)

    def columns(rows_B: np.ndarray, length: int) -> dict[str, np.ndarray]:
        batch = layout([checked[i] for i in pending_N[rows_B]], length)
        open_BT = np.zeros((len(rows_B), length), bool)
        for row_T, i in zip(open_BT, pending_N[rows_B], strict=True):
            row_T[len(checked[i].prompt_T) : checked[i].length] = open_R[i]
        return batch | {"open": open_BT}

    with mesh.mesh_of(model.embedding[...]):
        scale, steps = jax.device_put(np.float32(cfg_scale), P()), 1
        # Most answers that differ do so in their first step. The undecided rows are therefore gathered into new batches
        # after rounds of 1, 2, 4, ... steps.
        while len(pending_N):
            stop, waiting = jax.device_put(np.int32(steps), P()), []
            compute = functools.partial(_steps, model, scale, stop, guided=cfg_scale > 0)
            for rows_B, (match_B, open_BT, finite_B) in in_batches(checked, pending_N, columns, compute, batch_size):
                if not finite_B.all():
                    raise NonFinite
                for i, match, open_T in zip(pending_N[rows_B].tolist(), match_B, open_BT, strict=True):
                    match_R[i] = match
                    open_R[i] = open_T[len(checked[i].prompt_T) : checked[i].length]
                    if match and open_R[i].any():
                        waiting.append(i)
                    else:
                        decided += 1
                report(decided)
            pending_N, steps = np.array(waiting, np.int64), 2 * steps
    return match_R.tolist()


@functools.partial(jax.jit, static_argnames="guided")
def _steps(
    model: Transformer, scale: jax.Array, stop: jax.Array, batch: dict[str, jax.Array], *, guided: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes up to `stop` reverse steps, and fewer if all rows are decided earlier.

    Args:
      model: The mask predictor.
      scale: The guidance scale w of Eq. 16.
      stop: int32, the largest number of steps.
      batch: The rows as `layout` returns them, and `open`, bool (B, T), True where a token is still masked.
      guided: Whether to apply classifier-free guidance.

    Returns:
      bool (B,), True if no token of the row has differed so far; bool (B, T), True where a token is still masked; and
      bool (B,), True if the output of the model was finite at all masked tokens. All are replicated on every device.
    """
    tokens_BT, config = batch["tokens"], model.config
    length = tokens_BT.shape[1]
    allowed_V = allowed(config, config.mask_id)
    # loss_chunk limits how many positions have logits at once on each device. A chunk is a power of two of at most
    # SHORTEST positions, so that it divides every padded length.
    fitting = max(2, model.compute.loss_chunk * mesh.batch_shards() // len(tokens_BT))
    chunk = min(SHORTEST, 2 ** (fitting.bit_length() - 1))

    def step(carry):
        done, match_B, open_BT, finite_B = carry
        h_BTD = hidden(model, jnp.where(open_BT, config.mask_id, tokens_BT), batch, scale, guided)
        # Put the masked positions first, in ascending order: chunks without any masked position are not computed.
        order_BT = jnp.argsort(~open_BT, axis=1, stable=True)

        def predict(i, predicted):
            position_BC = jax.lax.dynamic_slice_in_dim(order_BT, i * chunk, chunk, axis=1)
            h_BCD = jnp.take_along_axis(h_BTD, position_BC[:, :, None], axis=1)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(old_BT, new_BC, i * chunk, axis=1)
                for old_BT, new_BC in zip(predicted, choose(model.logits(h_BCD), None, allowed_V), strict=True)
            )

        predicted = jnp.zeros_like(tokens_BT), jnp.zeros_like(tokens_BT, jnp.float32)
        chunks = -(-jnp.max(jnp.sum(open_BT, axis=1, dtype=jnp.int32)) // chunk)
        token_BT, probability_BT = jax.lax.fori_loop(0, chunks, predict, predicted)

        # argmax takes the first of several equal values, which here is the one at the lowest position.
        masked_BT, wanted_BT = (jnp.take_along_axis(x, order_BT, axis=1) for x in (open_BT, tokens_BT))
        finite_B &= ~jnp.any(masked_BT & jnp.isnan(probability_BT), axis=1)
        best_B = jnp.argmax(jnp.where(masked_BT, probability_BT, -jnp.inf), axis=1)
        is_best_BT = jnp.arange(length) == best_B[:, None]
        right_B = jnp.any(is_best_BT & (token_BT == wanted_BT), axis=1)
        position_B = jnp.sum(jnp.where(is_best_BT, order_BT, 0), axis=1)
        match_B &= right_B | ~open_BT.any(axis=1)
        open_BT = open_BT & ((jnp.arange(length) != position_B[:, None]) | ~right_B[:, None])
        return done + 1, match_B, open_BT, finite_B

    def undecided(carry):
        done, match_B, open_BT, _ = carry
        return (done < stop) & jnp.any(match_B & open_BT.any(axis=1))

    start = jnp.int32(0), batch["answer"] > 0, batch["open"], batch["answer"] >= 0
    _, match_B, open_BT, finite_B = jax.lax.while_loop(undecided, step, start)
    return jax.reshard(match_B, P(None)), jax.reshard(open_BT, P(None, None)), jax.reshard(finite_B, P(None))
