"""Lays out the canvas on which the reverse process works, and what stays the same while it works.

Rows are turned so that each begins with its first real token: padding then changes neither positions nor results.
"""

import dataclasses
import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import SamplerConfig, UserError
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.commit import RULES, SCHEDULE
from llada_jax.sampling.lengths import DAEDAL, NO_GAPS
from llada_jax.sampling.settings import REVOKE_BOUNDS, check_prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """The data that stays the same while rows are denoised. Positions count from a row's first real token."""

    order_BT: jax.Array  # int32: positions of the MASK tokens to fill, ascending, then all other positions
    masks_B: jax.Array  # int32: number of MASK tokens to fill
    own_B: jax.Array  # int32: number of these that stand in the prompt itself
    shift_B: jax.Array  # int32: number of padding tokens in front
    real_BT: jax.Array | None  # bool: True for a real token; None if all tokens are real
    given_BT: jax.Array | None  # bool: True for the prompt's tokens, which guidance hides; None without guidance
    key_B: jax.Array  # PRNG keys: the source of each row's noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dials:
    """The settings that are traced, so that other values do not compile the program again."""

    steps: jax.Array  # int32
    temperature: jax.Array  # fp32
    cfg_scale: jax.Array  # fp32
    top_k: jax.Array  # int32
    top_p: jax.Array  # fp32
    commit_bound: jax.Array  # fp32
    cache_refresh: jax.Array  # int32
    revoke_bound: jax.Array  # fp32


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns jnp.take_along_axis(x, index, axis=1), computed on the devices that hold the rows."""
    # Without shard_map, JAX cannot tell which sharding an index of shape (1, 1) follows.
    split = mesh.TOKENS_BT if x.ndim == 2 else mesh.HIDDEN_BTD
    take = functools.partial(jnp.take_along_axis, axis=1)
    return jax.shard_map(take, in_specs=(split, split), out_specs=split)(x, index)


def put(x_BT: jax.Array, index_BK: jax.Array, new_BK: jax.Array) -> jax.Array:
    """Returns x with new values at these positions of each row. Positions outside the row are dropped."""
    write = jax.vmap(lambda row_T, at_K, new_K: row_T.at[at_K].set(new_K, mode="drop"))
    return jax.shard_map(write, in_specs=(mesh.TOKENS_BT,) * 3, out_specs=mesh.TOKENS_BT)(x_BT, index_BK, new_BK)


def roll(tokens_BT: jax.Array, shift_B: jax.Array) -> jax.Array:
    """Rotates each row to the left by its shift."""
    length = tokens_BT.shape[1]
    return take(tokens_BT, (jnp.arange(length) + shift_B[:, None]) % length)


def start(
    model: Transformer, prompt_BT, config: SamplerConfig, key: jax.Array, prompt_mask_BT
) -> tuple[Rows, jax.Array]:
    """Returns the rows and the canvas before the first step, on the mesh in use, with B rounded up to its shards.

    Each row of the canvas is turned so that it begins with its first real token. `roll` turns it back.
    """
    prompt_BT = np.asarray(prompt_BT)
    real_BT = None if prompt_mask_BT is None else np.asarray(prompt_mask_BT).astype(bool)
    check_prompt(prompt_BT, real_BT, model.config.vocab_size)
    batch, prompt_length = prompt_BT.shape
    tokens_BT = np.full((batch, prompt_length + config.gen_length), config.mask_id, np.int32)
    tokens_BT[:, :prompt_length] = prompt_BT

    if real_BT is None or real_BT.all():
        shift_B, aligned_BT, real_BT = np.zeros(batch, np.int32), tokens_BT, None
        fill_BT = tokens_BT == config.mask_id
    else:
        real_BT = np.pad(real_BT, ((0, 0), (0, config.gen_length)), constant_values=True)
        shift_B = np.where(real_BT.any(axis=1), real_BT.argmax(axis=1), 0).astype(np.int32)
        at_BT = (np.arange(tokens_BT.shape[1]) + shift_B[:, None]) % tokens_BT.shape[1]
        aligned_BT, real_BT = (np.take_along_axis(x, at_BT, axis=1) for x in (tokens_BT, real_BT))
        fill_BT = (aligned_BT == config.mask_id) & real_BT
    order_BT = np.argsort(~fill_BT, axis=1, kind="stable").astype(np.int32)
    masks_B = fill_BT.sum(axis=1, dtype=np.int32)
    if config.length == DAEDAL and (masks_B > config.gen_length).any():
        raise UserError(NO_GAPS)

    key_data, kind = placed_key(key, batch)
    given_BT = ~fill_BT if config.cfg_scale else None
    *fields, row_B = mesh.place_rows(
        order_BT, masks_B, masks_B - config.gen_length, shift_B, real_BT, given_BT, np.arange(batch, dtype=np.int32)
    )
    rows = Rows(*fields, row_keys(key_data, row_B, kind))
    return rows, mesh.place_rows(aligned_BT)[0]


def placed_key(key: jax.Array, batch: int) -> tuple[jax.Array, Hashable]:
    """Returns the data of one key, or of one for each row, on the mesh in use, and the kind of the key.

    Raises:
      UserError: If there are neither one nor `batch` keys.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (batch,)):
        raise UserError(f"key has shape {key.shape}: give one key, or one for each of the {batch} rows")
    # Copy the key through the host: its device may be outside the mesh, and other processes may own parts of the mesh.
    return jax.device_put(jax.device_get(jax.random.key_data(key)), P()), jax.random.key_impl(key)


@functools.partial(jax.jit, static_argnums=2)
def row_keys(key_data: jax.Array, row_B: jax.Array, kind: Hashable) -> jax.Array:
    """Returns the keys (B,) of the rows, split over the mesh in the same way as row_B."""
    key = jax.random.wrap_key_data(key_data, impl=kind)
    if key.ndim:
        return key.at[row_B].get(out_sharding=mesh.ROWS_B)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)


def arguments(config: SamplerConfig) -> tuple[Dials, SamplerConfig]:
    """Splits the settings into those that are traced, as arrays, and the others, as static data."""
    bound = config.commit_bound
    if bound is None:
        bound = 0.0 if config.commit == SCHEDULE else RULES[config.commit].bound
    revoke_bound = config.revoke_bound
    if revoke_bound is None:
        revoke_bound = REVOKE_BOUNDS.get(config.revoke, 0.0)
    dials = Dials(
        steps=scalar(config.steps),
        temperature=scalar(config.temperature, np.float32),
        cfg_scale=scalar(config.cfg_scale, np.float32),
        top_k=scalar(config.top_k),
        top_p=scalar(config.top_p, np.float32),
        commit_bound=scalar(bound, np.float32),
        cache_refresh=scalar(config.cache_refresh),
        revoke_bound=scalar(revoke_bound, np.float32),
    )
    static = dataclasses.replace(
        config,
        steps=1,
        gen_length=0,
        temperature=float(config.temperature > 0),
        cfg_scale=float(config.cfg_scale > 0),
        top_k=int(config.top_k > 0),
        top_p=0.5 if config.top_p < 1 else 1.0,
        commit_bound=None,
        cache_refresh=0,
        revoke_bound=None,
    )
    return dials, static


def scalar(value: float, dtype: type = np.int32) -> jax.Array:
    return jax.device_put(dtype(value), P())
