"""For services: prompts of any length in a few shapes, whose programs are compiled before the first request."""

from collections.abc import Sequence

import jax
import numpy as np

from llada_jax.config import SamplerConfig, UserError
from llada_jax.devices import mesh
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import causal
from llada_jax.sampling.canvas import arguments, scalar
from llada_jax.sampling.sampler import begin, denoise
from llada_jax.sampling.settings import resolve


def pad(prompts: Sequence[Sequence[int]], widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts on the left to the narrowest of a few widths, so that the sampler is compiled for these only.

    A width is taken only if it is above the length of each prompt: without any padding the program is another one.

    Args:
      prompts: The ids of each prompt.
      widths: The widths, in any order.

    Returns:
      The prompts, int32 (B, T), and bool (B, T), True for a real token: two arguments of `generate`.

    Raises:
      UserError: If there is no width, or if a prompt is too long for all of them.
    """
    if not len(widths):
        raise UserError("there is no width: give at least one, which is above the length of each prompt")
    longest = max((len(ids) for ids in prompts), default=0)
    width = min((width for width in widths if width > longest), default=None)
    if width is None:
        raise UserError(f"a prompt has {longest} tokens: it must have fewer than the largest width, {max(widths)}")
    prompt_BT = np.zeros((len(prompts), width), np.int32)
    real_BT = np.zeros(prompt_BT.shape, bool)
    for row, ids in enumerate(prompts):
        prompt_BT[row, width - len(ids) :], real_BT[row, width - len(ids) :] = ids, True
    return prompt_BT, real_BT


def warm_up(model: Transformer, config: SamplerConfig, widths: Sequence[int], batch_size: int = 1) -> None:
    """Compiles the sampler for prompts that `pad` has padded to these widths. No reverse step is taken.

    A causal model reads the padding once.

    Args:
      model: The mask predictor.
      config: The settings. Which of them may change afterwards without compiling, the docstring of `generate` says.
      widths: The widths of `pad`. The canvas is longer by config.gen_length.
      batch_size: B, the number of prompts per call.

    Raises:
      UserError: If a setting is impossible, or if a cache does not fit into the memory of the devices.
    """
    config = resolve(config, model)
    token = int(config.mask_id == 0)  # any token but MASK, which some settings refuse
    for width in sorted(set(widths)):
        prompt_BT, real_BT = pad([[token] * (width - 1)] * batch_size, [width])
        with mesh.mesh_of(model.embedding[...]):
            dials, static = arguments(config)
            if model.config.causal:
                state, _ = causal.begin(model, prompt_BT, config, jax.random.key(0), real_BT)
                causal.extend(model, state, scalar(0), dials, config=static)
                continue
            rows, state = begin(model, prompt_BT, config, jax.random.key(0), real_BT)
            denoise(model, rows, state, scalar(0), dials, config=static)
