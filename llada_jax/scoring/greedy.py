"""Whether a model, asked to answer greedily, gives exactly a certain answer.

Letters in names, beside those of model.py: C positions of a row that go through the head together.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.remasking import choose
from llada_jax.scoring.batching import SHORTEST, Requests, check_requests, check_settings, hidden, in_batches, layout


def greedy_matches(
    model: Transformer,
    requests: Requests,
    *,
    cfg_scale: float = 0.0,
    batch_size: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """Whether greedy generation gives exactly the answer: low_confidence, one token a step, all in one block.

    The same as comparing the answer with what `generate` makes of as many MASK tokens after the prompt, except
    that MASK tokens in the prompt stay. A row ends with its first token that differs. No mesh needs to be
    set; on a mesh the rows are split over its batch axes; in a run of several processes all make the same call.
    Without a prompt all positions are equally sure at first, and rounding decides: there it may differ from `generate`.

    Args:
      model: the mask predictor.
      requests: (prompt, answer) ids, on the host or a device; both may be empty. An empty answer matches.
      cfg_scale: w of Eq. 16; 0 = no guidance.
      batch_size: rows at most that go through the model together; None = what keeps the devices busy.
      report: told after each batch how many requests are decided.

    Returns:
      One bool for each request, in their order.

    Raises:
      UserError: ids beyond the vocabulary, MASK in an answer, an impossible setting.
    """
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
        # Most answers that differ do so at once: those left are gathered anew after 1, 2, 4 ... steps.
        while len(pending_N):
            stop, waiting = jax.device_put(np.int32(steps), P()), []
            compute = functools.partial(_steps, model, scale, stop, guided=cfg_scale > 0)
            for rows_B, (match_B, open_BT) in in_batches(checked, pending_N, columns, compute, batch_size):
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
) -> tuple[jax.Array, jax.Array]:
    """Up to `stop` reverse steps, fewer if all rows are decided before.

    Returns bool (B,), True = no token differed so far, and bool (B, T), True = still masked: whole on every device.
    """
    tokens_BT, config = batch["tokens"], model.config
    length = tokens_BT.shape[1]
    vocabulary = jnp.arange(config.vocab_size)
    allowed_V = (vocabulary != config.mask_id) & (vocabulary < (config.token_count or config.vocab_size))
    # loss_chunk says how many positions may have logits at once; a power of two divides every length.
    fitting = max(2, model.compute.loss_chunk * mesh.batch_shards() // len(tokens_BT))
    chunk = min(SHORTEST, 2 ** (fitting.bit_length() - 1))

    def step(carry):
        done, match_B, open_BT = carry
        h_BTD = hidden(model, jnp.where(open_BT, config.mask_id, tokens_BT), batch, scale, guided)
        # Masked positions first, in order: chunks without any are not computed.
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

        # argmax: among equals the first, which is the lowest position.
        masked_BT, wanted_BT = (jnp.take_along_axis(x, order_BT, axis=1) for x in (open_BT, tokens_BT))
        best_B = jnp.argmax(jnp.where(masked_BT, probability_BT, -jnp.inf), axis=1)
        is_best_BT = jnp.arange(length) == best_B[:, None]
        right_B = jnp.any(is_best_BT & (token_BT == wanted_BT), axis=1)
        position_B = jnp.sum(jnp.where(is_best_BT, order_BT, 0), axis=1)
        match_B &= right_B | ~open_BT.any(axis=1)
        return done + 1, match_B, open_BT & ((jnp.arange(length) != position_B[:, None]) | ~right_B[:, None])

    def undecided(carry):
        done, match_B, open_BT = carry
        return (done < stop) & jnp.any(match_B & open_BT.any(axis=1))

    start = jnp.int32(0), batch["answer"] > 0, batch["open"]
    _, match_B, open_BT = jax.lax.while_loop(undecided, step, start)
    return jax.reshard(match_B, P(None)), jax.reshard(open_BT, P(None, None))
