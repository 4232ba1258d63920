"""Computes the Monte Carlo bound on the log-likelihood (Eq. 6 and 14 of arXiv 2502.09992).

-log p(x_0) <= E[ L / l * sum_i 1[x_l^i = MASK] -log p(x_0^i | x_l) ], where l is uniform in 1..L and exactly l of
the L tokens are masked, without replacement. The variance of this form is far below that of the 1/t form.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from llada_jax.config import NonFinite, ValidationConfig
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh
from llada_jax.diffusion.cross_entropy import linear_cross_entropy
from llada_jax.diffusion.forward import low_discrepancy, row_keys, unit_interval
from llada_jax.model.transformer import Transformer, merge


def exact_mask(key_B: jax.Array, length_B: jax.Array, masked_B: jax.Array, width: int) -> jax.Array:
    """Draws a mask with exactly masked_B of the first length_B positions of each row, all subsets equally likely.

    Args:
      key_B: One key per row.
      length_B: int32, the number of real tokens of each row.
      masked_B: int32, the number of tokens to mask in each row, at most length_B.
      width: The width T of the rows.

    Returns:
      bool (B, width), True at the masked positions.
    """
    position_T = jnp.arange(width)

    def one_row(key, length, masked):
        # If two positions draw equal bits, the lower one comes first. With 31 random bits this is too rare to matter.
        bits_T = jax.random.bits(key, (width,), jnp.uint32) >> 1
        order_T = jnp.argsort(jnp.where(position_T < length, bits_T, jnp.uint32(0xFFFFFFFF)))
        return jnp.zeros(width, bool).at[order_T].set(position_T < masked)

    return jax.vmap(one_row)(key_B, length_B, masked_B)


def moved(mask_BT: jax.Array, first_B: jax.Array) -> jax.Array:
    """Shifts the mask of each row to the right, so that position 0 moves to position first_B.

    Positions that would move past the end of the row must not be set in `mask_BT`: they would wrap around.
    """
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
    """Computes weight * the sum of -log p(x_0^i | x_l) over the masked tokens of each row.

    Args:
      model: The model whose head is used.
      trunk: A function that takes a canvas with masked tokens and returns its hidden states.
      tokens_BT: int32, the tokens x_0.
      mask_BT: bool, True where a token is masked.
      weight_B: fp32, the weight L / l of each row.
      chunk: The number of positions per chunk of the head. Positions that are not masked cost nothing.
      mask_id: The id of MASK.

    Returns:
      fp32 nats (B,), replicated on every device. They are not finite if the output of the model is not.
    """
    weight_BT = jnp.where(mask_BT, weight_B[:, None], 0.0)
    h_BTD = trunk(jnp.where(mask_BT, mask_id, tokens_BT))
    head = model.head_weight()
    _, nll_BT = linear_cross_entropy(h_BTD, head, tokens_BT, weight_BT, chunk)
    nats_B = jax.reshard((nll_BT * weight_BT).sum(axis=1), P(None))
    # A logit of -inf takes no part in the sum of a softmax, so it would go unseen.
    return jnp.where(jnp.isfinite(head).all(), nats_B, jnp.nan)


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
    """Draws one sample of the bound for the tokens that follow each row's prompt.

    Of a causal model, it is no sample but the exact negative log-likelihood, see `next_token_nats`.

    The number l of masked tokens is drawn with low discrepancy over row_B, so that a set of rows covers all mask
    ratios evenly. For each single row l is uniform in 1..length - prompt.

    Args:
      graphdef, params: The model as `model.transformer.split` returns it.
      tokens_BT: int32, the tokens of the rows.
      length_B: int32, the number of real tokens of each row, including its prompt.
      prompt_B: int32, the number of tokens of each row's prompt, which are never masked.
      row_B: int32, the number of each row, which determines its noise.
      key: The key of the noise.
      chunk: The number of positions per chunk of the head.
      mask_id: The id of MASK.

    Returns:
      fp32 nats (B,), replicated on every device.
    """
    model = merge(graphdef, params)
    if model.config.causal:
        return next_token_nats(model, tokens_BT, length_B, prompt_B, chunk)
    unit_B = unit_interval(low_discrepancy(key, row_B))
    judged_B = length_B - prompt_B
    masked_B = jnp.minimum((unit_B * judged_B).astype(jnp.int32) + 1, judged_B)
    width = tokens_BT.shape[1]
    mask_BT = moved(exact_mask(row_keys(jax.random.fold_in(key, 1), row_B), judged_B, masked_B, width), prompt_B)
    return masked_nats(
        model, lambda x_l_BT: model.trunk(x_l_BT, length_B), tokens_BT, mask_BT, judged_B / masked_B, chunk, mask_id
    )


def next_token_nats(
    model: Transformer, tokens_BT: jax.Array, length_B: jax.Array, prompt_B: jax.Array, chunk: int
) -> jax.Array:
    """Computes the sum of -log p(x^i | x^1 ... x^(i-1)) over the tokens of each row that follow its prompt.

    The first token of a row without a prompt follows nothing and is left out.

    Returns:
      fp32 nats (B,), replicated on every device. They are not finite if the output of the model is not.
    """
    position_T = jnp.arange(tokens_BT.shape[1])
    counts_BT = (position_T >= jnp.maximum(prompt_B, 1)[:, None] - 1) & (position_T < length_B[:, None] - 1)
    head = model.head_weight()
    _, nll_BT = linear_cross_entropy(
        model.trunk(tokens_BT, length_B),
        head,
        jnp.roll(tokens_BT, -1, axis=1),
        counts_BT.astype(jnp.float32),
        chunk,
    )
    nats_B = jax.reshard(nll_BT.sum(axis=1), P(None))
    return jnp.where(jnp.isfinite(head).all(), nats_B, jnp.nan)


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
    """Computes the bound on held-out rows with fixed noise, so that the same weights always give the same number.

    Args:
      graphdef, params: The model as `model.transformer.split` returns it, on the mesh in use.
      rows: The held-out rows. They contain text, or answers together with their prompts; prompts are not scored.
      config: The validation settings: the number of samples per row and the seed of the noise.
      batch_size: The number of rows per forward pass, over all devices. It must be divisible by the number of batch
        shards.
      chunk: The number of positions per chunk of the loss.
      mask_id: The id of MASK.

    Returns:
      The figures nats_per_token (EOS counts as a token, the tokens of the prompt do not count), perplexity, and
      bits_per_byte (EOS has no bytes). Of a causal model, they are exact; the first token of a row without a prompt
      does not count, and of the row's bytes only the share of its other tokens.

    Raises:
      NonFinite: If the output of the model is NaN or infinite where a token is masked.
    """
    tokens_NT, length_N, prompt_N, bytes_N = rows
    count, total, mesh_ = len(tokens_NT), 0.0, jax.sharding.get_mesh()
    causal = merge(graphdef, params).config.causal
    scored_N = length_N - (np.maximum(prompt_N, 1) if causal else prompt_N)
    mine = np.array(mesh.local_rows(mesh_, batch_size))
    for sample in range(config.samples):
        key = jax.random.fold_in(jax.random.key(config.seed), sample)
        for first in range(0, count, batch_size):
            # Fill the last batch up with row 0, whose result is dropped, so that only one shape is compiled.
            row = first + mine
            index = np.where(row < count, row, 0)
            batch = {name: x[index] for name, x in zip(("tokens", "length", "prompt"), rows, strict=False)}
            batch = mesh.place_batch({**batch, "row": row.astype(np.int32)}, mesh_, batch_size)
            nats_B = bound(graphdef, params, *batch.values(), key, chunk=chunk, mask_id=mask_id)
            total += float(np.asarray(nats_B, np.float64)[: count - first].sum())
            if not math.isfinite(total):
                raise NonFinite
    tokens = int(scored_N.sum())
    in_bytes = float((bytes_N * scored_N / (length_N - prompt_N)).sum()) if causal else int(bytes_N.sum())
    nats = total / config.samples / tokens
    return {
        "nats_per_token": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": nats * tokens / math.log(2) / max(in_bytes, 1),
    }
