"""The rules for the length of a continuation: what they are called, what they go together with, what is shown of them.

    fixed    gen_length MASK tokens are there from the first step on, and the model sees them all
    append   the model sees the MASK tokens up to the end of the active block only, as if each block were appended when
             the one before it is finished; a row ends after a block with EOS
    daedal   the model's own confidence in EOS says how many MASK tokens there are (`daedal.py`)

With the last two, gen_length is the largest length.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llada_jax.config import ModelConfig, SamplerConfig, UserError

FIXED, APPEND, DAEDAL = LENGTHS = ("fixed", "append", "daedal")
AUTO = "auto"  # the value of gen_length for which `automatic` has another
NO_GAPS = "length=daedal only continues a prompt, but there is MASK in one: use length=fixed or append"
LONGEST = 1024  # tokens: the largest length if the user gives none


def check(config: SamplerConfig) -> None:
    """Raises UserError if there is no such rule, or if another setting does not go together with it."""
    if config.length not in LENGTHS:
        raise UserError(f"length={config.length!r}: choose one of {', '.join(LENGTHS)}")
    if config.length == APPEND and config.suffix_window:
        raise UserError(f"suffix_window={config.suffix_window} with length=append: nothing is behind the active block")
    if config.length != DAEDAL:
        return
    needs = {
        "commit": "threshold",
        "remasking": "low_confidence",
        "cache": "none",
        "suffix_window": 0,
        "revoke": "none",
        "logits_eos_inf": False,
        "confidence_eos_eot_inf": False,
    }
    for name, value in needs.items():
        if getattr(config, name) != value:
            raise UserError(f"length=daedal needs {name}={value}, not {getattr(config, name)}")


def automatic_limit(trained: int | None) -> int:
    """Returns the largest length if the user gives none: LONGEST, but at most half of what the model was trained with.

    Args:
      trained: The length, in tokens, of the sequences that the model was trained with. None means that it is unknown.
    """
    return LONGEST if trained is None else max(1, min(LONGEST, trained // 2))


def automatic(settings: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Returns the settings with what gen_length=auto means: blocks are appended, unless `length` says otherwise.

    Args:
      settings: Settings of the sampler by name, those that the user has given.
      limit: The gen_length that takes the place of "auto". None leaves gen_length out.

    Raises:
      UserError: If the length is both automatic and fixed.
    """
    if settings.get("gen_length") != AUTO:
        return dict(settings)
    if settings.get("length") == FIXED:
        raise UserError("gen_length=auto with length=fixed: give a number, or choose length=append or daedal")
    others = {name: value for name, value in settings.items() if name != "gen_length"}
    return {"length": APPEND} | others | ({} if limit is None else {"gen_length": limit})


def shown(tokens_T: np.ndarray, prompt_T: np.ndarray, config: SamplerConfig, ids: ModelConfig) -> int:
    """Returns how many tokens of a canvas there are to show: not the blocks to come, nor the EOS behind all else.

    Args:
      tokens_T: int32, the canvas at any time, without padding.
      prompt_T: int32, the prompt that it began with.
      config: The settings of the sampler.
      ids: The config of the model, whose ids MASK and EOS have.
    """
    given, length = len(prompt_T), len(tokens_T)
    if config.length == DAEDAL:
        text_T = np.flatnonzero(tokens_T[given:] != ids.eos_id)
        return given + (int(text_T[-1]) + 1 if len(text_T) else 0)
    todo_T = np.concatenate([np.flatnonzero(prompt_T == ids.mask_id), np.arange(given, length)])
    masked_T = tokens_T[todo_T] == ids.mask_id
    if config.length == FIXED or not masked_T.any():
        return length
    end = (int(masked_T.argmax()) // config.block_length + 1) * config.block_length
    return max(given, int(todo_T[end])) if end < len(todo_T) else length
