"""Scores answers with an autoregressive model, exactly: log p(answer | prompt) is the sum over its next tokens.

Letters in names, in addition to those of `model/transformer.py`: C positions of a row that go through the head
together.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import NonFinite, UserError
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.remasking import allowed, choose
from llada_jax.scoring.batching import (
    SHORTEST,
    Request,
    Requests,
    check_requests,
    check_settings,
    in_batches,
    layout,
)


def exact(
    model: Transformer,
    requests: Requests,
    cfg_scale: float,
    batch_size: int | None,
    report: Callable[[int], None],
) -> list[tuple[float, bool]]:
    """Returns for each request log p(answer | prompt) in nats, and whether each of its tokens is the most probable one.

    An answer without a prompt follows EOS. An empty answer has the likelihood 1 and is a match.

    Args:
      model: A causal model.
      requests, batch_size, report: As for `likelihood.log_likelihoods`.
      cfg_scale: The guidance scale, which must be 0.

    Raises:
      UserError: As `likelihood.log_likelihoods`.
      NonFinite: If the output of the model is NaN or infinite where a token of an answer is predicted.
    """
    checked = check_requests(requests, model.config)
    check_settings(cfg_scale, batch_size)
    if cfg_scale:
        raise UserError(
            f"cfg_scale={cfg_scale}: this model is causal, but guidance compares with a prompt of MASK: leave it out"
        )
    found: list[tuple[float, bool]] = [(0.0, True)] * len(checked)
    scored_N = np.flatnonzero([len(request.answer_T) > 0 for request in checked])
    after = [_after_something(request, model.config.eos_id) for request in checked]
    done = len(checked) - len(scored_N)

    def columns(rows_B: np.ndarray, length: int) -> dict[str, np.ndarray]:
        return layout([after[i] for i in scored_N[rows_B]], length)

    with mesh.mesh_of(model.embedding[...]):
        for rows_B, (nats_B, match_B) in in_batches(
            after, scored_N, columns, lambda batch: _rows(model, batch), batch_size
        ):
            for i, nats, match in zip(scored_N[rows_B].tolist(), nats_B.tolist(), match_B.tolist(), strict=True):
                if not math.isfinite(nats):
                    raise NonFinite
                found[i] = -nats, match
            done += len(rows_B)
            report(done)
    return found


def _after_something(request: Request, eos_id: int | None) -> Request:
    """Returns the request with a prompt: EOS, the end of the text before it, if it has none."""
    if len(request.prompt_T) or not len(request.answer_T):
        return request
    if eos_id is None:
        raise UserError("a prompt is empty, and the model does not say which token is EOS: give each prompt a token")
    return Request(np.array([eos_id], np.int32), request.answer_T)


@jax.jit
def _rows(model: Transformer, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the nats of each row's answer, fp32 (B,), and whether it is the greedy one, bool (B,), on every device.

    The nats are NaN where the output of the model is not finite.
    """
    tokens_BT, prompt_B, answer_B = batch["tokens"], batch["prompt"], batch["answer"]
    h_BTD = model.trunk(tokens_BT, prompt_B + answer_B)
    allowed_V, vocabulary = allowed(model.config, model.config.mask_id), jnp.arange(model.config.vocab_size)
    # loss_chunk limits how many positions have logits at once on each device. A chunk divides every padded length.
    fitting = max(2, model.compute.loss_chunk * mesh.batch_shards() // len(tokens_BT))
    chunk = min(SHORTEST, 2 ** (fitting.bit_length() - 1))

    def score(i, carry):
        nats_B, match_B = carry
        # The token at position t is predicted at position t - 1; the first one of the answer, at the prompt's last.
        at_BC = (prompt_B - 1)[:, None] + i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        inside_BC = at_BC < (prompt_B + answer_B - 1)[:, None]
        at_BC = jnp.where(inside_BC, at_BC, 0)
        logits_BCV = model.logits(jnp.take_along_axis(h_BTD, at_BC[:, :, None], axis=1))
        target_BC = jnp.take_along_axis(tokens_BT, at_BC + 1, axis=1)
        token_BC, probability_BC = choose(logits_BCV, None, allowed_V)
        # The logit is found by a masked sum, because a vocabulary that is split over devices does not allow a lookup.
        logit_BC = jnp.sum(jnp.where(vocabulary == target_BC[..., None], logits_BCV, 0.0), axis=-1)
        max_BC = jnp.max(logits_BCV, axis=-1)
        nats_BC = jnp.log(jnp.sum(jnp.exp(logits_BCV - max_BC[..., None]), axis=-1)) + max_BC - logit_BC
        nats_BC = jnp.where(jnp.isnan(probability_BC), jnp.nan, nats_BC)
        nats_B += jnp.sum(jnp.where(inside_BC, nats_BC, 0.0), axis=1)
        return nats_B, match_B & jnp.all((token_BC == target_BC) | ~inside_BC, axis=1)

    chunks = -(-jnp.max(answer_B) // chunk)
    nats_B, match_B = jax.lax.fori_loop(0, chunks, score, (answer_B * 0.0, answer_B > 0))
    return jax.reshard(nats_B, P(None)), jax.reshard(match_B, P(None))
