"""The forward process q(x_t | x_0) and the training objectives (Section 2.1 of arXiv 2502.09992).

The noise of a row depends only on the seed, the step s and the index i of the row in the global batch. Its key is
fold_in(fold_in(key(seed), s), i); only low-discrepancy values of t come from the key of the step and from i directly.
Therefore a run does not depend on the number of devices, hosts or micro-batches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.config import Config, DiffusionConfig

GOLDEN_RATIO_32 = 0x9E3779B9  # 2**32 * (sqrt(5) - 1) / 2, rounded to an odd integer


class Corrupted(NamedTuple):
    """A batch after the forward process."""

    tokens_BT: jax.Array  # int32, the ids x_t, which are MASK where a token is masked
    mask_BT: jax.Array  # bool, True where a token is masked; only these tokens have a loss
    weight_BT: jax.Array  # fp32, the weight of each token's nll in the loss of its row; 0 where it is not masked
    p_mask_B: jax.Array  # fp32, the mask ratio of each row; `pretrain` says how it follows from t
    # int32, the id that each position must predict. None means that this is the token x_0 of the position itself.
    targets_BT: jax.Array | None = None


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """Returns the key for the noise of a step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def row_keys(key: jax.Array, row_B: jax.Array) -> jax.Array:
    """Returns one key per row of the global batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)


def unit_interval(bits: jax.Array) -> jax.Array:
    """Maps uint32 bits to fp32 numbers in (0, 1).

    The numbers are the mid-points of 2**23 equal bins. With 2**24 bins, the last mid-point would be rounded to 1.
    """
    return ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def low_discrepancy(key: jax.Array, row_B: jax.Array) -> jax.Array:
    """Returns frac(u + i * golden ratio) for each row i, in units of 2**-32 as uint32; u is random, once per step.

    The value of each single row is uniform. The values of any consecutive rows are nearly stratified.
    """
    offset = jax.random.bits(key, (), jnp.uint32)
    return offset + row_B.astype(jnp.uint32) * jnp.uint32(GOLDEN_RATIO_32)


def sample_t(key: jax.Array, row_B: jax.Array, kind: str) -> jax.Array:
    """Samples t for each row.

    Args:
      key: The key of the step.
      row_B: The int32 indices of the rows in the global batch.
      kind: A name in T_SAMPLING.

    Returns:
      The values t_B, fp32 in (0, 1). Each value is uniformly distributed.
    """
    return unit_interval(T_SAMPLING[kind](key, row_B))


def _independent(key: jax.Array, row_B: jax.Array) -> jax.Array:
    return jax.vmap(lambda k: jax.random.bits(jax.random.fold_in(k, 0), (), jnp.uint32))(row_keys(key, row_B))


T_SAMPLING = {"independent": _independent, "low_discrepancy": low_discrepancy}


def pretrain(key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int) -> Corrupted:
    """Masks a batch for pre-training (Eq. 3): every real token is masked with probability p_mask = (1 - eps) t + eps.

    The weight of a masked token is 1 / (p_mask * length), so that the loss of a row is sum(weight * nll). The
    expectation of this loss is the bound -E_t[1/t sum_i 1[x_t^i = MASK] log p(x_0^i | x_t)] / length, with p_mask as
    the mask ratio of each token.

    Three settings change this; their defaults are the paper's. config.loss_weight chooses other weights (LOSS_WEIGHTS).
    config.t_range draws t from a part of (0, 1): with the weights "elbo", the expectation is then the mean over this
    part, and with any weights it is no bound on the likelihood. With config.complementary, the rows 2k and 2k + 1,
    which must hold the same tokens, have the mask ratios p_mask = (1 - 2 eps) t + eps and 1 - p_mask, and each token is
    masked in exactly one of the two. The mask ratio of either row, on its own, is uniform in (eps, 1 - eps), so that
    the expectation of both losses is the bound.

    Args:
      key: The key of the step.
      batch: A dict with "tokens", int32 (B, T), the ids x_0, and "length", int32 (B,), the number of real tokens of
        each row. The tokens after them are padding, which is neither masked nor counted.
      row_B: The int32 indices of the rows in the global batch.
      config: The configuration, of which all but the objective and random_length_every are used.
      mask_id: The id of MASK.

    Returns:
      The batch after the forward process.
    """
    return _mask_from(jnp.zeros_like(batch["length"]), key, batch, row_B, config, mask_id)


def sft(key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int) -> Corrupted:
    """Masks a batch for supervised fine-tuning (Eq. 5): as `pretrain` does, but it never masks the prompt.

    The loss of a row is divided by the length of the answer (the paper's response r_0), L' = length - prompt, which
    includes EOS padding up to `length`. The expectation of this loss is
    -E_t[1/t sum_i 1[r_t^i = MASK] log p(r_0^i | p_0, r_t)] / L'.

    Args:
      key: The key of the step.
      batch: A dict as for `pretrain`, with "prompt" in addition, int32 (B,), the number of tokens of the prompt, which
        stands at the start of each row. It must be less than "length".
      row_B: The int32 indices of the rows in the global batch.
      config: The configuration, of which all but the objective and random_length_every are used.
      mask_id: The id of MASK.

    Returns:
      The batch after the forward process.
    """
    return _mask_from(batch["prompt"], key, batch, row_B, config, mask_id)


def sft_whole(key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int) -> Corrupted:
    """Masks a batch for iLLaDA's instruction tuning (arXiv 2606.25331).

    Prompt and answer are masked alike, as `pretrain` masks text.
    """
    return pretrain(key, batch, row_B, config, mask_id)


def next_token(
    key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int | None
) -> Corrupted:
    """Prepares a batch for an autoregressive model, which predicts the next token at each position. None is masked.

    The loss of a row is the mean of -log p(x^i | x^1 ... x^(i-1)) over its tokens but the first. Every token is seen,
    so the mask ratio is given as 1. The arguments are those of `pretrain`; noise, settings and mask_id are not used.
    """
    return _shifted(batch["tokens"], jnp.zeros_like(batch["length"]), batch["length"])


def next_token_sft(
    key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int | None
) -> Corrupted:
    """Prepares conversations for an autoregressive model: the loss of a row is the mean over its answer.

    The answer ends with its own EOS. The EOS tokens after it, which fill the row up to the longest of the batch, do not
    count, because no generation goes beyond the first. The arguments are those of `sft`.
    """
    tokens_BT, length_B = batch["tokens"], batch["length"]
    position_T = jnp.arange(tokens_BT.shape[1])
    # Each answer ends with EOS. So what is equal to the last token, up to the end of the row, is its EOS and padding.
    last_B = jnp.sum(jnp.where(position_T == length_B[:, None] - 1, tokens_BT, 0), axis=1)
    other_BT = (tokens_BT != last_B[:, None]) & (position_T < length_B[:, None])
    own_B = jnp.max(jnp.where(other_BT, position_T, -1), axis=1).astype(jnp.int32) + 2
    return _shifted(tokens_BT, batch["prompt"], jnp.minimum(own_B, length_B))


def _shifted(tokens_BT: jax.Array, first_B: jax.Array, length_B: jax.Array) -> Corrupted:
    """Lets each position predict the token after it, for the tokens from first_B up to the length of each row."""
    first_B = jnp.maximum(first_B, 1)
    position_T = jnp.arange(tokens_BT.shape[1])
    counts_BT = (position_T >= first_B[:, None] - 1) & (position_T < length_B[:, None] - 1)
    weight_B = 1 / jnp.maximum(length_B - first_B, 1).astype(jnp.float32)
    return Corrupted(
        tokens_BT,
        counts_BT,
        jnp.where(counts_BT, weight_B[:, None], 0.0),
        jnp.ones_like(weight_B),
        jnp.roll(tokens_BT, -1, axis=1),
    )


def _mask_from(
    first_B: jax.Array, key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int
) -> Corrupted:
    """Applies the forward process to the positions from first_B up to the length of each row.

    With config.complementary, the rows 2k and 2k + 1 share the noise of k: the second row masks what the first shows.
    """
    tokens_BT, length_B = batch["tokens"], batch["length"]
    noise_B = row_B // 2 if config.complementary else row_B
    low, high = config.t_range
    t_B = low + (high - low) * sample_t(key, noise_B, config.t_sampling)
    p_mask_B = (_most_masked(config) - config.eps) * t_B + config.eps
    length = tokens_BT.shape[1]
    uniform_BT = jax.vmap(lambda k: unit_interval(jax.random.bits(jax.random.fold_in(k, 1), (length,), jnp.uint32)))(
        row_keys(key, noise_B)
    )
    position_T = jnp.arange(length)
    free_BT = (position_T >= first_B[:, None]) & (position_T < length_B[:, None])
    mask_BT = uniform_BT < p_mask_B[:, None]
    if config.complementary:
        second_B = row_B % 2 == 1
        mask_BT ^= second_B[:, None]
        p_mask_B = jnp.where(second_B, 1 - p_mask_B, p_mask_B)
    mask_BT &= free_BT
    weight_BT = LOSS_WEIGHTS[config.loss_weight](p_mask_B, mask_BT.sum(axis=1), length_B - first_B)[:, None]
    return Corrupted(jnp.where(mask_BT, mask_id, tokens_BT), mask_BT, jnp.where(mask_BT, weight_BT, 0.0), p_mask_B)


def _most_masked(config: DiffusionConfig) -> float:
    """Returns p_mask at t = 1. Of two complementary rows, both mask at least the share eps."""
    return 1 - config.eps if config.complementary else 1


def masked_share(config: DiffusionConfig) -> float:
    """Returns the share of the tokens of a batch that are masked on average, if all of them may be: the mean of t.

    This is 0.5 for all of (0, 1), and for complementary rows. It leaves out eps, which adds less than eps to it. For
    objectives of autoregressive models, it is the share of the tokens that have a loss, 1.
    """
    if config.objective in OF_CAUSAL:
        return 1.0
    return sum(config.t_range) / 2


def t_of(p_mask_B: jax.Array, config: DiffusionConfig) -> jax.Array:
    """Returns the t of rows whose mask ratio is p_mask_B."""
    return (p_mask_B - config.eps) / (_most_masked(config) - config.eps)


def _elbo(p_mask_B: jax.Array, masked_B: jax.Array, length_B: jax.Array) -> jax.Array:
    return 1 / (p_mask_B * length_B)


def _count(p_mask_B: jax.Array, masked_B: jax.Array, length_B: jax.Array) -> jax.Array:
    return (length_B + 1) / (length_B * jnp.maximum(masked_B, 1).astype(jnp.float32))


def _plain(p_mask_B: jax.Array, masked_B: jax.Array, length_B: jax.Array) -> jax.Array:
    return 1 / length_B


# The weights of the masked tokens of a row, fp32 (B,): functions of the mask ratio of the row, of the number of tokens
# that are masked in it, and of the number of tokens L that could be. The loss of a row is sum(weight * nll).
#   elbo   1 / (p_mask L), as in Eq. 3 and 5.
#   count  (L + 1) / (n L) for n masked tokens. This is the mean of 1 / (p_mask L) over all t that mask n tokens, if t
#          is uniform in (0, 1) and eps -> 0, because then n is uniform in 0..L. The mean of the loss is therefore the
#          same, Eq. 6, but the randomness of n at a given t adds nothing to its variance.
#   plain  1 / L. The mean of the loss is E_t[p_mask * mean nll], which is no bound on the likelihood.
LOSS_WEIGHTS = {"elbo": _elbo, "count": _count, "plain": _plain}
OBJECTIVES = {
    "pretrain": pretrain,
    "sft": sft,
    "sft_whole": sft_whole,
    "next_token": next_token,
    "next_token_sft": next_token_sft,
}
OF_CAUSAL = ("next_token", "next_token_sft")  # objectives of autoregressive models
# Objectives that take prompts with answers; the others take packed text.
OF_CHAT = ("sft", "sft_whole", "next_token_sft")


def is_chat(config: Config) -> bool:
    """Returns whether a run trains on conversations, which its objective decides."""
    return config.diffusion.objective in OF_CHAT
