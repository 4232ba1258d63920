"""Classifier-free guidance, which needs neither a classifier nor special training (Eq. 16 of arXiv 2502.09992).

The equation is logits = un + (w + 1) (cond - un), where cond are the logits of the canvas and un are the logits of
the same canvas with its prompt replaced by MASK. The head of the model is linear and has no bias, so this module
combines hidden states instead of logits, and the head runs only once.
"""

import jax
import jax.numpy as jnp

from llada_jax.model.transformer import Transformer


def guide(h_cond_BTD: jax.Array, h_un_BTD: jax.Array, scale: jax.typing.ArrayLike) -> jax.Array:
    """Returns h_un + (scale + 1) (h_cond - h_un), computed in fp32 and cast to the dtype of h_cond.

    Args:
      h_cond_BTD: The hidden states of the canvas with the prompt, as returned by `Transformer.trunk`.
      h_un_BTD: The hidden states of the same canvas without the prompt.
      scale: The guidance scale w, at least 0. With 0 there is no guidance.
    """
    h_cond_fp32, h_un_fp32 = h_cond_BTD.astype(jnp.float32), h_un_BTD.astype(jnp.float32)
    return (h_un_fp32 + (scale + 1.0) * (h_cond_fp32 - h_un_fp32)).astype(h_cond_BTD.dtype)


def guided_trunk(
    model: Transformer,
    tokens_BT: jax.Array,
    given_BT: jax.Array,
    real: jax.Array | None,
    scale: jax.typing.ArrayLike,
    mask_id: int | None = None,
) -> jax.Array:
    """Returns the guided hidden states (B, T, D) in the compute dtype, as input for the head.

    The two forward passes run one after the other through one compiled trunk, so they need the memory of one pass.
    Guidance does not change a row that has no prompt.

    Args:
      model: The mask predictor.
      tokens_BT: int32, the canvas.
      given_BT: bool, True for a token of the prompt. The unconditional pass sees MASK in its place.
      real: Which tokens may be attended to in both passes, in a form that `Transformer.trunk` accepts.
      scale: The guidance scale w, which may be traced.
      mask_id: The id of MASK. None means the model's own id.
    """
    mask_id = model.config.mask_id if mask_id is None else mask_id
    canvas_2BT = jnp.stack([tokens_BT, jnp.where(given_BT, mask_id, tokens_BT)])
    h_2BTD = jax.lax.map(lambda canvas_BT: model.trunk(canvas_BT, real), canvas_2BT)
    return guide(h_2BTD[0], h_2BTD[1], scale)
