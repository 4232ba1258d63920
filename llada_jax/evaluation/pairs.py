"""Encodes the prompts and answers that lm_eval builds, and decides where a prompt ends and its answer begins."""

import re
from typing import NamedTuple

from llada_jax.config import UserError
from llada_jax.text.json_files import check_unicode
from llada_jax.text.tokenizer import Tokenizer

# Stands in front of each control token that a chat template writes. lm_eval builds a prompt from the template's output
# and from the texts of documents and examples; only marked control tokens are encoded as control tokens. The mark is a
# Unicode noncharacter, so it does not occur in texts.
CONTROL = "\ufdd0"
RULE = 2  # the number of the rule by which prompts and answers are told apart; scores that are kept belong to one rule
END = CONTROL + CONTROL  # stands behind what a chat template writes: an answer, or its beginning, follows


class _Start(NamedTuple):
    """What comes before the plain text in a prompt: what a chat template wrote, or what stands before every text."""

    ids: list[int]
    continuation: bool  # whether the plain text continues other text


class Encoder:
    """Encodes texts in which CONTROL marks the control tokens and END the end of a rendered chat."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._marked = re.compile(CONTROL + tokenizer.control_pattern.pattern)

    def text(self, string: str, prefix: bool = True) -> list[int]:
        """Returns the ids of a prompt or a document.

        Args:
          string: The prompt: a plain text, or a rendered chat and the beginning of an answer.
          prefix: Whether the ids that the tokenizer puts in front of every text are put in front of a plain text. They
            are never put in front of a chat, whose template writes them if they belong there.
        """
        check_unicode(string, "a text of the task")
        start, text = self._start(string, prefix)
        return start.ids + self._behind(start, text)

    def pair(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a prompt and of its answer; together they are exactly the text of both.

        White space at the end of a plain text belongs to the answer, because tokens of words usually begin with it.
        White space at the end of what a chat template writes belongs to the prompt, as in training. If a token of the
        whole text would reach over the boundary, the answer is encoded alone, as the continuation of the prompt.

        Args:
          context: The prompt, as in `text`. If it is empty, the prompt consists of the tokenizer's prefix.
          answer: The text of the answer.

        Raises:
          UserError: If the tokenizer makes no token of the answer although it is not empty, or if a text contains a
            lone surrogate.
        """
        check_unicode(context + answer, "a text of the task")
        start, text = self._start(context)
        end = len(text.rstrip())
        text, answer = text[:end], text[end:] + answer
        prompt, whole = self._behind(start, text), self._behind(start, text + answer)
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            ids = whole[len(prompt) :]
        else:
            ids = self._tokenizer.encode(answer, continuation=True) if text else whole
        if answer and not ids:
            raise UserError(f"the tokenizer makes no token of the answer {answer!r:.100}, so it cannot be scored")
        return start.ids + prompt, ids

    def _start(self, string: str, prefix: bool = True) -> tuple[_Start, str]:
        """Returns what comes before the plain text in a prompt, and the plain text."""
        chat, end, text = string.rpartition(END)
        if not end:
            if self._marked.search(string) is None:
                return _Start(list(self._tokenizer.prefix) if prefix else [], False), string
            chat, text = string, ""
        plain, found = "", []
        for i, part in enumerate(self._marked.split(chat)):
            if i % 2:
                found.append((len(plain), part))
            plain += part
        return _Start(self._tokenizer.encode_found(plain, found), bool(plain)), text

    def _behind(self, start: _Start, text: str) -> list[int]:
        return self._tokenizer.encode(text, continuation=start.continuation)
