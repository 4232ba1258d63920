"""Says where each row stands: its active block, and how many tokens the next reverse step keeps at least."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llada_jax.config import SamplerConfig
from llada_jax.sampling.canvas import Rows, take
from llada_jax.sampling.commit import SCHEDULE, progress
from llada_jax.sampling.remasking import Place, place, schedule
from llada_jax.sampling.settings import NONE, REMDM


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pace:
    """How many tokens of the active block a schedule wants to be visible before the step and after it."""

    tokens_B: jax.Array  # int32: the number of MASK tokens of the block
    before_B: jax.Array  # int32: the number that is visible before the step
    after_B: jax.Array  # int32: the number that is visible after it
    looping_B: jax.Array  # bool: whether the step belongs to the middle part of remdm_loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plan:
    """Where each row stands before a reverse step."""

    block_B: jax.Array  # int32: the index of the active block
    inner_B: jax.Array  # int32: the index within that block, from which the noise is made
    count_B: jax.Array  # int32: the number of predictions that are kept at least; 0 for a row that is finished
    going_B: jax.Array  # bool: whether the row takes a further step
    pace: Pace | None = None  # only for the rules that take tokens back along a schedule


def is_end(ids: jax.Array, config: SamplerConfig) -> jax.Array:
    """Returns bool of the shape of ids, True for every id that ends a text: EOS, end of turn, and end_ids."""
    return is_any(ids, ends(config))


def is_any(ids: jax.Array, wanted: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.logical_or, (ids == one for one in wanted))


def ends(config: SamplerConfig) -> tuple[int, ...]:
    return tuple(i for i in (config.eos_id, config.eot_id, *config.end_ids) if i is not None)


def plan(rows: Rows, tokens_BT: jax.Array, steps_B: jax.Array, steps: jax.Array, config: SamplerConfig) -> Plan:
    """Returns where each row stands, so that a row that needs no further block takes no further step.

    Args:
      rows: The rows.
      tokens_BT: int32, the canvas.
      steps_B: int32, the number of reverse steps that each row has taken.
      steps: int32 scalar, the number of reverse steps of the schedule.
      config: The settings of the sampler.
    """
    slot_T, in_order_BT = jnp.arange(tokens_BT.shape[1]), None
    if config.commit != SCHEDULE or config.stop_at_end:
        in_order_BT = take(tokens_BT, rows.order_BT)
    pace = None
    if config.revoke in REMDM:
        at = place(rows.masks_B, steps, config.block_length, steps_B, skip=False)
        pace = _pace(at, config.revoke)
        block_B, inner_B, count_B = at.block_B, at.inner_B, pace.after_B - pace.before_B
        going_B = (steps_B < at.total_B) & (rows.masks_B > 0)
    elif config.commit == SCHEDULE:
        block_B, inner_B, count_B, _ = schedule(rows.masks_B, steps, config.block_length, steps_B)
        going_B = count_B > 0
    else:
        masked_BT = (in_order_BT == config.mask_id) & (slot_T < rows.masks_B[:, None])
        block_B, inner_B, count_B = progress(masked_BT, rows.masks_B, config.block_length)
        going_B = count_B > 0
        if config.revoke != NONE:
            inner_B = steps_B  # the number of visible tokens may come again, but noise must not
    if config.stop_at_end:
        # Look for an end only among the appended tokens of finished blocks. The MASK tokens of the prompt come first.
        look_BT = (slot_T >= rows.own_B[:, None]) & (slot_T < (block_B * config.block_length)[:, None])
        ended_B = jnp.any(is_end(in_order_BT, config) & look_BT, axis=1)
        going_B &= ~ended_B
    return Plan(block_B, inner_B, jnp.where(going_B, count_B, 0), going_B, pace)


def _pace(at: Place, rule: str) -> Pace:
    """Returns what a schedule wants; `settings.LARGEST_PACE` keeps the products below from overflowing."""
    tokens_B, steps_B = at.tokens_B, at.steps_B

    def visible(step_B):
        left_B = steps_B - step_B
        if rule == "remdm_loop":
            # As published, 90 % are visible while the time, which falls from 1 to 0, is between 0.55 and 0.05.
            rising_B, finishing_B = 2 * step_B * tokens_B // steps_B, tokens_B - 2 * left_B * tokens_B // steps_B
            looping_B = jnp.where(20 * left_B > steps_B, 9 * tokens_B // 10, finishing_B)
            return jnp.where(20 * left_B > 11 * steps_B, rising_B, looping_B)
        # As in `schedule`. Of more steps than tokens, those that unmask one are spread evenly.
        each_B, more_B = tokens_B // steps_B, tokens_B % steps_B
        spread_B = step_B * tokens_B // steps_B
        return jnp.where(each_B > 0, step_B * each_B + jnp.minimum(step_B, more_B), spread_B)

    left_B = steps_B - at.inner_B
    looping_B = (20 * left_B <= 11 * steps_B) & (20 * left_B > steps_B)
    return Pace(tokens_B, visible(at.inner_B), visible(at.inner_B + 1), looping_B)


def fill_with_end(rows: Rows, tokens_BT: jax.Array, plan: Plan, config: SamplerConfig) -> jax.Array:
    """Returns the canvas with EOS in place of MASK in all blocks that the rows no longer need."""
    # Fill only the first masks_B positions of a row's order: any other MASK, such as one in the padding, is kept.
    rank_BT = jnp.argsort(rows.order_BT, axis=1)
    fill_BT = ~plan.going_B[:, None] & (rank_BT < rows.masks_B[:, None]) & (tokens_BT == config.mask_id)
    return jnp.where(fill_BT, ends(config)[0], tokens_BT)
