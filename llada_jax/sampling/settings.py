"""Checks the settings and the prompts of the sampler before anything is compiled."""

import dataclasses
import math

import numpy as np

from llada_jax.config import SamplerConfig, UserError
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import lengths
from llada_jax.sampling.commit import CHOICES, RULES, SCHEDULE
from llada_jax.sampling.remasking import REMASKING
from llada_jax.text.named_ids import others

LARGEST = 1e30  # a temperature or guidance scale; noise and logits times this number are still finite in float32
LARGEST_PACE = 10**8  # steps times tokens of a block
TO_THE_END = np.iinfo(np.int32).max
NONE, PREFIX, DUAL = CACHES = ("none", "prefix", "dual")
# The rules that take tokens back (sampling/revoking.py), with the bounds that were published for them.
REMDM = {"remdm_cap": 0.008, "remdm_rescale": 0.015, "remdm_conf": 1.0, "remdm_loop": 0.02}
WINO = "wino"
REVOKE_BOUNDS = REMDM | {WINO: 0.9}
REVOKE = (NONE, *REVOKE_BOUNDS)


def check_settings(config: SamplerConfig) -> SamplerConfig:
    """Returns the settings unchanged. Raises UserError if a setting is impossible with any model."""
    if config.gen_length == lengths.AUTO:
        raise UserError(
            "gen_length=auto: SamplerConfig takes the largest number of tokens, with length=append or daedal; "
            "text_completion.Options takes auto"
        )
    for name, least in (("steps", 1), ("block_length", 1), ("gen_length", 0)):
        if not least <= getattr(config, name) < TO_THE_END:
            raise UserError(f"{name}={getattr(config, name)}: it must be at least {least} and below 2**31 - 1")
    for name, none in (("temperature", "greedy"), ("cfg_scale", "no guidance")):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{name}={getattr(config, name)}: it must be 0 ({none}) or a positive number")
        if getattr(config, name) > LARGEST:
            raise UserError(f"{name}={getattr(config, name)}: it must be at most {LARGEST:g}, or float32 overflows")
    if config.remasking not in REMASKING:
        raise UserError(f"remasking={config.remasking!r}: choose one of {', '.join(REMASKING)}")
    if config.top_k < 0 or config.top_k >= TO_THE_END:
        raise UserError(f"top_k={config.top_k}: it must be 0 (all tokens) or the number of tokens to draw from")
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p={config.top_p}: it must be above 0 and at most 1 (all tokens)")
    if not config.temperature and (config.top_k or config.top_p < 1):
        name = "top_k" if config.top_k else "top_p"
        raise UserError(f"{name} has no effect at temperature 0, where always the most probable token is taken")
    _check_commit(config)
    _check_cache(config)
    _check_revoke(config)
    lengths.check(config)
    return config


def _check_commit(config: SamplerConfig) -> None:
    if config.commit not in CHOICES:
        raise UserError(f"commit={config.commit!r}: choose one of {', '.join(CHOICES)}")
    if config.commit == SCHEDULE:
        if config.commit_bound is not None:
            raise UserError(f"commit_bound={config.commit_bound} has no effect with commit=schedule")
        return
    fitting = RULES[config.commit].remasking
    if config.remasking not in fitting:
        raise UserError(f"commit={config.commit} needs remasking={' or '.join(fitting)}, not {config.remasking}")
    if config.commit_bound is not None and not config.commit_bound >= 0:
        raise UserError(f"commit_bound={config.commit_bound}: it must be at least 0")


def _check_cache(config: SamplerConfig) -> None:
    if config.cache not in CACHES:
        raise UserError(f"cache={config.cache!r}: choose one of {', '.join(CACHES)}")
    if not 0 <= config.cache_refresh < TO_THE_END:
        raise UserError(f"cache_refresh={config.cache_refresh}: it must be 0 (once per block) or a number of steps")
    if config.cache_refresh and config.cache == NONE:
        raise UserError(f"cache_refresh={config.cache_refresh} has no effect with cache=none")
    if not 0 <= config.suffix_window < TO_THE_END:
        raise UserError(f"suffix_window={config.suffix_window}: it must be 0 (all) or a number of MASK tokens")


def _check_revoke(config: SamplerConfig) -> None:
    rule, bound = config.revoke, config.revoke_bound
    if rule not in REVOKE:
        raise UserError(f"revoke={rule!r}: choose one of {', '.join(REVOKE)}")
    if rule == NONE:
        if bound is not None:
            raise UserError(f"revoke_bound={bound} has no effect with revoke=none")
        return
    if rule in REMDM and config.commit != SCHEDULE:
        raise UserError(f"revoke={rule} follows the schedule of --steps: it needs commit=schedule, not {config.commit}")
    if rule in REMDM and config.steps * config.block_length > LARGEST_PACE:
        product = f"steps={config.steps} times block_length={config.block_length}"
        raise UserError(f"{product}: with revoke={rule} it must be at most {LARGEST_PACE:,}")
    if rule == WINO and config.commit == SCHEDULE:
        others = ", ".join(RULES)
        raise UserError(f"revoke=wino does not know how many steps it takes: it needs commit={others}, not schedule")
    if rule == "remdm_conf" and config.remasking != "low_confidence":
        raise UserError(f"revoke=remdm_conf needs remasking=low_confidence, not {config.remasking}")
    if bound is not None and not 0 <= bound <= 1:
        raise UserError(f"revoke_bound={bound}: it must be a probability, from 0 to 1")


def resolve(config: SamplerConfig, model: Transformer) -> SamplerConfig:
    """Returns the settings with the model's ids where they name none. Raises UserError if a setting is impossible."""
    check_settings(config)
    if model.config.causal:
        check_causal(config)
    ids = {name: getattr(config, name) for name in ("mask_id", "eos_id", "eot_id")}
    ids = {name: getattr(model.config, name) if i is None else i for name, i in ids.items()}
    if ids["mask_id"] is None and not model.config.causal:
        raise UserError("the model does not say which token is MASK: set mask_id in SamplerConfig")
    for name, i in ids.items():
        if i is not None and not 0 <= i < model.config.vocab_size:
            raise UserError(f"{name}={i} is not in the model's vocabulary of {model.config.vocab_size}")
    for name in ("logits_eos_inf", "confidence_eos_eot_inf", "stop_at_end"):
        if getattr(config, name) and ids["eos_id"] is None:
            raise UserError(f"{name}: the model does not say which token is EOS: set eos_id in SamplerConfig")
    if config.length != lengths.FIXED and ids["eos_id"] is None:
        raise UserError(
            f"length={config.length}: the model does not say which token is EOS: set eos_id in SamplerConfig"
        )
    further = model.config.end_ids if config.end_ids is None else tuple(config.end_ids)
    for i in further:
        if not 0 <= i < model.config.vocab_size or i == ids["mask_id"]:
            raise UserError(
                f"end_ids={further}: {i} is MASK, or not in the model's vocabulary of {model.config.vocab_size}"
            )
    # What is EOS or the end of a turn counts as that, whichever list names it as well.
    further = others(further, (ids["eos_id"], ids["eot_id"]))
    stop_at_end = config.stop_at_end or config.length == lengths.APPEND
    return dataclasses.replace(config, **ids, end_ids=further, stop_at_end=stop_at_end)


# What a causal model can be told; all other settings are about masks.
OF_CAUSAL = ("gen_length", "temperature", "top_k", "top_p", "logits_eos_inf", "stop_at_end", "end_ids")
OF_CAUSAL += ("mask_id", "eos_id", "eot_id")


def check_causal(config: SamplerConfig) -> None:
    """Raises UserError if a setting has another value than its default, but means nothing to a causal model."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in OF_CAUSAL and value != field.default:
            named = " (or gen_length=auto)" if field.name == "length" else ""
            raise UserError(
                f"{field.name}={value}{named}: this model is causal and writes one token after another, without MASK, "
                f"so that {field.name} means nothing: leave it out"
            )


def check_prompt(prompt_BT: np.ndarray, real_BT: np.ndarray | None, vocab_size: int) -> None:
    """Checks the prompts of a batch.

    Args:
      prompt_BT: The prompts, ids of shape (B, T).
      real_BT: True for a real token. None means that all tokens are real.
      vocab_size: The vocabulary size of the model.

    Raises:
      UserError: If a shape, a dtype or an id is impossible.
    """
    if prompt_BT.ndim != 2 or not len(prompt_BT) or (prompt_BT.size and prompt_BT.dtype.kind not in "iu"):
        raise UserError(f"the prompt must be int ids of shape (B, T), not {prompt_BT.dtype} of shape {prompt_BT.shape}")
    if prompt_BT.size and not (0 <= prompt_BT.min() and prompt_BT.max() < vocab_size):
        raise UserError(
            f"the prompt has ids from {prompt_BT.min()} to {prompt_BT.max()}: the model's vocabulary is {vocab_size}"
        )
    if real_BT is not None and real_BT.shape != prompt_BT.shape:
        raise UserError(f"prompt_mask_BT has shape {real_BT.shape}, but must have the prompt's shape {prompt_BT.shape}")
