"""What a reverse step decides: how many tokens to unmask, which tokens, and which of them stay.

Letters in names, beside those of model.py: C positions predicted together.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def schedule(
    masks_B: jax.Array, steps: jax.Array, block_length: int, step: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Where each row stands at a reverse step: the linear schedule, shared between the blocks.

    A row's MASK tokens make ceil(masks / block_length) blocks, the last may be short. A block has
    steps // blocks steps, the first (steps mod blocks) blocks one more, at least one. A step
    unmasks (tokens of the block) // (its steps) tokens, the first (tokens mod steps) one more;
    steps that would unmask nothing are skipped.

    Args:
      masks_B: int32, MASK tokens to fill in each row.
      steps: int32 scalar, reverse steps in all.
      block_length: tokens per block.
      step: int32 scalar, reverse steps already done.

    Returns:
      int32 (B,): the active block; the step within it; how many tokens this step unmasks (0 for
      a row that is finished); how many steps the row takes in all.
    """
    blocks_B = jnp.maximum(-(-masks_B // block_length), 1)
    share_B, extra_B = steps // blocks_B, steps % blocks_B

    def steps_of(block_B):
        return jnp.maximum(share_B + (block_B < extra_B), 1)

    def tokens_of(block_B):
        return jnp.clip(masks_B - block_B * block_length, 0, block_length)

    # Steps that are not skipped, in a full block: one of the first `extra` blocks, and any other.
    long_B = jnp.minimum(share_B + 1, block_length)
    short_B = jnp.clip(share_B, 1, block_length)

    def start_of(block_B):
        return jnp.minimum(block_B, extra_B) * long_B + jnp.maximum(block_B - extra_B, 0) * short_B

    last_B = blocks_B - 1
    total_B = start_of(last_B) + jnp.minimum(steps_of(last_B), tokens_of(last_B))

    after_B = step - extra_B * long_B
    block_B = jnp.where(after_B < 0, step // long_B, extra_B + after_B // short_B)
    block_B = jnp.minimum(block_B, last_B)
    inner_B = step - start_of(block_B)
    tokens_B, block_steps_B = tokens_of(block_B), steps_of(block_B)
    count_B = tokens_B // block_steps_B + (inner_B < tokens_B % block_steps_B)
    return block_B, inner_B, jnp.where(step < total_B, count_B, 0), total_B


def gumbel(key_BC: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise, fp32 (B, C, V), from one 32-bit draw each.

    A token wins by the upper tail of its noise, so that is where resolution is needed: with the usual
    24-bit uniforms nothing beyond 16.6 exists, and tokens of small probability (there are 10^5) are drawn too
    rarely. -log(-log(1 - u)) puts the fine end of floating point there: u = 2^-33 gives 22.9, the grid is
    2^-32, and only noise below -2.8, of probability 6e-8, is cut off.
    """

    def bits(key):
        return jax.random.bits(key, (vocab_size,), jnp.uint32, out_sharding=P("tensor"))

    uniform_BCV = (jax.vmap(jax.vmap(bits))(key_BC).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform_BCV, 1 - 2.0**-24)))


def choose(
    logits_BCV: jax.Array, noise_BCV: jax.Array | None, allowed_V: jax.Array, unsure_V: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The tokens drawn (Gumbel-max; the most probable where noise is None) and how sure the model is of them.

    Args:
      logits_BCV: fp32; -inf for what is impossible.
      noise_BCV: fp32, Gumbel noise times the temperature.
      allowed_V: bool, tokens that may be chosen. The others keep their part of the softmax.
      unsure_V: bool, tokens that may be chosen but have no part in the softmax, and so a probability of 0.

    Returns:
      int32 (B, C) tokens; fp32 (B, C) their probability, at temperature 1 whatever the temperature of the draw.
    """
    noisy_BCV = jnp.where(allowed_V, logits_BCV if noise_BCV is None else logits_BCV + noise_BCV, -jnp.inf)
    # The lowest id among equals, as argmax, which takes a CPU six times as long. The barrier: computed once, or what is
    # equal here might differ in the last bit.
    noisy_BCV = jax.lax.optimization_barrier(noisy_BCV)
    vocabulary, best_BC = jnp.arange(logits_BCV.shape[-1]), jnp.max(noisy_BCV, axis=-1)
    is_best_BCV = noisy_BCV == best_BC[..., None]
    token_BC = jnp.min(jnp.where(is_best_BCV, vocabulary, len(vocabulary) - 1), axis=-1)
    if unsure_V is not None:
        logits_BCV = jnp.where(unsure_V, -jnp.inf, logits_BCV)
    # A masked sum instead of a lookup, which a vocabulary split over devices does not allow.
    is_token_BCV = vocabulary == token_BC[..., None]
    chosen_BC = jnp.sum(jnp.where(is_token_BCV, logits_BCV, 0.0), axis=-1)
    # exp(logit - max) / sum rather than exp(logit - logsumexp): exact to the last bit near 1, where ranks are decided.
    max_BC = jnp.max(logits_BCV, axis=-1)
    sum_BC = jnp.sum(jnp.exp(logits_BCV - max_BC[..., None]), axis=-1)
    return token_BC.astype(jnp.int32), jnp.exp(chosen_BC - max_BC) / sum_BC


def low_confidence(probability_BC: jax.Array, key_BC: jax.Array) -> jax.Array:
    """Remasks the least confident: the score to keep a prediction is its probability."""
    return probability_BC


def random(probability_BC: jax.Array, key_BC: jax.Array) -> jax.Array:
    """Remasks at random: the score to keep a prediction is noise."""
    return jax.vmap(jax.vmap(jax.random.uniform))(key_BC)


# How a step decides which predictions stay: the highest scores do, among equals the lowest position.
REMASKING = {"low_confidence": low_confidence, "random": random}
