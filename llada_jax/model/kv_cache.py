"""Keys and values of all layers that are kept from one forward pass for others, which then compute a few tokens only.

The mask predictor has no causal mask: with any token, the keys and values of all others change in every layer but the
first. So a pass that reads kept ones is an approximation, and its caller decides when they are computed anew. Those of
a causal model never change.

A cache has S slots per row. Which position of the row a slot stands for is up to the caller: the keys are kept as they
are after the rotation, and the order of keys does not matter to attention.

Letters in names, in addition to those of `transformer.py`: N tokens of one pass.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llada_jax.config import ComputeConfig, ModelConfig
from llada_jax.devices import mesh
from llada_jax.model.attention import attention
from llada_jax.model.compute import compute_dtype
from llada_jax.model.rope import rope_at
from llada_jax.model.shadow import Shadows, attention_with_shadows
from llada_jax.model.transformer import Transformer, embed, rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """The rotated keys and the values of all layers, in the compute dtype, sharded over the rows and the heads."""

    k_LBSGK: jax.Array
    v_LBSGK: jax.Array


def _shape(config: ModelConfig, batch: int, slots: int) -> tuple[int, ...]:
    return (config.layers, batch, slots, config.kv_heads, config.head_width)


def cache_bytes(config: ModelConfig, compute: ComputeConfig, batch: int, slots: int) -> int:
    """Returns the bytes of a cache on all devices together: 2 L B S G K times those of the compute dtype."""
    return 2 * math.prod(_shape(config, batch, slots)) * compute_dtype(compute).itemsize


def empty_cache(config: ModelConfig, compute: ComputeConfig, batch: int, slots: int) -> Cache:
    """Returns a cache of zeros on the mesh in use. Call this under `jax.jit`, or each device makes all of it."""
    shape, dtype = _shape(config, batch, slots), compute_dtype(compute)
    return Cache(*(jnp.zeros(shape, dtype, out_sharding=mesh.KEYS_LBSGK) for _ in range(2)))


def writing_trunk(
    model: Transformer,
    tokens_BN: jax.Array,
    position_BN: jax.Array | None,
    real: jax.Array | None,
    cache: Cache | None,
    shadows: Shadows | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Computes what `Transformer.trunk` does, and puts keys and values into the first N slots of the cache.

    Args:
      model: The mask predictor.
      tokens_BN: int32 ids of tokens, which attend to each other and to nothing else.
      position_BN: int32, the positions of the tokens. None means that they are 0 to N - 1.
      real: Which of the tokens may be attended to, in a form that `Transformer.trunk` accepts.
      cache: The cache to write into, with at least N slots. None means that nothing is kept.
      shadows: Shadows of some of the tokens, whose keys and values are not kept. Their slots count the N tokens.

    Returns:
      The hidden states (B, N, D) after the final norm, in the compute dtype, or with J shadows (B, N + J, D), those of
      the shadows last; and the new cache.
    """
    compute, count = model.resolved_compute(), tokens_BN.shape[1]
    if position_BN is None:
        position_BN = jnp.arange(count, dtype=jnp.int32)
        position_BN = position_BN if shadows is None else jnp.zeros_like(tokens_BN) + position_BN
    tokens_BN, position_BN, attend = _with(shadows, tokens_BN, position_BN)
    rope = _rope(model, position_BN)

    def layer(carry, inputs):
        (x_BND, cache), (block, index) = carry, inputs
        x_BND, new = block.with_keys(x_BND, rope, real, model.config, compute, attend=attend)
        if cache is not None:
            # Written in place, the cache is in memory only once.
            write = lambda kept, x: jax.lax.dynamic_update_slice(kept, x[None, :, :count], (index, 0, 0, 0, 0))  # noqa: E731
            cache = Cache(*map(write, (cache.k_LBSGK, cache.v_LBSGK), new))
        return (x_BND, cache), None

    carry = embed(model.embedding[...], tokens_BN, jnp.dtype(compute.dtype)), cache
    inputs = model.blocks, jnp.arange(model.config.layers)
    (x_BND, cache), _ = jax.lax.scan(layer, carry, inputs, unroll=compute.unroll or model.config.layers)
    return rms_norm(x_BND, model.final_norm[...], model.config.norm_eps), cache


def reading_trunk(
    model: Transformer,
    tokens_BN: jax.Array,
    position_BN: jax.Array,
    slot_BN: jax.Array,
    real: jax.Array | None,
    cache: Cache,
    slots: int,
    shadows: Shadows | None = None,
) -> jax.Array:
    """Computes the hidden states of a few tokens, which attend to the cache with their own keys and values in it.

    The new keys and values are written over those of their slots in each layer, before the attention of that layer. The
    cache itself stays as it is. All tokens attend to the same slots, those that `real` names, whether the model is
    causal or not.

    Args:
      model: The mask predictor.
      tokens_BN: int32 ids of the tokens.
      position_BN: int32, the positions of the tokens.
      slot_BN: int32, the slot of each token. That of a token that only fills up the row is `slots` or larger: it is
        attended to by no token, and its own hidden state means nothing.
      real: Which of the slots may be attended to, in a form that `attention` accepts: None, bool (B, S) or int32 (B,).
      cache: The cache.
      slots: S, the number of slots of each row that are used, which are the first ones.
      shadows: Shadows of some of the tokens in the cache. Their slots are those of the cache.

    Returns:
      The hidden states (B, N, D) after the final norm, in the compute dtype, or with J shadows (B, N + J, D), those of
      the shadows last.
    """
    compute, count = model.resolved_compute(), tokens_BN.shape[1]
    tokens_BN, position_BN, attend = _with(shadows, tokens_BN, position_BN)
    rope = _rope(model, position_BN)
    heads = mesh.HEADS_BTHK
    write = jax.vmap(lambda kept_SGK, slot_N, new_NGK: kept_SGK.at[slot_N].set(new_NGK, mode="drop"))
    write = jax.shard_map(write, in_specs=(heads, mesh.TOKENS_BT, heads), out_specs=heads)

    def layer(x_BND, inputs):
        block, *kept = inputs

        def among(*new):
            seen = (write(old[:, :slots], slot_BN, x[:, :count]) for old, x in zip(kept, new, strict=True))
            if shadows is None:
                return tuple(seen)
            return tuple(jnp.concatenate([old, x[:, count:]], axis=1) for old, x in zip(seen, new, strict=True))

        return block.with_keys(x_BND, rope, real, model.config, compute, among, attend or attention)[0], None

    x_BND = embed(model.embedding[...], tokens_BN, jnp.dtype(compute.dtype))
    inputs = model.blocks, cache.k_LBSGK, cache.v_LBSGK
    x_BND, _ = jax.lax.scan(layer, x_BND, inputs, unroll=compute.unroll or model.config.layers)
    return rms_norm(x_BND, model.final_norm[...], model.config.norm_eps)


def appending_trunk(
    model: Transformer, tokens_B1: jax.Array, slot_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Computes the hidden states of the next token of each row of a causal model, and puts it into the cache.

    Args:
      model: The causal model.
      tokens_B1: int32, the id of one token per row.
      slot_B: int32, its position, which is also its slot. It attends to the slots up to this one.
      cache: The cache, which has the tokens before it.

    Returns:
      The hidden states (B, 1, D) after the final norm, in the compute dtype, and the new cache.
    """
    compute, kept, rows = model.resolved_compute(), mesh.KEYS_LBSGK, mesh.ROWS_B
    rope = _rope(model, slot_B[:, None])

    def put(kept_LBSGK, new_B1GK, slot_B, index):
        at = index, jnp.arange(len(slot_B)), slot_B
        return kept_LBSGK.at[at].set(new_B1GK[:, 0])

    put = jax.shard_map(put, in_specs=(kept, mesh.HEADS_BTHK, rows, P()), out_specs=kept)

    def attend(q_BTHK, k_BSGK, v_BSGK, real, *, kernel, query_chunk):
        # With one query per head there is nothing that a kernel could save.
        return attention(q_BTHK, k_BSGK, v_BSGK, real, kernel="xla", query_chunk=query_chunk)

    def layer(carry, inputs):
        (x_B1D, cache), (block, index) = carry, inputs
        after = cache

        def among(*new):
            nonlocal after
            # Written in place, the cache is in memory only once.
            after = Cache(
                *(put(old, x, slot_B, index) for old, x in zip((cache.k_LBSGK, cache.v_LBSGK), new, strict=True))
            )
            return tuple(jax.lax.dynamic_index_in_dim(x, index, 0, False) for x in (after.k_LBSGK, after.v_LBSGK))

        x_B1D, _ = block.with_keys(x_B1D, rope, slot_B + 1, model.config, compute, among, attend)
        return (x_B1D, after), None

    carry = embed(model.embedding[...], tokens_B1, jnp.dtype(compute.dtype)), cache
    inputs = model.blocks, jnp.arange(model.config.layers)
    (x_B1D, cache), _ = jax.lax.scan(layer, carry, inputs, unroll=compute.unroll or model.config.layers)
    return rms_norm(x_B1D, model.final_norm[...], model.config.norm_eps), cache


def _with(shadows: Shadows | None, tokens_BN: jax.Array, position_BN: jax.Array):
    """Returns the tokens of a pass and their positions, the shadows last, and the attention for them.

    None stands for the attention of the model, causal if it is.
    """
    if shadows is None:
        return tokens_BN, position_BN, None
    tokens_BN = jnp.concatenate([tokens_BN, shadows.tokens_BJ], axis=1)
    position_BN = jnp.concatenate([position_BN, shadows.position_BJ], axis=1)
    return tokens_BN, position_BN, functools.partial(attention_with_shadows, shadows=shadows)


def _rope(model: Transformer, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rope_at(position, model.config.head_width, model.config.rope_theta, model.config.rope_scaling)
