"""Takes tokens of the active block back: what was committed too early is masked again, and predicted anew.

Four rules draw the tokens to take back at random, following ReMDM (arXiv 2503.00307). In the continuous process a share
alpha of the tokens is visible. A step from alpha_t to alpha_s masks each visible token with probability sigma, and
unmasks each masked one with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that a share alpha_s is
visible afterwards, whatever sigma is: sigma is at most sigma_max = min(1, (1 - alpha_s) / alpha_t). LLaDA's process
unmasks a number of tokens instead, those with the best scores. Here the step masks r tokens, drawn with these
probabilities, and unmasks the number of the schedule plus r, which has the same expectation. With sigma 0 it is the
process without the rule.

    remdm_cap      sigma = min(bound, sigma_max)
    remdm_rescale  sigma = bound sigma_max
    remdm_conf     sigma = bound sigma_max w, w = the softmax over the visible tokens of minus their probability when
                   they were committed
    remdm_loop     sigma = bound, while alpha stays at 0.9 for half of the steps; before them alpha grows to 0.9, behind
                   them to 1, and sigma is 0

WINO (arXiv 2507.18578) checks instead of drawing: each pass predicts the visible tokens of the block as if each were
the only one to be masked, with the shadows of `model/shadow.py`. A token whose probability there is below the bound is
taken back, the most doubtful first, but in a step fewer than the step before has committed, and none if the step
commits one token only. So a block ends after at most as many steps as it has tokens. A step commits at most 70 % of
what is masked, at least 5 and at most 20 tokens, of those that `commit` lets pass.

Letters in names, in addition to those of `model/transformer.py`: K slots of the active block, C slots of one chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llada_jax.config import SamplerConfig
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.canvas import Rows, put, take
from llada_jax.sampling.plan import Plan, is_any
from llada_jax.sampling.settings import NONE, REMDM, WINO
from llada_jax.sampling.step import HEAD_CHUNK, Block, slot_keys

FIRST = 30  # the number of tokens that WINO regards as committed before the first step of a block, as published


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Memory:
    """What a rule has to know of earlier steps. A field is None if the rule does not use it."""

    committed_BT: jax.Array | None = None  # fp32: the probability with which the token at a position was committed
    accepted_B: jax.Array | None = None  # int32: the number of tokens that the row's last step has committed


def nothing_known(tokens_BT: jax.Array, config: SamplerConfig) -> Memory | None:
    """Returns what is known before the first step, or None if the settings take nothing back."""
    if config.revoke == NONE:
        return None
    if config.revoke == "remdm_conf":
        return Memory(committed_BT=jnp.zeros_like(tokens_BT, jnp.float32))
    return Memory(accepted_B=jnp.zeros_like(tokens_BT[:, 0]) if config.revoke == WINO else None)


def draw(rows: Rows, plan: Plan, block: Block, memory: Memory, bound: jax.Array, config: SamplerConfig) -> jax.Array:
    """Draws the tokens that a rule of ReMDM takes back.

    Args:
      rows: The rows.
      plan: Where each row stands.
      block: The active block of each row.
      memory: What is known of earlier steps.
      bound: fp32 scalar, the bound of the rule.
      config: The settings of the sampler.

    Returns:
      bool (B, K), True for a slot whose token is masked again.
    """
    assert config.revoke in REMDM
    visible_BK = block.inside_BK & ~block.masked_BK
    pace = plan.pace
    left_B = pace.tokens_B - pace.after_B  # the number of tokens that are masked after the step
    most_B = jnp.minimum(1.0, left_B / jnp.maximum(pace.before_B, 1))[:, None]
    if config.revoke == "remdm_cap":
        sigma_BK = jnp.minimum(bound, most_B)
    elif config.revoke == "remdm_rescale":
        sigma_BK = bound * most_B
    elif config.revoke == "remdm_conf":
        doubt_BK = jnp.where(visible_BK, -take(memory.committed_BT, block.position_BK), -jnp.inf)
        # A row without visible tokens has no weights: nothing of it can be taken back.
        weight_BK = jax.nn.softmax(jnp.where(jnp.any(visible_BK, axis=1, keepdims=True), doubt_BK, 0.0), axis=1)
        sigma_BK = bound * most_B * weight_BK
    else:
        sigma_BK = jnp.where(pace.looping_B, bound, 0.0)[:, None]
    key_BK = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(slot_keys(rows, plan, block.index_BK), 2)
    uniform_BK = jax.vmap(jax.vmap(jax.random.uniform))(key_BK)
    # In rare draws there are more than tokens may be masked after the step: then those that were drawn most clearly.
    below_BK = jnp.where(visible_BK & (uniform_BK < sigma_BK), uniform_BK - sigma_BK, jnp.inf)
    return _first(below_BK, left_B)


def _first(order_BK: jax.Array, most_B: jax.Array) -> jax.Array:
    """Returns bool (B, K), True for the lowest finite numbers of each row, at most so many; of equals the first."""
    rank_BK = jnp.argsort(jnp.argsort(order_BK, axis=1, stable=True), axis=1)
    return (order_BK < jnp.inf) & (rank_BK < most_B[:, None])


def check(
    model: Transformer,
    h_BKD: jax.Array,
    tokens_BT: jax.Array,
    after_BT: jax.Array,
    block: Block,
    memory: Memory,
    bound: jax.Array,
    config: SamplerConfig,
) -> tuple[jax.Array, Memory]:
    """Finds the tokens that WINO takes back.

    Args:
      model: The mask predictor.
      h_BKD: The hidden states of the shadows of the block's slots.
      tokens_BT: int32, the canvas before the step.
      after_BT: int32, the canvas with what the step has committed.
      block: The active block of each row before the step.
      memory: What is known of earlier steps.
      bound: fp32 scalar, the least probability of a token that stays.
      config: The settings of the sampler.

    Returns:
      bool (B, K), True for a slot whose token is masked again; and what is known for the next step.
    """
    visible_BK = block.inside_BK & ~block.masked_BK
    new_BK = block.masked_BK & (take(after_BT, block.position_BK) != config.mask_id)
    accepted_B = jnp.sum(new_BK, axis=1, dtype=jnp.int32)
    before_B = jnp.where(jnp.any(visible_BK, axis=1), memory.accepted_B, FIRST)
    probability_BK = _probabilities(model, h_BKD, take(tokens_BT, block.position_BK), config)
    doubtful_BK = visible_BK & (probability_BK < bound)
    # Rows without a step commit nothing here, so that they neither lose a token nor forget their last step.
    most_B = jnp.where(accepted_B > 1, before_B - 1, 0)
    memory = Memory(accepted_B=jnp.where(accepted_B > 0, accepted_B, memory.accepted_B))
    order_BK = jnp.where(doubtful_BK, probability_BK, jnp.inf)
    return _first(order_BK, most_B), memory


def _probabilities(model: Transformer, h_BKD: jax.Array, token_BK: jax.Array, config: SamplerConfig) -> jax.Array:
    """Returns the probabilities fp32 (B, K) of these tokens, in the softmax that gives the confidence as well."""
    width = token_BK.shape[1]
    chunk = min(width, HEAD_CHUNK)
    vocabulary = jnp.arange(model.config.vocab_size)
    absent_V = is_any(vocabulary, (config.eos_id, *config.end_ids)) if config.logits_eos_inf else None

    def of_chunk(i, found_BK):
        h_BCD = jax.lax.dynamic_slice_in_dim(h_BKD, i * chunk, chunk, axis=1)
        token_BC = jax.lax.dynamic_slice_in_dim(token_BK, i * chunk, chunk, axis=1)
        logits_BCV = model.logits(h_BCD)
        if absent_V is not None:
            logits_BCV = jnp.where(absent_V, -jnp.inf, logits_BCV)
        weight_BCV = jnp.exp(logits_BCV - jnp.max(logits_BCV, axis=-1, keepdims=True))
        # A masked sum, because a vocabulary that is split over devices does not allow a lookup.
        own_BC = jnp.sum(jnp.where(vocabulary == token_BC[..., None], weight_BCV, 0.0), axis=-1)
        new_BC = own_BC / jnp.sum(weight_BCV, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(found_BK, new_BC, i * chunk, axis=1)

    return jax.lax.fori_loop(0, width // chunk, of_chunk, jnp.zeros_like(token_BK, jnp.float32))


def take_back(tokens_BT: jax.Array, block: Block, revoked_BK: jax.Array, config: SamplerConfig) -> jax.Array:
    """Returns the canvas with MASK at these slots."""
    position_BK = jnp.where(revoked_BK, block.position_BK, tokens_BT.shape[1])
    return put(tokens_BT, position_BK, jnp.full_like(position_BK, config.mask_id))


def most_accepted(block: Block) -> jax.Array:
    """Returns int32 (B,): the largest number of tokens that a step of WINO commits."""
    return jnp.clip(jnp.sum(block.masked_BK, axis=1, dtype=jnp.int32) * 7 // 10, 5, 20)
