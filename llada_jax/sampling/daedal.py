"""Finds the length of each row's continuation while it is written, by the rule of DAEDAL (arXiv 2508.00819).

What shows the model that there is room enough is its own confidence in EOS at the end of the row. To begin with there
are FIRST MASK tokens. As long as the confidence is below ENOUGH_TO_WRITE, a pass only appends STRIDE more. Then the row
gets CHECKED / 2 tokens of EOS behind them, and is written in blocks, from left to right. A step keeps the predictions
that `commit` lets pass. Where the worst of the others is below LOW, the text needs more room: as long as the confidence
in EOS is below ENOUGH_TO_KEEP, the step puts STRIDE MASK tokens in its place, and all that follows moves to the right.

The canvas has room for the largest length from the start, with EOS behind the row's own, which nothing attends to.
Everything is decided row by row, so rows of one batch may have different lengths and be in different parts of this.

Letters in names, in addition to those of `model/transformer.py`: K slots of the active block, C positions of one chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llada_jax.config import SamplerConfig
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.cache import SEEN, narrowest, widths
from llada_jax.sampling.canvas import Dials, Rows, take
from llada_jax.sampling.guidance import guided_trunk
from llada_jax.sampling.plan import Plan, is_end
from llada_jax.sampling.step import HEAD_CHUNK, Block, Kept, block_width, keep_the_best
from llada_jax.sampling.watching import Seen

# The settings of the published code, in tokens and probabilities. Its bound for what is kept is that of `commit`.
FIRST, STRIDE, CHECKED = 64, 8, 32
ENOUGH_TO_WRITE, LOW, ENOUGH_TO_KEEP = 0.5, 0.1, 0.9


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Extent:
    """How far each row goes. Positions count from its first real token."""

    length_B: jax.Array  # int32: the number of tokens of the continuation
    at_B: jax.Array  # int32: the position where the active block begins
    writing_B: jax.Array  # bool: whether the first length has been found


def _start(rows: Rows) -> jax.Array:
    """Returns int32 (B,): the position of the first token of the continuation."""
    # Of a batch of one row, JAX cannot tell how a slice with one column is split, but it can of a sum.
    return jnp.sum(jnp.where(jnp.arange(rows.order_BT.shape[1]) == 0, rows.order_BT, 0), axis=1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames="eos_id")
def begin(rows: Rows, tokens_BT: jax.Array, eos_id: int) -> tuple[jax.Array, Extent]:
    """Returns the canvas and the extent before the first pass.

    Args:
      rows: The rows.
      tokens_BT: int32, the canvas with as many MASK tokens behind the prompts as there may be.
      eos_id: The id of EOS.
    """
    length_B, start_B = jnp.minimum(rows.masks_B, FIRST), _start(rows)
    slot_BT = jnp.arange(tokens_BT.shape[1]) - start_B[:, None]
    behind_BT = (slot_BT >= length_B[:, None]) & (slot_BT < rows.masks_B[:, None])
    return jnp.where(behind_BT, eos_id, tokens_BT), Extent(length_B, start_B, jnp.zeros_like(start_B, bool))


def plan(rows: Rows, tokens_BT: jax.Array, extent: Extent, steps_B: jax.Array, config: SamplerConfig) -> Plan:
    """Returns where each row stands; no prediction is kept in a row whose first length is not found.

    Args:
      rows: The rows.
      tokens_BT: int32, the canvas.
      extent: How far the rows go.
      steps_B: int32, the number of passes that each row has taken, of either kind.
      config: The settings of the sampler.
    """
    start_B = _start(rows)
    going_B = (rows.masks_B > 0) & (~extent.writing_B | (extent.at_B < start_B + extent.length_B))
    if config.stop_at_end:
        position_T = jnp.arange(tokens_BT.shape[1])
        done_BT = (position_T >= start_B[:, None]) & (position_T < extent.at_B[:, None])
        going_B &= ~jnp.any(is_end(tokens_BT, config) & done_BT, axis=1)
    block_B = (extent.at_B - start_B) // config.block_length
    return Plan(block_B, steps_B, (going_B & extent.writing_B).astype(jnp.int32), going_B)


def step(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    extent: Extent,
    now: Plan,
    dials: Dials,
    config: SamplerConfig,
    alternatives: int | None = None,
) -> tuple[jax.Array, Extent, jax.Array, Seen | None]:
    """Takes one pass in every row that is not finished.

    Args:
      model: The mask predictor.
      rows: The rows.
      tokens_BT: int32, the canvas.
      extent: How far the rows go.
      now: Where the rows stand.
      dials: The traced settings.
      config: The other settings.
      alternatives: The number of most probable tokens to tell for each prediction. None tells nothing.

    Returns:
      The canvas; how far the rows go; bool (), whether all that was predicted was finite; and what is told of the
      predictions, at the positions that they have after the step.
    """
    start_B, limit_B = _start(rows), rows.masks_B
    h_BTD = _hidden(model, rows, tokens_BT, extent, now, dials, config)
    block = _active_block(rows, tokens_BT, extent, config)
    kept = keep_the_best(model, rows, tokens_BT, now, block, h_BTD, block.position_BK, dials, config, alternatives)
    worst_B, is_low_B = _worst(kept, tokens_BT.shape[1])
    may_grow_B = now.going_B & (extent.length_B < limit_B)
    doubtful_B = may_grow_B & extent.writing_B & is_low_B
    asking_B = now.going_B & ~extent.writing_B
    sure_B, finite = _end_confidence(
        model, h_BTD, start_B, start_B + extent.length_B, asking_B | doubtful_B, config.eos_id
    )

    longer_B = asking_B & may_grow_B & (sure_B < ENOUGH_TO_WRITE)
    ready_B = asking_B & ~longer_B
    split_B = doubtful_B & (sure_B < ENOUGH_TO_KEEP)
    more_B = jnp.where(longer_B, STRIDE, 0) + jnp.where(ready_B, CHECKED // 2, 0) + jnp.where(split_B, STRIDE - 1, 0)
    length_B = jnp.minimum(extent.length_B + more_B, limit_B)

    # Where the row gets longer, its last tokens are EOS already: what stands behind a row.
    slot_BT = jnp.arange(tokens_BT.shape[1]) - start_B[:, None]
    appended_BT = longer_B[:, None] & (slot_BT >= extent.length_B[:, None]) & (slot_BT < length_B[:, None])
    tokens_BT = jnp.where(appended_BT, config.mask_id, kept.tokens_BT)
    tokens_BT = _inserted(tokens_BT, jnp.where(split_B, worst_B, tokens_BT.shape[1]), start_B + limit_B, config.mask_id)
    seen = kept.seen
    if seen is not None:
        moved_BK = split_B[:, None] & (seen.position_BK > worst_B[:, None])
        position_BK = seen.position_BK + jnp.where(moved_BK, STRIDE - 1, 0)
        there_BK = position_BK < (start_B + limit_B)[:, None]
        seen = seen._replace(position_BK=jnp.where(there_BK, position_BK, 0), masked_BK=seen.masked_BK & there_BK)
    at_B = _advanced(tokens_BT, extent.at_B, start_B + length_B, config)
    return tokens_BT, Extent(length_B, at_B, extent.writing_B | ready_B), kept.finite & finite, seen


def _active_block(rows: Rows, tokens_BT: jax.Array, extent: Extent, config: SamplerConfig) -> Block:
    """Returns the slots of the active blocks; in a row whose first length is not found, none is masked."""
    length = tokens_BT.shape[1]
    width = block_width(config.block_length, length)
    index_BK = jnp.zeros_like(extent.at_B)[:, None] + jnp.arange(width, dtype=jnp.int32)
    position_BK = extent.at_B[:, None] + index_BK
    end_B = jnp.minimum(extent.at_B + min(config.block_length, length), _start(rows) + extent.length_B)
    inside_BK = (position_BK < end_B[:, None]) & extent.writing_B[:, None]
    position_BK = jnp.minimum(position_BK, length - 1)
    masked_BK = (take(tokens_BT, position_BK) == config.mask_id) & inside_BK
    first_BK = jnp.argsort(~masked_BK, axis=1, stable=True)
    return Block(*(take(x, first_BK) for x in (index_BK, position_BK, masked_BK, inside_BK)))


def _hidden(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    extent: Extent,
    now: Plan,
    dials: Dials,
    config: SamplerConfig,
) -> jax.Array:
    """Returns the hidden states (B, T, D) before the head; those behind the longest row are zeros.

    As published, there is no guidance as long as the first length is not found.
    """
    length, end_B = tokens_BT.shape[1], _start(rows) + extent.length_B
    real_BT = jnp.arange(length) < end_B[:, None]
    if rows.real_BT is not None:
        real_BT &= rows.real_BT
    scale_B11 = jnp.where(extent.writing_B, dials.cfg_scale, 0.0)[:, None, None]

    def run(width):
        tokens_BN, real_BN = tokens_BT[:, :width], real_BT[:, :width]
        if rows.given_BT is None:
            h_BND = model.trunk(tokens_BN, real_BN)
        else:
            h_BND = guided_trunk(model, tokens_BN, rows.given_BT[:, :width], real_BN, scale_B11, config.mask_id)
        return jnp.pad(h_BND, ((0, 0), (0, length - width), (0, 0)))

    sizes = [(width,) for width in widths(length, min(config.block_length, length), SEEN)]
    return narrowest(run, sizes, [jnp.max(jnp.where(now.going_B, end_B, 0))])


def _worst(kept: Kept, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns the position of the worst prediction that is not kept, int32 (B,), and whether its score is below LOW."""
    left_BK = (kept.score_BK > -jnp.inf) & (kept.position_BK == length)
    # The scores are descending, so the last of these slots has the lowest.
    last_B1 = jnp.maximum(jnp.max(jnp.where(left_BK, jnp.arange(left_BK.shape[1]), -1), axis=1, keepdims=True), 0)
    position_B1, score_B1, left_B1 = (take(x, last_B1) for x in (kept.slot_BK, kept.score_BK, left_BK))
    return jnp.max(position_B1, axis=1), jnp.any(left_B1 & (score_B1 < LOW), axis=1)


def _end_confidence(
    model: Transformer, h_BTD: jax.Array, start_B: jax.Array, end_B: jax.Array, wanted_B: jax.Array, eos_id: int
) -> tuple[jax.Array, jax.Array]:
    """Returns how sure the model is of EOS at the end of each row.

    Of the positions where EOS is the most probable token, these are the last CHECKED: the sum of its probabilities
    there, divided by CHECKED even if there are fewer.

    Args:
      model: The mask predictor.
      h_BTD: The hidden states before the head.
      start_B: int32, the first position to look at.
      end_B: int32, the position behind the last.
      wanted_B: bool, the rows to look at. The confidence of another row means nothing.
      eos_id: The id of EOS.

    Returns:
      The confidence, fp32 (B,), and bool (), whether all logits that were looked at are finite.
    """
    chunk = min(HEAD_CHUNK, h_BTD.shape[1])
    is_eos_V = jnp.arange(model.config.vocab_size) == eos_id

    def goes_on(carry):
        done, found_B, _, finite = carry
        return finite & jnp.any(wanted_B & (found_B < CHECKED) & (end_B - done > start_B))

    def look(carry):
        done, found_B, sum_B, finite = carry
        position_BC = end_B[:, None] - 1 - done - jnp.arange(chunk, dtype=jnp.int32)
        inside_BC = (position_BC >= start_B[:, None]) & wanted_B[:, None]
        logits_BCV = model.logits(take(h_BTD, jnp.maximum(position_BC, 0)[:, :, None]))
        best_BC = jnp.max(logits_BCV, axis=-1)
        eos_BC = jnp.sum(jnp.where(is_eos_V, logits_BCV, 0.0), axis=-1)
        probability_BC = jnp.exp(eos_BC - best_BC) / jnp.sum(jnp.exp(logits_BCV - best_BC[..., None]), axis=-1)
        likely_BC = inside_BC & (eos_BC >= best_BC)
        rank_BC = found_B[:, None] + jnp.cumsum(likely_BC, axis=1, dtype=jnp.int32)
        counted_BC = likely_BC & (rank_BC <= CHECKED)
        finite &= jnp.all(jnp.isfinite(logits_BCV) | ~inside_BC[..., None])
        sum_B += jnp.sum(jnp.where(counted_BC, probability_BC, 0.0), axis=1)
        return done + chunk, found_B + jnp.sum(counted_BC, axis=1, dtype=jnp.int32), sum_B, finite

    nothing_B = jnp.zeros_like(start_B)
    carry = jnp.int32(0), nothing_B, nothing_B.astype(jnp.float32), jnp.bool_(True)
    _, _, sum_B, finite = jax.lax.while_loop(goes_on, look, carry)
    return sum_B / CHECKED, finite


def _inserted(tokens_BT: jax.Array, at_B: jax.Array, end_B: jax.Array, mask_id: int) -> jax.Array:
    """Returns the canvas with STRIDE MASK tokens in place of one, and what follows moved, up to the end of its room.

    Args:
      tokens_BT: int32, the canvas.
      at_B: int32, the position of that token; the length of the canvas for a row that stays as it is.
      end_B: int32, the position behind the room for the row's tokens.
      mask_id: The id of MASK.
    """
    position_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    behind_BT = (position_T > at_B[:, None]) & (position_T < end_B[:, None])
    moved_BT = take(tokens_BT, jnp.maximum(position_T - jnp.where(behind_BT, STRIDE - 1, 0), 0))
    return jnp.where(behind_BT & (position_T < at_B[:, None] + STRIDE), mask_id, moved_BT)


def _advanced(tokens_BT: jax.Array, at_B: jax.Array, end_B: jax.Array, config: SamplerConfig) -> jax.Array:
    """Returns int32 (B,): where the first block with a MASK token begins, or a position behind the row's last token."""
    length = tokens_BT.shape[1]
    position_T, block_length = jnp.arange(length, dtype=jnp.int32), min(config.block_length, length)
    masked_BT = (tokens_BT == config.mask_id) & (position_T >= at_B[:, None]) & (position_T < end_B[:, None])
    left_B = jnp.min(jnp.where(masked_BT, position_T, end_B[:, None]), axis=1) - at_B
    blocks_B = jnp.where(jnp.any(masked_BT, axis=1), left_B // block_length, -(-left_B // block_length))
    return at_B + jnp.maximum(blocks_B, 0) * block_length
