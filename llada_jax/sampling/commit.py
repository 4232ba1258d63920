"""Decides which predictions of a reverse step are committed, if not a fixed number of them.

Each rule looks at one row at a time, so a row's tokens never depend on the other rows. The prediction with the highest
score is always committed, which is the caller's part: it makes a row end after at most as many steps as it has MASK
tokens.

    threshold   score >= bound                                                     Fast-dLLM, arXiv 2505.22618
    factor      (n + 1) (1 - c_n) < bound                                          the same, Section 3.3
    frechet     c_1 + ... + c_n - (n - 1) - (1 - c_n) > bound                      Fast-dLLM++, arXiv 2606.02955
    entropy     H_1 + ... + H_n - max(H_1, ..., H_n) < bound                       EB-Sampler, arXiv 2505.24857
    local       score >= bound, or >= 0.75 within 4 positions of one such          LocalLeap, arXiv 2510.07081

c_n is the n-th highest probability of the block's masked tokens, and H_n is the entropy at the n-th best position in
nats. The left sides of factor, frechet and entropy are monotonic in n, so what they commit is a prefix of the order.

Letters in names, in addition to those of `model/transformer.py`: K slots of the active block, best score first.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

RELAXED, RADIUS = 0.75, 4  # of the rule "local", as published


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Ranked:
    """The predictions of a block, the highest score first; slots without a prediction come last, with score -inf."""

    score_BK: jax.Array  # fp32: the score of the remasking strategy
    entropy_BK: jax.Array  # fp32, nats: the entropy of the distribution at the position; 0 if the rule does not use it
    position_BK: jax.Array  # int32: where in the canvas the slot is


def threshold(ranked: Ranked, bound: jax.Array) -> jax.Array:
    """Returns bool (B, K), True for a score of at least the bound."""
    return ranked.score_BK >= bound


def factor(ranked: Ranked, bound: jax.Array) -> jax.Array:
    """Returns bool (B, K), True for the n best if n + 1 times the doubt of the n-th is below the bound."""
    n_K = jnp.arange(1, ranked.score_BK.shape[1] + 1)
    return (n_K + 1) * (1 - ranked.score_BK) < bound


def frechet(ranked: Ranked, bound: jax.Array) -> jax.Array:
    """Returns bool (B, K), True for the n best if their Frechet bound, less the doubt of the n-th, is above `bound`.

    The Frechet bound, the sum of n probabilities less n - 1, is the least probability that all n are right together.
    """
    doubt_BK = 1 - ranked.score_BK
    # The sum of probabilities less (n - 1) is 1 less the sum of doubts, which loses no digits where all are sure.
    return 1 - jnp.cumsum(doubt_BK, axis=1) - doubt_BK > bound


def entropy(ranked: Ranked, bound: jax.Array) -> jax.Array:
    """Returns bool (B, K), True for the n best if their entropies, less the largest, add up to below the bound."""
    highest_BK = jax.lax.cummax(ranked.entropy_BK, axis=1)
    return jnp.cumsum(ranked.entropy_BK, axis=1) - highest_BK < bound


def local(ranked: Ranked, bound: jax.Array) -> jax.Array:
    """Returns bool (B, K), True for a score of at least the bound, or of at least 0.75 near such a position."""
    sure_BK = ranked.score_BK >= bound
    distance_BKK = jnp.abs(ranked.position_BK[:, :, None] - ranked.position_BK[:, None, :])
    near_BK = jnp.any((distance_BKK <= RADIUS) & sure_BK[:, None, :], axis=2)
    return sure_BK | (near_BK & (ranked.score_BK >= RELAXED))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule, the bound that it has by default, and the remasking strategies whose scores it can be used with."""

    passes: Callable[[Ranked, jax.Array], jax.Array]
    bound: float
    remasking: tuple[str, ...]


RULES = {
    "threshold": Rule(threshold, 0.9, ("low_confidence", "margin")),
    "factor": Rule(factor, 1.0, ("low_confidence",)),
    "frechet": Rule(frechet, 0.25, ("low_confidence",)),
    "entropy": Rule(entropy, 0.01, ("low_confidence", "margin", "entropy")),
    "local": Rule(local, 0.9, ("low_confidence", "margin")),
}
SCHEDULE = "schedule"  # commits the number of predictions that `remasking.schedule` says
CHOICES = (SCHEDULE, *RULES)


def progress(masked_BT: jax.Array, masks_B: jax.Array, block_length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns where each row stands if the number of tokens per step is not known in advance.

    Everything follows from which tokens are still masked. The index within the block is the number of the block's
    tokens that are no longer masked. It grows with each step, and if each step unmasks one token it is the number that
    `remasking.schedule` gives, so that the noise is the same.

    Args:
      masked_BT: bool, True for a slot that is still masked, in the order in which a row's slots are filled.
      masks_B: int32, the number of MASK tokens to fill in each row.
      block_length: The number of tokens per block.

    Returns:
      Three int32 arrays of shape (B,): the index of the active block; the index within it, for the noise; and 1, or 0
      for a row that is finished.
    """
    block_B = jnp.argmax(masked_BT, axis=1).astype(jnp.int32) // block_length
    slot_T = jnp.arange(masked_BT.shape[1])
    first_B = block_B * block_length
    in_block_BT = (slot_T >= first_B[:, None]) & (slot_T < first_B[:, None] + block_length)
    tokens_B = jnp.clip(masks_B - first_B, 0, block_length)
    inner_B = tokens_B - jnp.sum(masked_BT & in_block_BT, axis=1, dtype=jnp.int32)
    return block_B, inner_B, jnp.any(masked_BT, axis=1).astype(jnp.int32)
