"""The flags that set how tokens are generated. Each command has its own defaults, so the flags themselves have none."""

from typing import Any

from absl import flags

_FLAGS = (
    flags.DEFINE_integer("steps", None, "The number of reverse steps. Default: one for each token."),
    flags.DEFINE_integer(
        "gen_length",
        None,
        "The number of tokens to generate; for chat, that of the longest answer. Default: 64 for sample (0 if the "
        "prompt has [MASK] in it), 128 for chat, and for evaluate the number that the task sets, or 256.",
    ),
    flags.DEFINE_integer("block_length", None, "Tokens per block; blocks are filled from left to right. Default: 32."),
    flags.DEFINE_float("temperature", None, "0 always takes the most probable token. Default: 0, or the task's own."),
    flags.DEFINE_string(
        "remasking", None, "Which predictions are kept: low_confidence (the default: the most confident) or random."
    ),
    flags.DEFINE_float("cfg_scale", None, "Guidance towards the prompt (Eq. 16), which doubles the time. Default: 0."),
    flags.DEFINE_boolean("logits_eos_inf", None, "Never choose EOS, so that all of gen_length becomes text."),
    flags.DEFINE_boolean(
        "confidence_eos_eot_inf", None, "Keep EOS and end of turn only where nothing else can be kept."
    ),
    flags.DEFINE_integer(
        "seed",
        None,
        "The seed of the noise: the same seed, settings and prompts give the same texts. Default: 0.",
        lower_bound=0,
        upper_bound=2**32 - 1,
    ),
)


def given() -> dict[str, Any]:
    """Returns the flags that the user has set, by name."""
    return {flag.name: flag.value for flag in _FLAGS if flag.value is not None}
