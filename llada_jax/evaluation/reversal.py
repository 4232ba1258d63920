"""Runs the couplet test for the reversal curse (arXiv 2502.09992, Section 3.3).

The model gets one line of a couplet of a classical Chinese poem and generates the next line (forward) or the line
before it (reversal), without having been tuned for this. A model that has learned its texts only from left to right is
much worse at the reversal. The test is also run in the way that is natural for a masked diffusion model: the missing
line is masked in the text of the couplet, and the model fills it in.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from llada_jax.config import UserError
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.text_completion import DEFAULTS, Options, complete_ids
from llada_jax.text.json_files import parse, read_text
from llada_jax.text.tokenizer import Tokenizer

GEN_LENGTH = 28  # tokens, as the authors set it: enough for the longest line, with some room to spare
# The authors' questions: "What is the line after (before) this one? Just output the line."
QUESTIONS = {"forward": "{}的下一句是什么？ 直接输出句子即可。", "reversal": "{}的上一句是什么？ 直接输出句子即可。"}
_MARKS = re.compile(r"[\s\W_]+")  # matches punctuation and spaces


@dataclasses.dataclass(frozen=True)
class Couplet:
    """Two consecutive lines of a poem."""

    first: str
    second: str


def read_couplets(path: str | Path) -> list[Couplet]:
    """Reads couplets from a JSON list of {"first": ..., "second": ...}.

    Raises:
      UserError: If the file cannot be read, is not a list of this form, is empty, or has an empty line in a couplet.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--data={path}: {error.strerror or error}") from None
    text = read_text(content, f"--data={path}")
    try:
        records = parse(text, "the file", finite=True)
        couplets = [Couplet(record["first"].strip(), record["second"].strip()) for record in records]
    except (UserError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'--data={path}: not a JSON list of {{"first": ..., "second": ...}}: {error!r}') from None
    if not couplets or any(not (couplet.first and couplet.second) for couplet in couplets):
        raise UserError(f"--data={path}: the file has no couplet in it, or has a couplet with an empty line")
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
    """Measures the accuracy in both directions, for generated and for filled-in lines.

    Args:
      model, tokenizer: The model and its tokenizer as `llada_jax.load` returns them.
      couplets: The couplets whose lines are asked for.
      options: The settings of generation. A gen_length of None means 28.
      key: The key of the noise.
      chat: Whether to ask through the chat template. If false, the question is a text to be continued, as for base
        models.
      batch_size: The number of prompts that are completed together.
      report: A function that is called after each of the four tests with its name and a list of (given line, wanted
        line, answer).

    Returns:
      The figures of each task: reversal_forward, reversal_backward, reversal_forward_infill and
      reversal_backward_infill; a causal model, which fills in nothing, has the first two only. They are named as in
      lm_eval: exact_match (the answer equals the line, apart from punctuation and spaces), contains (the line occurs
      somewhere in the answer, which is what the published script counts; not for the infill tasks), each with its
      binomial standard error, and sample_len, the number of couplets.
    """
    if options.gen_length is None:
        options = dataclasses.replace(options, gen_length=GEN_LENGTH)
    results = {}
    for task, direction, infill in _TASKS:
        if infill and model.config.causal:
            continue
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
    return tokenizer.encode_text(question + "\n")


def _with_gap(couplet: Couplet, direction: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes the couplet with its missing line replaced by as many MASK tokens as the line has tokens."""
    if direction == "forward":
        masks = [tokenizer.mask_id] * len(tokenizer.encode(couplet.second, continuation=True))
        end = tokenizer.encode("。", continuation=True)
        return tokenizer.encode_text(couplet.first + "，") + masks + end
    masks = [tokenizer.mask_id] * len(tokenizer.encode(couplet.first))
    return [*tokenizer.prefix, *masks] + tokenizer.encode(f"，{couplet.second}。", continuation=True)


def _filling(options: Options) -> Options:
    return dataclasses.replace(options, gen_length=0, length=DEFAULTS.length, steps=None)


def _filled(text: str, couplet: Couplet, direction: str) -> str:
    """Extracts the line that the model has filled into the gap of a couplet."""
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
