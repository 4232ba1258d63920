"""Top-k and top-p: draws only from the most probable tokens.

Both find the least logit that may be drawn by bisection over the numbers of fp32, because sorting a vocabulary takes
much longer, and a vocabulary that is split over devices cannot be sorted on any one of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def truncate(logits_BCV: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None) -> jax.Array:
    """Returns the logits with -inf in place of tokens that may not be drawn.

    Top-k is applied first. Top-p then keeps each token for which the more probable tokens have less than top_p of the
    probability that is left: the fewest tokens that have at least top_p together, and all that are equally probable as
    the least of them.

    Args:
      logits_BCV: fp32 logits, divided by the temperature; -inf for tokens that may not be drawn anyway.
      top_k: int32 scalar, the number of tokens to keep, at least 1; equals of the k-th are kept too. None keeps all.
      top_p: fp32 scalar, above 0 and at most 1. None keeps all.
    """
    if top_k is not None:
        enough = _least(lambda x: jnp.sum(logits_BCV > x, axis=-1) < top_k, logits_BCV)
        logits_BCV = jnp.where(logits_BCV >= enough, logits_BCV, -jnp.inf)
    if top_p is not None:
        weight_BCV = jnp.exp(logits_BCV - jnp.max(logits_BCV, axis=-1, keepdims=True))
        share_BC = top_p * jnp.sum(weight_BCV, axis=-1)
        above = lambda x: jnp.sum(jnp.where(logits_BCV > x, weight_BCV, 0.0), axis=-1)  # noqa: E731
        enough = _least(lambda x: above(x) < share_BC, logits_BCV)
        logits_BCV = jnp.where(logits_BCV >= enough, logits_BCV, -jnp.inf)
    return logits_BCV


def _least(holds: Callable[[jax.Array], jax.Array], like_BCV: jax.Array) -> jax.Array:
    """Returns the least finite fp32 numbers, (B, C, 1), for which `holds` is True.

    Args:
      holds: Maps numbers (B, C, 1) to bool (B, C). If it holds for a number, it holds for all larger ones.
      like_BCV: Any array whose first two axes have the sizes and the sharding of the result.
    """
    largest = 0x7F7FFFFF  # the bits of the largest finite number

    def number(rank):  # The numbers of fp32 in ascending order have the ranks -largest - 1 ... largest.
        bits = jnp.where(rank < 0, -1 - rank, rank)
        return jnp.where(rank < 0, -1.0, 1.0) * jax.lax.bitcast_convert_type(bits, jnp.float32)

    zero = jnp.zeros_like(jnp.max(like_BCV, axis=-1, keepdims=True), jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # ranks; it holds at `high`
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # rounded down, without overflow
        yes = holds(number(middle))[..., None]
        return jnp.where(yes, low, middle + 1), jnp.where(yes, middle, high)

    return number(jax.lax.fori_loop(0, 32, halve, (zero - largest - 1, zero + largest))[1])
