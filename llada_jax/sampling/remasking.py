"""The decisions of a reverse step: how many tokens it unmasks, which tokens it predicts, and which of them stay.

Letters in names, in addition to those of `model/transformer.py`: C positions predicted together.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llada_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Place:
    """Where each row stands in a schedule that its blocks share; all fields are int32 (B,)."""

    block_B: jax.Array  # the index of the active block
    inner_B: jax.Array  # the index of the step within that block
    steps_B: jax.Array  # the number of steps of that block
    tokens_B: jax.Array  # the number of MASK tokens of that block
    total_B: jax.Array  # the number of steps of the row


def place(masks_B: jax.Array, steps: jax.Array, block_length: int, step: jax.Array, skip: bool = True) -> Place:
    """Returns where each row stands at a reverse step.

    The MASK tokens of a row are divided into ceil(masks / block_length) blocks; the last block may be shorter. Every
    block takes steps // blocks steps, and each of the first (steps mod blocks) blocks takes one more, but no block
    takes less than one step.

    Args:
      masks_B: int32, the number of MASK tokens to fill in each row.
      steps: int32 scalar, the total number of reverse steps.
      block_length: The number of tokens per block.
      step: int32 scalar or (B,), the number of reverse steps already done.
      skip: Whether to skip the steps of a block that are more than its tokens.
    """
    blocks_B = jnp.maximum(-(-masks_B // block_length), 1)
    share_B, extra_B = steps // blocks_B, steps % blocks_B

    def tokens_of(block_B):
        return jnp.clip(masks_B - block_B * block_length, 0, block_length)

    # The number of steps of a full block: long_B in the first extra_B blocks, short_B in the others.
    most = block_length if skip else np.iinfo(np.int32).max
    long_B, short_B = jnp.minimum(share_B + 1, most), jnp.clip(share_B, 1, most)

    def start_of(block_B):
        return jnp.minimum(block_B, extra_B) * long_B + jnp.maximum(block_B - extra_B, 0) * short_B

    def steps_of(block_B):
        all_B = jnp.maximum(share_B + (block_B < extra_B), 1)
        return jnp.minimum(all_B, tokens_of(block_B)) if skip else all_B

    last_B = blocks_B - 1
    total_B = start_of(last_B) + steps_of(last_B)
    after_B = step - extra_B * long_B
    block_B = jnp.where(after_B < 0, step // long_B, extra_B + after_B // short_B)
    block_B = jnp.minimum(block_B, last_B)
    return Place(block_B, step - start_of(block_B), steps_of(block_B), tokens_of(block_B), total_B)


def schedule(
    masks_B: jax.Array, steps: jax.Array, block_length: int, step: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns where each row stands at a reverse step of the linear schedule; for the arguments see `place`.

    A step unmasks (tokens of the block) // (steps of the block) tokens, and each of the first (tokens mod steps) steps
    of the block unmasks one more. Steps that would unmask nothing are skipped.

    Returns:
      Four int32 arrays of shape (B,): the index of the active block; the index of the step within that block; the
      number of tokens that the step unmasks (0 for a row that is finished); and the total number of steps of the row.
    """
    at = place(masks_B, steps, block_length, step)
    steps_B = jnp.maximum(at.steps_B, 1)  # a row without MASK tokens has none
    count_B = at.tokens_B // steps_B + (at.inner_B < at.tokens_B % steps_B)
    return at.block_B, at.inner_B, jnp.where(step < at.total_B, count_B, 0), at.total_B


def gumbel(key_BC: jax.Array, vocab_size: int) -> jax.Array:
    """Returns Gumbel noise, fp32 (B, C, V), with each value made from one 32-bit random number.

    A token is drawn because of the upper tail of its noise, so the noise needs a fine resolution there. With the usual
    24-bit uniform numbers no noise exceeds 16.6, and tokens of small probability are drawn too rarely; a vocabulary
    has about 10^5 of them. The formula -log(-log(1 - u)) uses the fine end of floating point for the upper tail:
    u = 2^-33 gives 22.9, the values of u are 2^-32 apart, and only noise below -2.8, which has a probability of 6e-8,
    is cut off.
    """

    def bits(key):
        return jax.random.bits(key, (vocab_size,), jnp.uint32, out_sharding=P("tensor"))

    uniform_BCV = (jax.vmap(jax.vmap(bits))(key_BC).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform_BCV, 1 - 2.0**-24)))


def allowed(config: ModelConfig, mask_id: int | None) -> jax.Array:
    """Returns bool (V,), True for the ids that may be chosen: those of tokens, except MASK.

    Without a tokenizer nobody knows which ids are tokens. Then all ids below config.token_count count as tokens.
    """
    vocabulary = jnp.arange(config.vocab_size)
    allowed_V = (vocabulary != mask_id) & (vocabulary < (config.token_count or config.vocab_size))
    if not config.holes:
        return allowed_V
    is_token_V = np.ones(config.vocab_size, bool)
    for first, end in config.holes:
        is_token_V[first:end] = False
    return allowed_V & is_token_V


def choose(
    logits_BCV: jax.Array,
    noise_BCV: jax.Array | None,
    allowed_V: jax.Array,
    unsure_V: jax.Array | None = None,
    absent_V: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per position by the Gumbel-max trick, and returns the tokens with their probabilities.

    Args:
      logits_BCV: fp32 logits.
      noise_BCV: fp32 Gumbel noise times the temperature. With None the most probable tokens are chosen.
      allowed_V: bool, True for tokens that may be chosen. The other tokens still count in the softmax.
      unsure_V: bool, True for tokens that may be chosen but do not count in the softmax: their probability is 0.
      absent_V: bool, True for tokens that are not chosen and do not count in the softmax, as if their logits were -inf.

    Returns:
      The tokens, int32 (B, C), and their probabilities, fp32 (B, C). The probabilities are those at temperature 1,
      whatever the temperature of the draw is. A probability is NaN if any logit of its position is NaN or infinite; the
      token then means nothing.
    """
    given_BCV = logits_BCV
    if absent_V is not None:
        logits_BCV = jnp.where(absent_V, -jnp.inf, logits_BCV)
    noisy_BCV = jnp.where(allowed_V, logits_BCV if noise_BCV is None else logits_BCV + noise_BCV, -jnp.inf)
    # Among equal logits the lowest id wins. jnp.argmax gives the same result, but takes six times as long on a CPU. The
    # barrier asks XLA to compute the noisy logits only once, which it may ignore. Computed twice, equal values can
    # differ in their last bits because of the logarithms in the noise, and then no value would be equal to the maximum;
    # so with noise, a value within rounding of the maximum is good enough.
    noisy_BCV = jax.lax.optimization_barrier(noisy_BCV)
    vocabulary, best_BC = jnp.arange(logits_BCV.shape[-1]), jnp.max(noisy_BCV, axis=-1)
    if noise_BCV is None:
        enough_BC = best_BC
    else:
        enough_BC = best_BC - 2.0**-20 * (jnp.abs(best_BC) + jnp.max(jnp.abs(noise_BCV), axis=-1))
    is_best_BCV = noisy_BCV >= enough_BC[..., None]
    token_BC = jnp.min(jnp.where(is_best_BCV, vocabulary, len(vocabulary) - 1), axis=-1)
    if unsure_V is not None:
        logits_BCV = jnp.where(unsure_V, -jnp.inf, logits_BCV)
    # The logit is found by a masked sum, because a vocabulary that is split over devices does not allow a lookup.
    is_token_BCV = vocabulary == token_BC[..., None]
    chosen_BC = jnp.sum(jnp.where(is_token_BCV, logits_BCV, 0.0), axis=-1)
    # Near 1, where ranks are decided, exp(logit - max) / sum is exact to the last bit; exp(logit - logsumexp) is not.
    max_BC = jnp.max(logits_BCV, axis=-1)
    # A logit that is not finite must not go unseen. Tested in the same pass over the vocabulary, it costs no time.
    exp_BCV = jnp.where(jnp.isfinite(given_BCV), jnp.exp(logits_BCV - max_BC[..., None]), jnp.nan)
    return token_BC.astype(jnp.int32), jnp.exp(chosen_BC - max_BC) / jnp.sum(exp_BCV, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Predictions:
    """What the scores of predictions are made of."""

    probability_BC: jax.Array  # fp32: the probability of the chosen token, as `choose` returns it
    logits_BCV: jax.Array  # fp32: the logits, with -inf for tokens that do not count in the softmax
    allowed_V: jax.Array  # bool: True for tokens that may be chosen
    key_BC: jax.Array  # PRNG keys


def low_confidence(predictions: Predictions) -> jax.Array:
    """Scores each prediction by its probability, so that the least confident predictions are remasked."""
    return predictions.probability_BC


def random(predictions: Predictions) -> jax.Array:
    """Scores each prediction by random noise, so that predictions are remasked at random."""
    return jax.vmap(jax.vmap(jax.random.uniform))(predictions.key_BC)


def margin(predictions: Predictions) -> jax.Array:
    """Scores by the probability of the best token less that of the second best, among those that may be chosen."""
    logits_BCV = predictions.logits_BCV
    weight_BCV = jnp.exp(logits_BCV - jnp.max(logits_BCV, axis=-1, keepdims=True))
    may_BCV = jnp.where(predictions.allowed_V, weight_BCV, 0.0)
    best_BC = jnp.max(may_BCV, axis=-1)
    is_best_BCV = may_BCV == best_BC[..., None]
    second_BC = jnp.max(jnp.where(is_best_BCV, 0.0, may_BCV), axis=-1)
    second_BC = jnp.where(jnp.sum(is_best_BCV, axis=-1) > 1, best_BC, second_BC)  # two are equally probable
    return (best_BC - second_BC) / jnp.sum(weight_BCV, axis=-1)


def entropies(logits_BCV: jax.Array) -> jax.Array:
    """Returns the entropies of the softmax over the vocabulary in nats, fp32 (B, C); logits may be -inf."""
    below_BCV = logits_BCV - jnp.max(logits_BCV, axis=-1, keepdims=True)
    weight_BCV = jnp.exp(below_BCV)
    sum_BC = jnp.sum(weight_BCV, axis=-1)
    return jnp.log(sum_BC) - jnp.sum(jnp.where(weight_BCV > 0, weight_BCV * below_BCV, 0.0), axis=-1) / sum_BC


def entropy(predictions: Predictions) -> jax.Array:
    """Scores each prediction by the negative entropy of the distribution at its position."""
    return -entropies(predictions.logits_BCV)


# The strategies by which a step scores its predictions. The predictions with the highest scores stay; among equal
# scores, the one at the lowest position stays.
REMASKING = {"low_confidence": low_confidence, "random": random, "margin": margin, "entropy": entropy}
LAST = -1e9  # a score below those of any strategy
