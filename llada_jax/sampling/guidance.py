"""Classifier-free guidance without a classifier or training for it (Eq. 16 of arXiv 2502.09992).

logits = un + (w + 1) (cond - un), where un are the logits of the same canvas with its prompt replaced by
MASK. The head is linear and has no bias, so hidden states are combined instead: one pass through the head.
"""

import jax
import jax.numpy as jnp

from llada_jax.model.transformer import Transformer


def guide(h_cond_BTD: jax.Array, h_un_BTD: jax.Array, scale: jax.typing.ArrayLike) -> jax.Array:
    """h_un + (scale + 1) (h_cond - h_un), combined in fp32, in the dtype of h_cond.

    Args:
      h_cond_BTD: hidden states given the prompt, as `Transformer.trunk` gives them.
      h_un_BTD: the same without the prompt.
      scale: w, at least 0; 0 is the model without guidance.
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
    """Guided hidden states (B, T, D) in the compute dtype, for the head.

    Two forward passes, one after the other through one compiled trunk: the memory of one. A row
    without a prompt is not changed by guidance.

    Args:
      model: the mask predictor.
      tokens_BT: int32, the canvas.
      given_BT: bool, True = a token of the prompt, which the unconditional pass does not see.
      real: which tokens may be attended to, as `Transformer.trunk` takes it, in both passes.
      scale: w, may be traced.
      mask_id: id of MASK; None = the model's own.
    """
    mask_id = model.config.mask_id if mask_id is None else mask_id
    canvas_2BT = jnp.stack([tokens_BT, jnp.where(given_BT, mask_id, tokens_BT)])
    h_2BTD = jax.lax.map(lambda canvas_BT: model.trunk(canvas_BT, real), canvas_2BT)
    return guide(h_2BTD[0], h_2BTD[1], scale)
