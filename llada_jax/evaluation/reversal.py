"""The couplet test for the reversal curse (arXiv 2502.09992, Section 3.3).

Given one line of a couplet of a classical Chinese poem the model generates the next one (forward) or the one before
(reversal), without having been tuned for it. A model that only knows its texts from left to right is much worse at
the second. Here also as a masked diffusion model does it by itself: the missing line of the couplet is filled in.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from llada_jax.config import UserError
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.text_completion import Options, complete_ids
from llada_jax.text.tokenizer import Tokenizer

GEN_LENGTH = 28  # tokens, the authors' setting: the longest line and some room
# The questions, as the authors ask them: "What is the line after (before) this? Just give the line."
QUESTIONS = {"forward": "{}的下一句是什么？ 直接输出句子即可。", "reversal": "{}的上一句是什么？ 直接输出句子即可。"}
_MARKS = re.compile(r"[\s\W_]+")  # punctuation and spaces


@dataclasses.dataclass(frozen=True)
class Couplet:
    """Two lines that follow one another."""

    first: str
    second: str


def read_couplets(path: str | Path) -> list[Couplet]:
    """A JSON list of {"first": ..., "second": ...}. UserError if it is not one."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        couplets = [Couplet(record["first"].strip(), record["second"].strip()) for record in records]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data={path}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'--data={path}: not a JSON list of {{"first": ..., "second": ...}}: {error!r}') from None
    if not couplets or any(not (couplet.first and couplet.second) for couplet in couplets):
        raise UserError(f"--data={path}: there is no couplet in it, or one with an empty line")
    return couplets


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    couplets: Sequence[Couplet],
    options: Options,
    key: jax.Array,
    chat: bool = False,
    batch_size: int = 8,
    report: Callable[[str, list[tuple[str, str, str]]], None] = lambda task, done: None,
) -> dict[str, dict[str, float | int | str]]:
    """Accuracies in both directions, generated and filled in.

    Args:
      model, tokenizer: from `llada_jax.load`.
      couplets: what is asked for.
      options: of the generation; gen_length None = 28.
      key: of the noise.
      chat: ask through the chat template; else the question is a text to be continued (base models).
      batch_size: prompts at once.
      report: told after each of the four tests what was (given, wanted, answered).

    Returns:
      By task (reversal_forward, reversal_backward, the same with _infill) figures as lm_eval names them: exact_match
      (the answer is the line, punctuation aside), contains (the line is somewhere in the answer: the published script
      counts this), each with its binomial standard error, and sample_len.
    """
    if options.gen_length is None:
        options = dataclasses.replace(options, gen_length=GEN_LENGTH)
    results = {}
    for task, direction, infill in _TASKS:
        given = [c.first if direction == "forward" else c.second for c in couplets]
        wanted = [c.second if direction == "forward" else c.first for c in couplets]
        if infill:
            prompts = [_with_gap(c, direction, tokenizer) for c in couplets]
            answers = complete_ids(model, tokenizer, prompts, _filling(options), key, batch_size=batch_size)
            answers = [_filled(a, c, direction) for a, c in zip(answers, couplets, strict=True)]
        else:
            prompts = [_ask(QUESTIONS[direction].format(line), tokenizer, chat) for line in given]
            answers = complete_ids(model, tokenizer, prompts, options, key, batch_size=batch_size)
        report(task, list(zip(given, wanted, answers, strict=True)))
        results[task] = _figures(task, wanted, answers, both=not infill)
    return results


_TASKS = (
    ("reversal_forward", "forward", False),
    ("reversal_backward", "reversal", False),
    ("reversal_forward_infill", "forward", True),
    ("reversal_backward_infill", "reversal", True),
)


def _ask(question: str, tokenizer: Tokenizer, chat: bool) -> list[int]:
    if chat:
        return tokenizer.encode_chat([{"role": "user", "content": question}])
    return tokenizer.encode(question + "\n")


def _with_gap(couplet: Couplet, direction: str, tokenizer: Tokenizer) -> list[int]:
    """The couplet with as many MASKs as the missing line has tokens."""
    if direction == "forward":
        masks = [tokenizer.mask_id] * len(tokenizer.encode(couplet.second, continuation=True))
        end = tokenizer.encode("。", continuation=True)
        return tokenizer.encode(couplet.first + "，") + masks + end
    masks = [tokenizer.mask_id] * len(tokenizer.encode(couplet.first))
    return masks + tokenizer.encode(f"，{couplet.second}。", continuation=True)


def _filling(options: Options) -> Options:
    return dataclasses.replace(options, gen_length=0, steps=None)


def _filled(text: str, couplet: Couplet, direction: str) -> str:
    """What stands in the gap of a filled-in couplet."""
    if direction == "forward":
        return text.removeprefix(couplet.first + "，").removesuffix("。")
    return text.removesuffix(f"，{couplet.second}。")


def _bare(text: str) -> str:
    return _MARKS.sub("", text)


def _figures(task: str, wanted: Sequence[str], answers: Sequence[str], both: bool) -> dict[str, float | int | str]:
    pairs = [(_bare(line), _bare(answer)) for line, answer in zip(wanted, answers, strict=True)]
    figures: dict[str, float | int | str] = {"alias": task, "sample_len": len(pairs)}
    hits = {"exact_match": [line == answer for line, answer in pairs]}
    if both:
        hits["contains"] = [line in answer for line, answer in pairs]
    for name, hit in hits.items():
        rate = sum(hit) / len(hit)
        figures[f"{name},none"] = rate
        figures[f"{name}_stderr,none"] = math.sqrt(rate * (1 - rate) / len(hit))
    return figures
