"""The flags that set how tokens are generated. Each command has its own defaults, so the flags themselves have none.

Their help names the defaults of the command that is running.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

# What a command does if a flag is not given, by flag. A flag that is missing here has the default of _SAME.
DEFAULTS = {
    "sample": {"gen_length": "64, or 0 if the prompt has [MASK] in it", "temperature": "0"},
    "chat": {"gen_length": "128", "temperature": "0"},
    "evaluate": {
        "steps": "one for each token",
        "gen_length": "the number of the recipe or the task, or 256; 28 for --tasks=reversal",
        "block_length": "the recipe's, or 32",
        "temperature": "the task's own, or 0",
        "cfg_scale": "the recipe's, or 0",
        "logits_eos_inf": "the recipe's, or false",
        "confidence_eos_eot_inf": "the recipe's, or false",
    },
}
_SAME = {
    "steps": "one for each token",
    "length": "fixed",
    "block_length": "32",
    "top_k": "0",
    "top_p": "1",
    "remasking": "low_confidence",
    "commit": "schedule",
    "commit_bound": "0.9, 1, 0.25, 0.01, 0.9, in the order of the rules",
    "cache": "none",
    "cache_refresh": "0",
    "suffix_window": "0",
    "revoke": "none",
    "revoke_bound": "0.008, 0.015, 1, 0.02, 0.9, in the order of the rules",
    "cfg_scale": "0",
    "logits_eos_inf": "false",
    "confidence_eos_eot_inf": "false",
    "seed": "0",
}
_MEANINGS = {
    "steps": "The number of reverse steps.",
    "gen_length": "The number of tokens to generate, or auto: blocks until the text ends (--length=append).",
    "length": "What the model sees of them: fixed (all), append (one block more at a time), daedal (as it needs).",
    "block_length": "Tokens per block; blocks are filled from left to right.",
    "temperature": "The scale of the noise; 0 always takes the most probable token.",
    "top_k": "Draw from this number of most probable tokens only; 0 draws from all.",
    "top_p": "Draw from the fewest most probable tokens with this probability together; 1 draws from all.",
    "remasking": "What predictions are kept by: low_confidence (their probability), margin, entropy or random.",
    "commit": "How many are kept: schedule (--steps), threshold, factor, frechet, entropy or local (all sure ones).",
    "commit_bound": "The bound of --commit.",
    "cache": "Keys and values to keep within a block: none, prefix (those before it) or dual (all outside of it).",
    "cache_refresh": "Steps after which they are computed anew; 0 is once per block.",
    "suffix_window": "Masked tokens behind the block that the model sees, besides the last position; 0 is all.",
    "revoke": "Take tokens back: none, remdm_cap, remdm_rescale, remdm_conf, remdm_loop (random), or wino (doubtful).",
    "revoke_bound": "The bound of --revoke, a probability.",
    "cfg_scale": "Guidance towards the prompt (Eq. 16), which doubles the time; 0 is no guidance.",
    "logits_eos_inf": "Never choose EOS, so that all of gen_length becomes text.",
    "confidence_eos_eot_inf": "Keep EOS and end of turn only where nothing else can be kept.",
    "seed": "The seed of the noise: the same seed, settings and prompts give the same texts.",
}


def describe(name: str, command: str) -> str:
    """Returns the help of a flag.

    Args:
      name: The name of the flag.
      command: The name of the entry point, for example "sample". The help names a default only if this is a key of
        DEFAULTS.
    """
    meaning = _MEANINGS[name]
    if name == "gen_length" and command == "chat":
        meaning = "The largest number of tokens in an answer, or auto: blocks until it ends (--length=append)."
    if command not in DEFAULTS:
        return meaning
    return f"{meaning} Default: {(_SAME | DEFAULTS[command])[name]}."


def _command() -> str:
    """Returns the name of the entry point that this process runs, which is the name of its main module."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name.rpartition(".")[2] if spec else Path(getattr(main, "__file__", None) or "").stem


def _help(name: str) -> str:
    return describe(name, _command())


class _LengthParser(flags.IntegerParser):
    """Parses a number of tokens, or the word auto."""

    def __init__(self):
        super().__init__()
        self.syntactic_help = "an integer or auto"

    def parse(self, argument: str) -> int | str:
        return argument if argument == "auto" else super().parse(argument)


_FLAGS = (
    flags.DEFINE_integer("steps", None, _help("steps")),
    flags.DEFINE(_LengthParser(), "gen_length", None, _help("gen_length"), serializer=flags.ArgumentSerializer()),
    flags.DEFINE_string("length", None, _help("length")),
    flags.DEFINE_integer("block_length", None, _help("block_length")),
    flags.DEFINE_float("temperature", None, _help("temperature")),
    flags.DEFINE_integer("top_k", None, _help("top_k")),
    flags.DEFINE_float("top_p", None, _help("top_p")),
    flags.DEFINE_string("remasking", None, _help("remasking")),
    flags.DEFINE_string("commit", None, _help("commit")),
    flags.DEFINE_float("commit_bound", None, _help("commit_bound")),
    flags.DEFINE_string("cache", None, _help("cache")),
    flags.DEFINE_integer("cache_refresh", None, _help("cache_refresh")),
    flags.DEFINE_integer("suffix_window", None, _help("suffix_window")),
    flags.DEFINE_string("revoke", None, _help("revoke")),
    flags.DEFINE_float("revoke_bound", None, _help("revoke_bound")),
    flags.DEFINE_float("cfg_scale", None, _help("cfg_scale")),
    flags.DEFINE_boolean("logits_eos_inf", None, _help("logits_eos_inf")),
    flags.DEFINE_boolean("confidence_eos_eot_inf", None, _help("confidence_eos_eot_inf")),
    flags.DEFINE_integer("seed", None, _help("seed"), lower_bound=0, upper_bound=2**32 - 1),
)


def given() -> dict[str, Any]:
    """Returns the flags that the user has set, by name."""
    return {flag.name: flag.value for flag in _FLAGS if flag.value is not None}
