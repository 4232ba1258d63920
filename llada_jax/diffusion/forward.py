"""The forward process q(x_t | x_0) and the training objectives (Section 2.1 of arXiv 2502.09992).

Every random number of row i in step s comes from fold_in(fold_in(key(seed), s), i), i the row in the
global batch: a run does not depend on the number of devices, hosts or micro-batches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.config import Config, DiffusionConfig

GOLDEN_RATIO_32 = 0x9E3779B9  # 2**32 * (sqrt(5) - 1) / 2, odd


class Corrupted(NamedTuple):
    """A batch after the forward process."""

    tokens_BT: jax.Array  # int32, x_t: MASK where masked
    mask_BT: jax.Array  # bool, where the loss is taken
    weight_BT: jax.Array  # fp32, of each position's nll in the loss of its row; 0 where not masked
    p_mask_B: jax.Array  # fp32, the mask ratio of each row: t, moved away from 0 by eps


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key of a step's noise."""
    return jax.random.fold_in(jax.random.key(seed), step)


def row_keys(key: jax.Array, row_B: jax.Array) -> jax.Array:
    """One key per global row."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)


def unit_interval(bits: jax.Array) -> jax.Array:
    """fp32 in (0, 1) from uint32 bits: mid-points of 2**23 equal bins. With 2**24 the last would be rounded to 1."""
    return ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def low_discrepancy(key: jax.Array, row_B: jax.Array) -> jax.Array:
    """frac(u + i * golden ratio) of row i as uint32: uniform for each row, nearly stratified over any run of rows."""
    offset = jax.random.bits(key, (), jnp.uint32)
    return offset + row_B.astype(jnp.uint32) * jnp.uint32(GOLDEN_RATIO_32)


def sample_t(key: jax.Array, row_B: jax.Array, kind: str) -> jax.Array:
    """t_B, fp32 in (0, 1), each uniform.

    Args:
      key: the step's key.
      row_B: int32 rows in the global batch.
      kind: a name in T_SAMPLING.
    """
    return unit_interval(T_SAMPLING[kind](key, row_B))


def _independent(key: jax.Array, row_B: jax.Array) -> jax.Array:
    return jax.vmap(lambda k: jax.random.bits(jax.random.fold_in(k, 0), (), jnp.uint32))(row_keys(key, row_B))


T_SAMPLING = {"independent": _independent, "low_discrepancy": low_discrepancy}


def pretrain(key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int) -> Corrupted:
    """Eq. 3: each real token is masked with p_mask = (1 - eps) t + eps, and weighs 1 / p_mask.

    The loss of a row, sum(weight * nll), is divided by its length; its expectation is the bound
    -E_t[1/t sum_i 1[x_t^i = MASK] log p(x_0^i | x_t)] / length for the token-wise mask ratio p_mask.

    Args:
      key: the step's key.
      batch: "tokens" int32 (B, T), x_0, and "length" int32 (B,), real tokens of each row; the rest is padding, neither
        masked nor counted.
      row_B: int32 rows in the global batch.
      config: t_sampling and eps.
      mask_id: id of MASK.
    """
    return _mask_from(jnp.zeros_like(batch["length"]), key, batch, row_B, config, mask_id)


def sft(key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int) -> Corrupted:
    """Eq. 5: as `pretrain`, of the response given the prompt, which is never masked.

    The loss of a row is divided by the length of its response, L' = length - prompt, EOS padding up to `length`
    counted; its expectation is -E_t[1/t sum_i 1[r_t^i = MASK] log p(r_0^i | p_0, r_t)] / L'.

    Args:
      batch: also has "prompt" int32 (B,), below "length": tokens of the prompt, at the start of each row.
    """
    return _mask_from(batch["prompt"], key, batch, row_B, config, mask_id)


def sft_whole(key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int) -> Corrupted:
    """iLLaDA's form of instruction tuning (arXiv 2606.25331): prompt and response are masked alike, as text is."""
    return pretrain(key, batch, row_B, config, mask_id)


def _mask_from(
    first_B: jax.Array, key: jax.Array, batch: dict, row_B: jax.Array, config: DiffusionConfig, mask_id: int
) -> Corrupted:
    """The forward process on the positions from first_B up to the length of each row."""
    tokens_BT, length_B = batch["tokens"], batch["length"]
    t_B = sample_t(key, row_B, config.t_sampling)
    p_mask_B = (1 - config.eps) * t_B + config.eps
    length = tokens_BT.shape[1]
    uniform_BT = jax.vmap(lambda k: unit_interval(jax.random.bits(jax.random.fold_in(k, 1), (length,), jnp.uint32)))(
        row_keys(key, row_B)
    )
    position_T = jnp.arange(length)
    free_BT = (position_T >= first_B[:, None]) & (position_T < length_B[:, None])
    mask_BT = (uniform_BT < p_mask_B[:, None]) & free_BT
    weight_BT = jnp.where(mask_BT, 1 / (p_mask_B * (length_B - first_B))[:, None], 0.0)
    return Corrupted(jnp.where(mask_BT, mask_id, tokens_BT), mask_BT, weight_BT, p_mask_B)


OBJECTIVES = {"pretrain": pretrain, "sft": sft, "sft_whole": sft_whole}
OF_CHAT = ("sft", "sft_whole")  # those that take prompts with responses; the others take packed text


def is_chat(config: Config) -> bool:
    """Whether a run is on conversations, by its objective."""
    return config.diffusion.objective in OF_CHAT
