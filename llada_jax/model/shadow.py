"""A second, hidden copy of some tokens, which tells how probable tokens are that already stand on the canvas.

At a visible token the mask predictor says little, because it sees the token. So each slot of a block gets a shadow: a
MASK token at the same position that sees everything except the visible token of its own slot, while no token but the
shadows sees the shadows. What the model predicts there is its distribution given all other tokens of the row. The idea
is that of WINO (arXiv 2507.18578, Section 3.2).

Letters in names, in addition to those of `transformer.py`: N tokens of one pass, J shadows, S slots that are attended
to.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llada_jax.devices import mesh
from llada_jax.model.attention import attention
from llada_jax.model.cpu import MASKED_OUT, real_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Shadows:
    """The shadows of one pass. They are fed after its other tokens."""

    tokens_BJ: jax.Array  # int32: MASK
    position_BJ: jax.Array  # int32: the position of the token whose shadow it is
    slot_BJ: jax.Array  # int32: the slot, among the keys that are attended to, of that token
    inside_BJ: jax.Array  # bool: False for one that only fills up the width, which nothing attends to


def attention_with_shadows(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    real: jax.Array | None,
    shadows: Shadows,
    *,
    kernel: str,
    query_chunk: int,
) -> jax.Array:
    """Computes attention where the last J queries and the last J keys and values are those of shadows.

    The other queries attend to the other keys, by the kernel. A shadow attends to the same keys except that of its own
    slot, and to all shadows; these J (S + J) scores per head are held in memory.

    Args:
      q_BTHK: The queries, of N + J tokens.
      k_BSGK: The keys, of S slots and J shadows.
      v_BSGK: The values.
      real: Which of the S slots may be attended to, in a form that `attention` accepts.
      shadows: The shadows.
      kernel, query_chunk: As for `attention`.

    Returns:
      The outputs (B, N + J, H, K).
    """
    count = shadows.slot_BJ.shape[1]
    tokens, slots = q_BTHK.shape[1] - count, k_BSGK.shape[1] - count
    first = attention(
        q_BTHK[:, :tokens], k_BSGK[:, :slots], v_BSGK[:, :slots], real, kernel=kernel, query_chunk=query_chunk
    )
    heads, rows = mesh.HEADS_BTHK, mesh.TOKENS_BT
    inputs = [q_BTHK[:, tokens:], k_BSGK, v_BSGK, shadows.slot_BJ, shadows.inside_BJ]
    specs = [heads, heads, heads, rows, rows]
    if real is not None:
        inputs.append(real)
        specs.append(P(mesh.BATCH, *(None,) * (real.ndim - 1)))
    second = jax.shard_map(_of_shadows, in_specs=tuple(specs), out_specs=heads, check_vma=False)(*inputs)
    return jnp.concatenate([first, second], axis=1)


def _of_shadows(q_BJHK, k_BSGK, v_BSGK, slot_BJ, inside_BJ, real=None):
    batch, count, heads, width = q_BJHK.shape
    slots, groups = k_BSGK.shape[1] - count, k_BSGK.shape[2]
    seen_BJS = jnp.arange(slots) != slot_BJ[:, :, None]
    if real is not None:
        seen_BJS &= real_mask(real, slots)[:, None, :]
    others_BJJ = jnp.broadcast_to(inside_BJ[:, None, :], (batch, count, count))
    seen_BJS = jnp.concatenate([seen_BJS, others_BJJ], axis=2)
    q_BJGRK = q_BJHK.reshape(batch, count, groups, heads // groups, width)
    scores = jnp.einsum("bjgrk,bsgk->bgrjs", q_BJGRK, k_BSGK, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(seen_BJS[:, None, None], scores, MASKED_OUT)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    out = jnp.einsum("bgrjs,bsgk->bjgrk", weights, v_BSGK, preferred_element_type=jnp.float32)
    return out.reshape(batch, count, heads, width).astype(q_BJHK.dtype)
