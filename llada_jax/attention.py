"""Bidirectional attention: one front, `attention`, kernels behind it, and one plain reference.

There is no causal mask: every real token attends to every real token of its row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llada_jax import mesh
from llada_jax.config import UserError

MASKED_OUT = -1e30  # finite, so that a row without any real key gives numbers, not NaN


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    key_mask_BS: jax.Array | None,
    *,
    kernel: str = "xla",
    query_chunk: int = 512,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, each group of H / G query heads sharing one key/value head.

    Args:
      q_BTHK: queries, any float dtype, sharded over batch and heads.
      k_BSGK, v_BSGK: keys and values of the same dtype, H divisible by G.
      key_mask_BS: bool, True = a real token that may be attended to; None = all are.
      kernel: "xla" (scores of query_chunk queries at a time, recomputed in the backward pass) or "reference".
      query_chunk: queries per chunk of the xla kernel.

    Returns:
      (B, T, H, K) in the dtype of q; softmax and accumulation are fp32.

    Raises:
      UserError: no such kernel.
    """
    if kernel not in KERNELS:
        raise UserError(f"config.compute.attention={kernel!r}: choose one of {', '.join(KERNELS)}")
    run = KERNELS[kernel]
    if kernel == "xla":
        run = functools.partial(run, query_chunk=query_chunk)
    heads = mesh.HEADS_BTHK
    if key_mask_BS is None:
        return jax.shard_map(lambda q, k, v: run(q, k, v, None), in_specs=(heads,) * 3, out_specs=heads)(
            q_BTHK, k_BSGK, v_BSGK
        )
    specs = (heads, heads, heads, P(mesh.BATCH, None))
    return jax.shard_map(run, in_specs=specs, out_specs=heads)(q_BTHK, k_BSGK, v_BSGK, key_mask_BS)


def reference_attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, key_mask_BS: jax.Array | None
) -> jax.Array:
    """The definition, with all (T, S) scores in memory. On one device; see `attention`."""
    batch, length, heads, width = q_BTHK.shape
    groups = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32) * width**-0.5
    if key_mask_BS is not None:
        scores = jnp.where(key_mask_BS[:, None, None, None, :], scores, MASKED_OUT)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, v_BSGK, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, width).astype(q_BTHK.dtype)


def xla_attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, key_mask_BS: jax.Array | None, *, query_chunk: int
) -> jax.Array:
    """`reference_attention` over chunks of queries: (query_chunk, S) scores at a time, never (T, S)."""
    length = q_BTHK.shape[1]
    if length <= query_chunk:
        return reference_attention(q_BTHK, k_BSGK, v_BSGK, key_mask_BS)
    chunks = -(-length // query_chunk)
    padding = chunks * query_chunk - length
    q_BTHK = jnp.pad(q_BTHK, ((0, 0), (0, padding), (0, 0), (0, 0)))
    batch, _, heads, width = q_BTHK.shape
    q_chunks = q_BTHK.reshape(batch, chunks, query_chunk, heads, width).swapaxes(0, 1)

    # Without the checkpoint the backward pass would keep every chunk's scores: (T, S) again.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(carry, q):
        return carry, reference_attention(q, k_BSGK, v_BSGK, key_mask_BS)

    _, out = jax.lax.scan(one_chunk, None, q_chunks)
    return out.swapaxes(0, 1).reshape(batch, chunks * query_chunk, heads, width)[:, :length]


KERNELS = {"xla": xla_attention, "reference": reference_attention}
