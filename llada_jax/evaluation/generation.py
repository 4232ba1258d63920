"""Says what the generation_kwargs of a task of lm_eval mean for LLaDA; refuses what is impossible; numbers prompts."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from llada_jax.config import UserError
from llada_jax.sampling.settings import check_settings
from llada_jax.sampling.text_completion import Options

DEFAULT_GEN_LENGTH = 256  # tokens, if neither the user nor the task sets a length
_KNOWN = {"until", "do_sample", "temperature", "max_gen_toks"}


class Generation(NamedTuple):
    """How the prompts of a task are completed."""

    options: Options
    until: list[str]  # the strings that end a completion
    unused: dict[str, Any]  # what the task sets although LLaDA has no such setting


def interpret(
    gen_kwargs: Mapping[str, Any],
    options: Options,
    gen_length: int | None,
    temperature: float | None,
    max_length: int | None,
) -> Generation:
    """Returns what the generation_kwargs of a task mean.

    Args:
      gen_kwargs: The generation_kwargs.
      options: The user's settings of generation.
      gen_length: The user's number of tokens to generate. None means the task's.
      temperature: The user's temperature. None means the task's.
      max_length: The largest number of tokens of prompt and answer together. None means that there is no limit.

    Raises:
      UserError: If a value is impossible, or if the answer leaves no room for a prompt.
    """
    try:
        asked = normalize_gen_kwargs(dict(gen_kwargs), DEFAULT_GEN_LENGTH)
        until = [asked["until"]] if isinstance(asked["until"], str) else list(asked["until"] or ())
        own = float(asked.get("temperature") or 0.0)
    except (ValueError, TypeError) as error:
        raise UserError(f"generation_kwargs={dict(gen_kwargs)!r:.200}: {error}") from None
    until = [stop for stop in until if stop is not None]
    if not all(isinstance(stop, str) for stop in until):
        raise UserError(f"generation_kwargs: until={until!r:.100} must be a text, or a list of texts")
    options = dataclasses.replace(
        options,
        gen_length=asked["max_gen_toks"] if gen_length is None else gen_length,
        temperature=own if temperature is None else float(temperature),
    )
    check_settings(options.sampler(0, options.gen_length))
    if options.gen_length < 1:
        raise UserError(f"gen_length={options.gen_length} leaves nothing to generate")
    if max_length is not None and max_length <= options.gen_length:
        raise UserError(
            f"gen_length={options.gen_length} leaves no room for a prompt: prompt and answer have at most {max_length} "
            "tokens (set a smaller gen_length=N, or a larger max_length=N)"
        )
    unused = {name: asked[name] for name in sorted(asked.keys() - _KNOWN)}
    return Generation(options, [stop for stop in until if stop], unused)


def about_unused(name: str, value: Any) -> str:
    """Returns the line that is printed once for a setting of a task that is not used."""
    return f"a task sets {name}={value} in generation_kwargs: it is not used, LLaDA has no such setting"


def cut(text: str, stops: Iterable[str]) -> str:
    """Returns the text up to the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def numbers(prompts: Iterable[Sequence[int]], sampled: Iterable[bool]) -> Iterator[int]:
    """Yields the number that determines the noise of each prompt.

    The number depends on the content of the prompt. Where a task samples, the number also depends on how many equal
    prompts were sampled before, so that repeated requests get different results; lm_eval never takes these results from
    its cache. The results of all other requests may come from the cache, so there equal requests get equal results.
    """
    seen: collections.Counter = collections.Counter()
    for prompt, again in zip(prompts, sampled, strict=True):
        content = json.dumps(list(prompt))
        digest = hashlib.sha256(f"{content} {seen[content]}".encode()).digest()
        seen[content] += again
        yield int.from_bytes(digest[:4], "little")
