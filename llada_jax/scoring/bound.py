"""The Monte Carlo bound on the log-likelihood (Eq. 6 and 14 of arXiv 2502.09992).

-log p(x_0) <= E[ L / l * sum_i 1[x_l^i = MASK] -log p(x_0^i | x_l) ], l uniform in 1..L and exactly l of
the L tokens masked, without replacement. Its variance is far below that of the 1/t form.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from llada_jax.config import ValidationConfig
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh
from llada_jax.diffusion.cross_entropy import linear_cross_entropy
from llada_jax.diffusion.forward import low_discrepancy, row_keys, unit_interval
from llada_jax.model.transformer import Transformer, merge


def exact_mask(key_B: jax.Array, length_B: jax.Array, masked_B: jax.Array, width: int) -> jax.Array:
    """bool (B, width): exactly masked_B of the first length_B positions of each row, every subset alike.

    Args:
      key_B: one key per row.
      length_B: int32, real tokens.
      masked_B: int32, at most length_B.
      width: T.
    """
    position_T = jnp.arange(width)

    def one_row(key, length, masked):
        # Ties between equal bits fall to the lower position: of no weight at 32 bits.
        bits_T = jax.random.bits(key, (width,), jnp.uint32) >> 1
        order_T = jnp.argsort(jnp.where(position_T < length, bits_T, jnp.uint32(0xFFFFFFFF)))
        return jnp.zeros(width, bool).at[order_T].set(position_T < masked)

    return jax.vmap(one_row)(key_B, length_B, masked_B)


def moved(mask_BT: jax.Array, first_B: jax.Array) -> jax.Array:
    """The mask with position 0 of each row at first_B; positions that would leave the row at its end are not set."""
    width = mask_BT.shape[1]
    return jnp.take_along_axis(mask_BT, (jnp.arange(width) - first_B[:, None]) % width, axis=1)


def masked_nats(
    model: Transformer,
    trunk: Callable[[jax.Array], jax.Array],
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    weight_B: jax.Array,
    chunk: int,
    mask_id: int,
) -> jax.Array:
    """weight * sum of the masked tokens' -log p(x_0^i | x_l) of each row: fp32 nats (B,), whole on every device.

    Args:
      model: gives the head.
      trunk: hidden states of a canvas in which tokens are masked.
      tokens_BT: int32 x_0.
      mask_BT: bool, the tokens that are masked.
      weight_B: fp32, L / l.
      chunk: positions per chunk of the head; those that are not masked cost nothing.
      mask_id: id of MASK.
    """
    weight_BT = jnp.where(mask_BT, weight_B[:, None], 0.0)
    h_BTD = trunk(jnp.where(mask_BT, mask_id, tokens_BT))
    _, nll_BT = linear_cross_entropy(h_BTD, model.head_weight(), tokens_BT, weight_BT, chunk)
    return jax.reshard((nll_BT * weight_BT).sum(axis=1), P(None))


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk", "mask_id"))
def bound(
    graphdef: nnx.GraphDef,
    params: dict,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    prompt_B: jax.Array,
    row_B: jax.Array,
    key: jax.Array,
    *,
    chunk: int,
    mask_id: int,
) -> jax.Array:
    """One sample of the bound for what comes after each row's prompt: fp32 nats (B,), whole on every device.

    l is drawn with low discrepancy over row_B, so that a set of rows covers all mask ratios evenly;
    for each single row it is uniform in 1..length - prompt.
    """
    model = merge(graphdef, params)
    unit_B = unit_interval(low_discrepancy(key, row_B))
    judged_B = length_B - prompt_B
    masked_B = jnp.minimum((unit_B * judged_B).astype(jnp.int32) + 1, judged_B)
    width = tokens_BT.shape[1]
    mask_BT = moved(exact_mask(row_keys(jax.random.fold_in(key, 1), row_B), judged_B, masked_B, width), prompt_B)
    return masked_nats(
        model, lambda x_l_BT: model.trunk(x_l_BT, length_B), tokens_BT, mask_BT, judged_B / masked_B, chunk, mask_id
    )


def validate(
    graphdef: nnx.GraphDef,
    params: dict,
    rows: HeldOut,
    config: ValidationConfig,
    *,
    batch_size: int,
    chunk: int,
    mask_id: int,
) -> dict[str, float]:
    """The bound on held-out rows under fixed noise: the same number whenever the same weights are given.

    Args:
      graphdef, params: the model as `model.split` gives it, on the mesh in use.
      rows: of text, or of answers with their prompts, which are given.
      config: samples per row and the seed of the noise.
      batch_size: rows per forward pass, divisible by the batch shards.
      chunk: positions per chunk of the loss.
      mask_id: id of MASK.

    Returns:
      nats_per_token (EOS counts as a token, the prompt does not), perplexity, bits_per_byte (EOS has no bytes).
    """
    tokens_NT, length_N, prompt_N, bytes_N = rows
    count, total, mesh_ = len(tokens_NT), 0.0, jax.sharding.get_mesh()
    mine = np.array(mesh.local_rows(mesh_, batch_size))
    for sample in range(config.samples):
        key = jax.random.fold_in(jax.random.key(config.seed), sample)
        for first in range(0, count, batch_size):
            # The last batch is filled up with row 0, whose result is dropped: one compiled shape.
            row = first + mine
            index = np.where(row < count, row, 0)
            batch = {name: x[index] for name, x in zip(("tokens", "length", "prompt"), rows, strict=False)}
            batch = mesh.place_batch({**batch, "row": row.astype(np.int32)}, mesh_, batch_size)
            nats_B = bound(graphdef, params, *batch.values(), key, chunk=chunk, mask_id=mask_id)
            total += float(np.asarray(nats_B, np.float64)[: count - first].sum())
    tokens = int((length_N - prompt_N).sum())
    nats = total / config.samples / tokens
    return {
        "nats_per_token": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": nats * tokens / math.log(2) / max(int(bytes_N.sum()), 1),
    }
