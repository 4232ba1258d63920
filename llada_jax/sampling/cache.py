"""The forward passes of a sampler that keeps keys and values, or that does not look at all MASK tokens.

A full pass over all tokens begins each block. It is the block's first step, and refreshes the keys and values of all
layers. The later steps of the block feed a few tokens only, whose keys and values replace the kept ones; all others
are as old as the last full pass. After `cache_refresh` steps the next pass is a full one again.

    dual    feeds the slots of the active block
    prefix  feeds the first slot of the block and every token behind it

So a step with a cache is an approximation, because with a token the keys and values of all others change.

All rows take their full passes together: a row that needs one waits until no other row can use what is kept. Which
tokens a row gets, and after how many of its own passes, is the same as if it were alone.

With `suffix_window` the MASK tokens that follow the active block are left out of all passes, except the next ones and
the last position. With length=append all appended ones that follow it are. What a row sees then, in the order of
positions, are the first slots of the cache and the first tokens of a full pass. The number of tokens fed and of slots
read is one of a few static widths.

Letters in names, in addition to those of `model/transformer.py`: K slots of the active block, N tokens of one pass, S
slots of the cache, each of which stands for a position.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llada_jax.config import ComputeConfig, ModelConfig, SamplerConfig, UserError
from llada_jax.devices import hardware, mesh
from llada_jax.model.kv_cache import Cache, cache_bytes, empty_cache, reading_trunk, writing_trunk
from llada_jax.model.shadow import Shadows
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.canvas import Dials, Rows, take
from llada_jax.sampling.guidance import guide
from llada_jax.sampling.lengths import APPEND
from llada_jax.sampling.plan import Plan
from llada_jax.sampling.settings import DUAL, NONE, WINO
from llada_jax.sampling.step import Block

# The shares of the canvas that a pass may be wide. Few are compiled fast, but more of them leave less to be filled up.
# What a prefix cache feeds shrinks from the whole continuation to a block. What is seen grows from the prompt to all.
FED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
SEEN = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
# Widths are multiples of so many tokens. Each width is a pass of its own in the program, and takes longer to compile
# than a few tokens less can save.
GRAIN = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Kept:
    """What is kept between the reverse steps."""

    caches: tuple[Cache, ...]  # one, or two with guidance: that of the canvas, and that of the canvas without a prompt
    block_B: jax.Array  # int32: the block that was active in the last full pass; -1 before the first
    age_B: jax.Array  # int32: the number of steps that the row has taken since, that pass included


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What each row sees if not everything. The first slots of its cache stand for it, in the order of positions."""

    position_BS: jax.Array  # int32: the position that a slot of the cache stands for
    slot_BT: jax.Array  # int32: the slot of a position, if the position is seen
    count_B: jax.Array  # int32: the number of positions that are seen


def used(config: SamplerConfig) -> bool:
    """Returns whether the settings need the passes of this module, and not just all tokens in every pass."""
    return config.cache != NONE or _sees_a_part(config) or config.revoke == WINO


def _sees_a_part(config: SamplerConfig) -> bool:
    return config.suffix_window > 0 or config.length == APPEND


def nothing_kept(model: Transformer, rows: Rows, config: SamplerConfig) -> Kept | None:
    """Returns what is kept before the first step, on the mesh in use, or None if the settings keep nothing.

    Raises:
      UserError: If the keys and values do not fit into the memory of a device.
    """
    if config.cache == NONE:
        return None
    batch, length = rows.order_BT.shape
    streams = 1 if rows.given_BT is None else 2
    _check_memory(model, batch, length, streams, config)
    sizes = dataclasses.replace(model.config), dataclasses.replace(model.compute)
    return _zeros(rows.masks_B, *sizes, length, streams)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _zeros(masks_B: jax.Array, config: ModelConfig, compute: ComputeConfig, length: int, streams: int) -> Kept:
    caches = tuple(empty_cache(config, compute, len(masks_B), length) for _ in range(streams))
    return Kept(caches, jnp.full_like(masks_B, -1), jnp.zeros_like(masks_B))


def _check_memory(model: Transformer, batch: int, length: int, streams: int, config: SamplerConfig) -> None:
    # Where the width of a full pass is chosen in the program, XLA keeps a copy of the cache meanwhile.
    copies = streams * (2 if len(_seen_widths(length, config)) > 1 else 1)
    check_memory(model, batch, length, copies, f"cache={config.cache}: ", ", or cache=none")


def check_memory(model: Transformer, batch: int, slots: int, copies: int = 1, what: str = "", remedy: str = "") -> None:
    """Raises UserError if so many caches of these rows do not fit into the memory of a device of the mesh in use.

    Args:
      model: The model.
      batch: The number of rows.
      slots: The number of slots of each row.
      copies: The number of caches that are in memory together.
      what: What the message begins with.
      remedy: What the message says beside a smaller batch and a shorter gen_length.
    """
    split = mesh.batch_shards() * mesh.tensor_shards()
    takes = copies * cache_bytes(model.config, model.compute, batch, slots) // split
    device = min(model.embedding[...].sharding.addressable_devices, key=lambda device: device.id)
    free = hardware.free_memory(device)
    if free is not None and takes > free:
        raise UserError(
            f"{what}the keys and values of {batch} rows of {slots} tokens take {takes / 1e9:.1f} GB per device, but "
            f"{free / 1e9:.1f} GB are free: use a smaller batch, a shorter gen_length{remedy}"
        )


def hidden(
    model: Transformer,
    rows: Rows,
    tokens_BT: jax.Array,
    kept: Kept | None,
    plan: Plan,
    block: Block,
    dials: Dials,
    config: SamplerConfig,
) -> tuple[jax.Array, jax.Array, Kept | None]:
    """Computes the hidden states of the active blocks by a full pass, or by one that feeds a few tokens.

    Args:
      model: The mask predictor.
      rows: The rows.
      tokens_BT: int32, the canvas.
      kept: What the steps before have kept; None with cache=none.
      plan: Where each row stands.
      block: The active block of each row.
      dials: The traced settings.
      config: The other settings.

    Returns:
      The hidden states (B, K, D) of the slots of the block before the head, guided if there is guidance, or with
      revoke=wino (B, 2K, D), those of their shadows last; bool (B,), True for a row whose hidden states are valid: the
      others wait for a full pass, or are finished; and what is kept.
    """
    going_B = plan.going_B
    canvases = [tokens_BT]
    if rows.given_BT is not None:
        canvases.append(jnp.where(rows.given_BT, config.mask_id, tokens_BT))
    seen = _seen(rows, plan, tokens_BT.shape[1], config)

    def guided(h_BKD):
        return h_BKD[0] if len(canvases) == 1 else guide(*h_BKD, dials.cfg_scale)

    def full(caches):
        run = functools.partial(_full_pass, model, rows, block, seen, going_B, config)
        h_BKD, caches = zip(*map(run, canvases, caches), strict=True)
        return guided(h_BKD), caches

    if config.cache == NONE:
        return full((None,) * len(canvases))[0], going_B, None

    fresh_B = (dials.cache_refresh == 0) | (kept.age_B < dials.cache_refresh)
    ready_B = going_B & fresh_B & (kept.block_B == plan.block_B)
    # A full pass makes nobody wait: it takes place only when every row that is not finished needs it.
    is_full = ~jnp.any(ready_B)

    def partial(caches):
        run = functools.partial(_partial_pass, model, rows, block, seen, ready_B, plan, config)
        return guided([run(*each) for each in zip(canvases, caches, strict=True)]), caches

    h_BKD, caches = jax.lax.cond(is_full, full, partial, kept.caches)
    took_B = jnp.where(is_full, going_B, ready_B)
    block_B = jnp.where(is_full, plan.block_B, kept.block_B)
    age_B = jnp.where(is_full, 0, kept.age_B) + took_B
    return h_BKD, took_B, Kept(caches, block_B, age_B)


def _seen(rows: Rows, plan: Plan, length: int, config: SamplerConfig) -> _Seen | None:
    """Returns what each row sees, or None if it sees all of its tokens."""
    if not _sees_a_part(config):
        return None
    position_T = jnp.arange(length, dtype=jnp.int32)
    block_length, window = min(config.block_length, length), min(config.suffix_window, length)
    rank_BT = jnp.argsort(rows.order_BT, axis=1)
    end_B = (plan.block_B + 1) * block_length + window
    if config.length == APPEND:
        end_B = jnp.maximum(end_B, rows.own_B)  # of the prompt, everything is seen
    seen_BT = (rank_BT >= rows.masks_B[:, None]) | (rank_BT < end_B[:, None])
    if config.suffix_window:
        seen_BT |= position_T == _end(rows, length)[:, None] - 1
    if rows.real_BT is not None:
        seen_BT &= rows.real_BT
    position_BS = jnp.argsort(~seen_BT, axis=1, stable=True).astype(jnp.int32)
    slot_BT = jnp.cumsum(seen_BT, axis=1, dtype=jnp.int32) - 1
    return _Seen(position_BS, slot_BT, jnp.sum(seen_BT, axis=1, dtype=jnp.int32))


def _end(rows: Rows, length: int) -> jax.Array:
    """Returns int32 (B,): the position behind the last real token."""
    if rows.real_BT is None:
        return jnp.full_like(rows.masks_B, length)
    return jnp.max(jnp.where(rows.real_BT, jnp.arange(1, length + 1, dtype=jnp.int32), 0), axis=1)


def widths(length: int, least: int, shares: tuple[float, ...]) -> list[int]:
    """Returns the widths that a pass may have: these shares of the length, in multiples of GRAIN, at least `least`."""
    return sorted({min(length, max(least, -(-int(length * share) // GRAIN) * GRAIN)) for share in shares})


def narrowest(run: Callable, sizes: list[tuple[int, ...]], needs: list[jax.Array], *operands):
    """Returns run(*size, *operands) for the first of the sizes that is as large as it needs to be in every row."""
    if len(sizes) == 1:
        return run(*sizes[0], *operands)
    enough = [jnp.all(jnp.stack([have >= need for have, need in zip(s, needs, strict=True)])) for s in sizes]
    return jax.lax.switch(jnp.argmax(jnp.stack(enough)), [functools.partial(run, *size) for size in sizes], *operands)


def _shadows(block: Block, slot_BK: jax.Array, config: SamplerConfig) -> Shadows | None:
    """Returns the shadows of the slots of the block, or None if the settings do not need them."""
    if config.revoke != WINO:
        return None
    return Shadows(jnp.full_like(slot_BK, config.mask_id), block.position_BK, slot_BK, block.inside_BK)


def _pick(h_BND: jax.Array, at_BK: jax.Array, tokens: int) -> jax.Array:
    """Returns the hidden states at these indices, and after them those of the shadows, which follow the tokens."""
    h_BKD = take(h_BND, at_BK[:, :, None])
    return h_BKD if h_BND.shape[1] == tokens else jnp.concatenate([h_BKD, h_BND[:, tokens:]], axis=1)


def _full_pass(model, rows, block, seen, going_B, config, canvas_BT, cache):
    """Returns the hidden states of the active blocks, as `hidden` does, and the new cache."""
    length = canvas_BT.shape[1]
    if seen is None:
        shadows = _shadows(block, block.position_BK, config)
        h_BTD, cache = writing_trunk(model, canvas_BT, None, rows.real_BT, cache, shadows)
        return _pick(h_BTD, block.position_BK, length), cache

    slot_BK = take(seen.slot_BT, block.position_BK)
    shadows = _shadows(block, slot_BK, config)

    def run(width, cache):
        position_BN = seen.position_BS[:, :width]
        h_BND, cache = writing_trunk(model, take(canvas_BT, position_BN), position_BN, seen.count_B, cache, shadows)
        return _pick(h_BND, jnp.minimum(slot_BK, width - 1), width), cache

    sizes = [(width,) for width in _seen_widths(length, config)]
    return narrowest(run, sizes, [jnp.max(jnp.where(going_B, seen.count_B, 0))], cache)


def _partial_pass(model, rows, block, seen, ready_B, plan, config, canvas_BT, cache):
    """Returns the hidden states of the active blocks, with the keys and values of other tokens as kept."""
    length = canvas_BT.shape[1]
    slot_BK = block.position_BK if seen is None else take(seen.slot_BT, block.position_BK)
    real = rows.real_BT if seen is None else seen.count_B
    count_B = _end(rows, length) if seen is None else seen.count_B
    shadows = _shadows(block, slot_BK, config)

    def feed(position_BN, slot_BN, slots, cache):
        return reading_trunk(model, take(canvas_BT, position_BN), position_BN, slot_BN, real, cache, slots, shadows)

    slots = _seen_widths(length, config)
    slots_needed = jnp.max(jnp.where(ready_B, count_B, 0))
    if config.cache == DUAL:
        outside_BK = jnp.where(block.inside_BK, slot_BK, length)
        run = functools.partial(feed, block.position_BK, outside_BK)
        return narrowest(run, [(s,) for s in slots], [slots_needed], cache)

    first_B1 = jnp.minimum(plan.block_B * config.block_length, length - 1)[:, None]
    first_B1 = take(rows.order_BT, first_B1)
    first_B1 = first_B1 if seen is None else take(seen.slot_BT, first_B1)

    def run(fed, slots, cache):
        slot_BN = first_B1 + jnp.arange(fed, dtype=jnp.int32)
        position_BN = jnp.minimum(slot_BN, length - 1)
        position_BN = position_BN if seen is None else take(seen.position_BS, position_BN)
        h_BND = feed(position_BN, slot_BN, slots, cache)
        return _pick(h_BND, jnp.clip(slot_BK - first_B1, 0, fed - 1), fed)

    if seen is None:
        sizes = [(fed, length) for fed in widths(length, min(config.block_length, length), FED)]
    else:
        # Behind the block only the window is seen, except where the prompt goes on there, as it may in infilling.
        sizes = [(min(_least(length, config), s), s) for s in slots] + [(length, length)]
        sizes = list(dict.fromkeys(sizes))
    fed_needed = jnp.max(jnp.where(ready_B, count_B - first_B1[:, 0], 0))
    return narrowest(run, sizes, [fed_needed, slots_needed], cache)


def _seen_widths(length: int, config: SamplerConfig) -> list[int]:
    """Returns the widths that what a row sees may have: only that of the canvas where it sees all of it."""
    return widths(length, _least(length, config), SEEN) if _sees_a_part(config) else [length]


def _least(length: int, config: SamplerConfig) -> int:
    """Returns the length of the block and the window, and of the last position."""
    return min(length, min(config.block_length, length) + min(config.suffix_window, length) + 1)
