"""What a reverse step tells those who watch it: its canvas and, if asked for, how sure the model was of its tokens.

Nobody who does not watch pays for this: the scores are not part of the program that `sampler.generate` runs. A second
program computes them from the same canvas, which doubles the time of a step that is watched with its scores.

Letters in names, in addition to those of `model/transformer.py`: K slots of the active block, C slots of one chunk, N
alternatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.config import UserError


class Step(NamedTuple):
    """A reverse step, as `sampler.denoise_steps` yields it. Without scores, the last four fields are None.

    The probabilities are those of the softmax at temperature 1 over the whole vocabulary, after guidance, whatever
    rules say which tokens may be drawn. A score can be another number: it follows these rules, and the remasking.
    """

    tokens_BT: np.ndarray  # int32: the canvas after the step
    new_BT: np.ndarray  # bool: True for a token that this step put there
    score_BT: np.ndarray | None = None  # fp32: the scores of the step's predictions, kept or not; NaN where none is
    probability_BT: np.ndarray | None = None  # fp32: the probabilities of the predicted tokens; NaN where none is
    likely_BTN: np.ndarray | None = None  # int32: the most probable tokens, the best first; -1 where none is predicted
    likely_probability_BTN: np.ndarray | None = None  # fp32: the probabilities of these


class Seen(NamedTuple):
    """The predictions of a step, for the slots of the active block."""

    position_BK: jax.Array  # int32: where in the canvas the slot is, including padding
    masked_BK: jax.Array  # bool: True for a slot for which a token is predicted
    score_BK: jax.Array  # fp32
    probability_BK: jax.Array  # fp32
    likely_BKN: jax.Array  # int32
    likely_probability_BKN: jax.Array  # fp32


def open_id(mask_id: int | None) -> int:
    """Returns the id that stands where a step has no token yet: MASK, or -1 if the model does not know MASK."""
    return -1 if mask_id is None else mask_id


def nothing(like_BK: jax.Array, alternatives: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns arrays of the shapes and dtypes of `likeliest`, with the sizes and the sharding of an int32 array."""
    zero_BKN = jnp.zeros_like(like_BK)[:, :, None] + jnp.zeros(alternatives, jnp.int32)
    return like_BK.astype(jnp.float32), zero_BKN, zero_BKN.astype(jnp.float32)


def likeliest(
    logits_BCV: jax.Array, token_BC: jax.Array, allowed_V: jax.Array, alternatives: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns how probable the chosen tokens are, and which tokens are most probable.

    Args:
      logits_BCV: fp32 logits.
      token_BC: int32, the chosen tokens.
      allowed_V: bool, True for the ids that are tokens, other than MASK.
      alternatives: How many of the most probable tokens to find.

    Returns:
      The probabilities of the chosen tokens, fp32 (B, C); the most probable of the allowed tokens, best first and among
      equals the lowest id first, int32 (B, C, N); and their probabilities, fp32 (B, C, N).
    """
    below_BCV = logits_BCV - jnp.max(logits_BCV, axis=-1, keepdims=True)
    probability_BCV = jnp.exp(below_BCV) / jnp.sum(jnp.exp(below_BCV), axis=-1, keepdims=True)
    vocabulary = jnp.arange(logits_BCV.shape[-1])
    # Neither a lookup nor a sort is possible in a vocabulary that is split over devices.
    chosen_BC = jnp.sum(jnp.where(vocabulary == token_BC[..., None], probability_BCV, 0.0), axis=-1)
    left_BCV = jnp.where(allowed_V, probability_BCV, -1.0)
    likely, probabilities = [], []
    for _ in range(alternatives):
        best_BC = jnp.max(left_BCV, axis=-1)
        is_best_BCV = left_BCV == best_BC[..., None]
        id_BC = jnp.min(jnp.where(is_best_BCV, vocabulary, len(vocabulary) - 1), axis=-1).astype(jnp.int32)
        left_BCV = jnp.where(vocabulary == id_BC[..., None], -1.0, left_BCV)
        likely.append(id_BC)
        probabilities.append(best_BC)
    _, none_BCN, _ = nothing(token_BC, 0)
    likely_BCN = jnp.stack(likely, axis=-1) if likely else none_BCN
    return chosen_BC, likely_BCN, jnp.stack(probabilities, axis=-1) if likely else none_BCN.astype(jnp.float32)


def check(alternatives: int | None, vocab_size: int) -> None:
    """Raises UserError if so many alternatives cannot be given."""
    if alternatives is not None and not 0 <= alternatives < vocab_size:
        raise UserError(f"alternatives={alternatives}: it must be at least 0 and below the vocabulary of {vocab_size}")


def step(tokens_BT: np.ndarray, before_BT: np.ndarray, mask_id: int, seen: Seen | None) -> Step:
    """Returns the step that led from one canvas to another.

    Args:
      tokens_BT: int32, the canvas after the step.
      before_BT: int32, the canvas before it.
      mask_id: The id of MASK, or `open_id`.
      seen: The predictions of the step, for at least as many rows. None leaves the scores out.
    """
    new_BT = (tokens_BT != before_BT) & (tokens_BT != mask_id)
    if seen is None:
        return Step(tokens_BT, new_BT)
    position_BK, masked_BK, *values = (np.asarray(x)[: len(tokens_BT)] for x in seen)
    rows, slots = np.nonzero(masked_BK)
    fields = []
    for value in values:
        nothing = -1 if value.dtype == np.int32 else np.nan
        field = np.full((*tokens_BT.shape, *value.shape[2:]), nothing, value.dtype)
        field[rows, position_BK[rows, slots]] = value[rows, slots]
        fields.append(field)
    return Step(tokens_BT, new_BT, *fields)
