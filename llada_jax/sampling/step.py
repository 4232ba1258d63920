"""One reverse step: the active block of each row, the predictions in it, and which of them are kept.

The forward pass between these is the caller's part.

Letters in names, in addition to those of `model/transformer.py`: K slots of the active block, C slots of one chunk, N
positions for which there are hidden states.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llada_jax.config import SamplerConfig
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.canvas import Dials, Rows, put, take
from llada_jax.sampling.commit import RULES, SCHEDULE, Ranked
from llada_jax.sampling.plan import Plan, is_any, is_end
from llada_jax.sampling.remasking import LAST, REMASKING, Predictions, allowed, choose, entropies, gumbel
from llada_jax.sampling.truncation import truncate
from llada_jax.sampling.watching import Seen, likeliest, nothing

# Number of positions per row that go through the head at once, so that memory holds logits of (B, HEAD_CHUNK, V) only.
HEAD_CHUNK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """The slots of the active block of each row: those that are still masked first, in order, then all others."""

    index_BK: jax.Array  # int32: the index of the slot within the block
    position_BK: jax.Array  # int32: where in the canvas the slot is
    masked_BK: jax.Array  # bool: True for a slot that is still masked
    inside_BK: jax.Array  # bool: True for a slot of the block; the others only fill up the width


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Kept:
    """What `keep_the_best` has come to. Slots are in the order of their scores, the best first."""

    tokens_BT: jax.Array  # int32: the canvas
    finite: jax.Array  # bool scalar: whether all predictions were finite
    slot_BK: jax.Array  # int32: where in the canvas the slot is
    position_BK: jax.Array  # int32: the same where a prediction was kept; the length of the canvas for the others
    score_BK: jax.Array  # fp32: the scores of the predictions; -inf for slots without one
    seen: Seen | None  # what is told of the predictions, or None


def block_width(block_length: int, length: int) -> int:
    """Returns K: the number of slots per block, at most the length of the canvas, rounded up to whole chunks."""
    # At least 2, because JAX cannot tell how a slice of shape (1, 1) is split. Slots beyond the block are not masked.
    width = max(2, min(block_length, length))
    return width + -width % min(width, HEAD_CHUNK)


def active_block(rows: Rows, tokens_BT: jax.Array, plan: Plan, config: SamplerConfig) -> Block:
    """Returns the slots of the active block of each row."""
    length = tokens_BT.shape[1]
    width = block_width(config.block_length, length)
    index_BK = jnp.zeros_like(plan.block_B)[:, None] + jnp.arange(width, dtype=jnp.int32)
    slot_BK = plan.block_B[:, None] * config.block_length + index_BK
    position_BK = take(rows.order_BT, jnp.minimum(slot_BK, length - 1))
    inside_BK = (slot_BK < rows.masks_B[:, None]) & (index_BK < config.block_length)
    masked_BK = (take(tokens_BT, position_BK) == config.mask_id) & inside_BK
    # Put the slots that are still masked first, in order, so that chunks without masked slots need not be computed.
    first_BK = jnp.argsort(~masked_BK, axis=1, stable=True)
    return Block(*(take(x, first_BK) for x in (index_BK, position_BK, masked_BK, inside_BK)))


def slot_keys(rows: Rows, plan: Plan, index_BK: jax.Array) -> jax.Array:
    """Returns PRNG keys (B, K): one for each slot of a block, from the row, the block, the step and the slot only."""
    key_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.fold_in)(rows.key_B, plan.block_B), plan.inner_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_B, index_BK)


def predict(
    model: Transformer, logits_BCV: jax.Array, key_BC: jax.Array, dials: Dials, config: SamplerConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Predicts the tokens of some slots from their logits.

    Returns:
      The tokens, int32 (B, C); their scores, fp32 (B, C), NaN where the logits are not finite; and the entropies of the
      distributions, fp32 (B, C), which are zero if the settings do not need them.
    """
    vocabulary = jnp.arange(model.config.vocab_size)
    allowed_V = allowed(model.config, config.mask_id)
    absent_V = is_any(vocabulary, (config.eos_id, *config.end_ids)) if config.logits_eos_inf else None
    unsure_V = is_end(vocabulary, config) if config.confidence_eos_eot_inf else None
    key_BC2 = jax.vmap(jax.vmap(jax.random.split))(key_BC)
    noise_BCV, drawn_V = None, allowed_V
    if config.temperature:
        noise_BCV = dials.temperature * gumbel(key_BC2[:, :, 0], model.config.vocab_size)
        if config.top_k or config.top_p < 1:
            may_V = allowed_V if absent_V is None else allowed_V & ~absent_V
            kept_BCV = truncate(
                jnp.where(may_V, logits_BCV, -jnp.inf) / dials.temperature,
                dials.top_k if config.top_k else None,
                dials.top_p if config.top_p < 1 else None,
            )
            drawn_V = kept_BCV > -jnp.inf
    token_BC, probability_BC = choose(logits_BCV, noise_BCV, drawn_V, unsure_V, absent_V)
    uncounted_V = functools.reduce(jnp.logical_or, (x_V for x_V in (absent_V, unsure_V) if x_V is not None), False)
    counted_BCV = jnp.where(uncounted_V, -jnp.inf, logits_BCV)
    score_BC = REMASKING[config.remasking](Predictions(probability_BC, counted_BCV, allowed_V, key_BC2[:, :, 1]))
    if config.confidence_eos_eot_inf:
        score_BC = jnp.where(is_end(token_BC, config), LAST, score_BC)
    entropy_BC = entropies(counted_BCV) if config.commit == "entropy" else jnp.zeros_like(probability_BC)
    return token_BC, jnp.where(jnp.isnan(probability_BC), jnp.nan, score_BC), entropy_BC


def keep_the_best(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    plan: Plan,
    block: Block,
    h_BND: jax.Array,
    at_BK: jax.Array,
    dials: Dials,
    config: SamplerConfig,
    alternatives: int | None = None,
    most_B: jax.Array | None = None,
) -> Kept:
    """Predicts the masked tokens of the active blocks and keeps some of the predictions.

    Args:
      model: The mask predictor.
      rows: The rows.
      tokens_BT: int32, the canvas.
      plan: Where each row stands. Nothing is kept in a row whose count is 0.
      block: The active block of each row.
      h_BND: Hidden states before the head.
      at_BK: int32: the index along N of the hidden states of each slot of the block.
      dials: The traced settings.
      config: The other settings.
      alternatives: The number of most probable tokens to tell for each prediction. None tells nothing.
      most_B: int32, the largest number of predictions that are kept. None sets no limit.
    """
    length, width = tokens_BT.shape[1], at_BK.shape[1]
    chunk = min(width, HEAD_CHUNK)
    index_BK, position_BK, masked_BK, count_B = block.index_BK, block.position_BK, block.masked_BK, plan.count_B

    def predict_chunk(i, predicted):
        def part(x_BK):
            return jax.lax.dynamic_slice_in_dim(x_BK, i * chunk, chunk, axis=1)

        # Each slot of the block has its own key, so its noise does not depend on how slots are grouped into chunks.
        key_BC = slot_keys(rows, plan, part(index_BK))
        logits_BCV = model.logits(take(h_BND, part(at_BK)[:, :, None]))
        new = predict(model, logits_BCV, key_BC, dials, config)
        if alternatives is not None:
            new += likeliest(logits_BCV, new[0], allowed(model.config, config.mask_id), alternatives)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old_BK, new_BC, i * chunk, axis=1)
            for old_BK, new_BC in zip(predicted, new, strict=True)
        )

    nothing_BK = jnp.full_like(position_BK, -jnp.inf, dtype=jnp.float32)
    predicted = (jnp.zeros_like(position_BK), nothing_BK, jnp.zeros_like(nothing_BK))
    if alternatives is not None:
        predicted += nothing(position_BK, alternatives)
    if width == chunk:
        token_BK, score_BK, entropy_BK, *told = predict_chunk(0, predicted)
    else:
        chunks = -(-jnp.max(jnp.sum(masked_BK, axis=1, dtype=jnp.int32)) // chunk)
        token_BK, score_BK, entropy_BK, *told = jax.lax.fori_loop(0, chunks, predict_chunk, predicted)
    seen = Seen(position_BK, masked_BK & plan.going_B[:, None], score_BK, *told) if told else None

    finite = ~jnp.any(jnp.isnan(score_BK) & masked_BK)
    # The sort is stable, so among equal scores the lowest position stays. Slots that are not masked always come last.
    score_BK = jnp.where(masked_BK, score_BK, -jnp.inf)
    best_BK = jnp.argsort(-score_BK, axis=1, stable=True)
    token_BK, position_BK, score_BK = (take(x, best_BK) for x in (token_BK, position_BK, score_BK))
    kept_BK = jnp.arange(width) < count_B[:, None]
    if config.commit != SCHEDULE:
        entropy_BK, masked_BK = (take(x, best_BK) for x in (entropy_BK, masked_BK))
        passes_BK = RULES[config.commit].passes(Ranked(score_BK, entropy_BK, position_BK), dials.commit_bound)
        kept_BK |= passes_BK & masked_BK & (count_B[:, None] > 0)
    if most_B is not None:
        kept_BK &= jnp.arange(width) < most_B[:, None]
    # Predictions that are not kept get the position `length`, outside the canvas: they are dropped.
    kept_at_BK = jnp.where(kept_BK, position_BK, length)
    return Kept(put(tokens_BT, kept_at_BK, token_BK), finite, position_BK, kept_at_BK, score_BK, seen)
