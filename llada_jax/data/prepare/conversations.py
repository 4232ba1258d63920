"""Conversations to tune on, out of .jsonl files (also .gz, .xz), whatever common shape their lines have.

A line is one of

  {"messages": [{"role": "user" | "assistant" | "system" | ..., "content": "..."}, ...]}
  {"prompt": "...", "response": "..."}
  {"instruction": "...", "input": "...", "output": "..."}    input may be empty or absent
  {"question": "...", "answer": "..."}                       with "context": that comes first

The last three are a message of the user, whose parts an empty line separates, and the assistant's answer. Other
keys are not looked at. Files may differ, and so may lines.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llada_jax.config import UserError
from llada_jax.data.prepare.text import Corpus, json_lines, kind_of, opened, valid
from llada_jax.text.chat_template import check_messages

ASSISTANT = "assistant"
# Keys that tell the shape -> keys whose texts are the user's message, in order; the answer. In brackets: may be absent.
_SHAPES = {
    ("prompt", "response"): (("prompt",), "response"),
    ("instruction", "output"): (("instruction", "[input]"), "output"),
    ("question", "answer"): (("[context]", "question"), "answer"),
}


class Conversation(NamedTuple):
    """One line."""

    messages: list[dict[str, Any]]
    source: int  # index into the inputs
    where: str  # file and line, for messages
    group: str  # conversations of one group are on the same side of the split


class Conversations(Corpus):
    """The conversations of files or globs, in a fixed order; can be iterated several times."""

    def __init__(self, inputs: Sequence[str], group_key: str | None = None):
        """Raises UserError for an input that names no file, no .jsonl file, or a file named twice.

        Args:
          inputs: files or globs.
          group_key: key of a line's value that it shares with those of its group; None = those that are alike up to
            their first answer are a group.
        """
        super().__init__(inputs)
        self._group_key = group_key
        for _, file in self._files:
            if kind_of(file)[0] != ".jsonl":
                raise UserError(f"{file}: conversations are read from .jsonl files (also .gz, .xz)")

    def __iter__(self) -> Iterator[Conversation]:
        """Yields the conversations; raises UserError, naming file and line, for one that is none."""
        for source, (where, record) in self._walk():
            messages = messages_of(record, where)
            if self._group_key is None:
                group = json.dumps(messages[: answers(messages)[0]], sort_keys=True)
            elif isinstance(record.get(self._group_key), str | int | float):
                group = valid(str(record[self._group_key]), where)
            else:
                raise UserError(f'{where}: no text or number under the key "{self._group_key}" (group_key)')
            yield Conversation(messages, source, where, group)

    def _read(self, source: int, file: Path) -> Iterator[tuple[tuple[str, Any], int]]:
        with opened(file) as (raw, stream):
            for line in json_lines(file, stream):
                yield line, raw.tell()


def messages_of(record: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a line. UserError, which begins with `where`, if it has none of the shapes, or several."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a conversation is an object, this is {json.dumps(record)[:60]}")
    shapes = [keys for keys in (("messages",), *_SHAPES) if all(key in record for key in keys)]
    if len(shapes) != 1:
        known = ", ".join(" + ".join(keys) for keys in (("messages",), *_SHAPES))
        problem = "none" if not shapes else "several"
        raise UserError(f"{where}: it has {problem} of the shapes {known}; its keys are {', '.join(record) or 'none'}")
    if shapes[0] == ("messages",):
        messages = record["messages"]
    else:
        parts, answer = _SHAPES[shapes[0]]
        texts = [text for part in parts if (text := _text(record, part, where))]
        messages = [
            {"role": "user", "content": "\n\n".join(texts)},
            {"role": ASSISTANT, "content": _text(record, answer, where)},
        ]
    try:
        check_messages(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    valid(json.dumps(messages, ensure_ascii=False), where)
    if not any(message["role"] == ASSISTANT for message in messages[1:]):
        raise UserError(f"{where}: nothing in it is an answer: no message of the assistant comes after another one")
    return messages


def _text(record: dict[str, Any], key: str, where: str) -> str:
    optional = key.startswith("[")
    key = key.strip("[]")
    value = record.get(key, "" if optional else None)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" must be a text, it is {json.dumps(value)[:60]}')
    return value


def answers(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Places of the messages to learn: those of the assistant that answer something."""
    return [i for i, message in enumerate(messages) if i and message["role"] == ASSISTANT]
