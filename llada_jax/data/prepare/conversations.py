"""Reads conversations for instruction tuning from .jsonl files (also .gz, .xz) whose lines have any common shape.

A line has one of these shapes:

  {"messages": [{"role": "user" | "assistant" | "system" | ..., "content": "..."}, ...]}
  {"prompt": "...", "response": "..."}
  {"instruction": "...", "input": "...", "output": "..."}    "input" may be empty or absent
  {"question": "...", "answer": "..."}                       "context" may be added; it comes before the question

A line of one of the last three shapes becomes a message of the user and the assistant's answer. If the message of the
user has two parts, an empty line separates them. Other keys are ignored. The files of an input may have different
shapes, and so may the lines of a file.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llada_jax.config import UserError
from llada_jax.data.prepare.text import Corpus, json_lines, kind_of, opened, valid
from llada_jax.text.chat_template import check_messages

ASSISTANT = "assistant"
# Maps the keys that identify a shape to the keys whose texts make up the user's message, in order, and the key of the
# answer. A key in brackets may be absent.
_SHAPES = {
    ("prompt", "response"): (("prompt",), "response"),
    ("instruction", "output"): (("instruction", "[input]"), "output"),
    ("question", "answer"): (("[context]", "question"), "answer"),
}


class Conversation(NamedTuple):
    """The conversation of one line."""

    messages: list[dict[str, Any]]
    source: int  # index into the inputs
    where: str  # file and line, for error messages
    group: str  # all conversations of one group are in the same split


class Conversations(Corpus):
    """Yields the conversations of files or globs in a fixed order; it can be iterated several times."""

    def __init__(self, inputs: Sequence[str], group_key: str | None = None):
        """Finds the files that the inputs name.

        Args:
          inputs: Files or globs.
          group_key: The key whose value in a line names the group of the conversation. None means that conversations
            with the same messages before the first answer form a group.

        Raises:
          UserError: If an input names no file or a file that is not .jsonl, or if a file is named twice.
        """
        super().__init__(inputs)
        self._group_key = group_key
        for _, file in self._files:
            if kind_of(file)[0] != ".jsonl":
                raise UserError(f"{file} is not .jsonl: conversations are read from .jsonl files (also .gz, .xz)")

    def __iter__(self) -> Iterator[Conversation]:
        """Yields the conversations.

        Raises:
          UserError: If a line is not a conversation. The message names the file and the line.
        """
        for source, (where, record) in self._walk():
            messages = messages_of(record, where)
            if self._group_key is None:
                group = json.dumps(messages[: answers(messages)[0]], sort_keys=True)
            elif isinstance(record.get(self._group_key), str | int | float):
                group = valid(str(record[self._group_key]), where)
            else:
                raise UserError(f'{where}: group_key needs a text or a number under the key "{self._group_key}"')
            yield Conversation(messages, source, where, group)

    def _read(self, source: int, file: Path) -> Iterator[tuple[tuple[str, Any], int]]:
        with opened(file) as (raw, stream):
            for line in json_lines(file, stream):
                yield line, raw.tell()


def messages_of(record: Any, where: str) -> list[dict[str, Any]]:
    """Returns the messages of a line.

    Args:
      record: The value of the line.
      where: The file and the line, with which an error message begins.

    Raises:
      UserError: If the line has none of the known shapes, or several of them, or if its conversation has no answer.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: a conversation must be a JSON object, but this is {json.dumps(record)[:60]}")
    shapes = [keys for keys in (("messages",), *_SHAPES) if all(key in record for key in keys)]
    if len(shapes) != 1:
        known = ", ".join(" + ".join(keys) for keys in (("messages",), *_SHAPES))
        problem = "none" if not shapes else "several"
        raise UserError(
            f"{where}: the line has {problem} of the shapes {known}; its keys are {', '.join(record) or 'none'}"
        )
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
        raise UserError(
            f"{where}: the conversation has no answer, because no message of the assistant follows another message"
        )
    return messages


def _text(record: dict[str, Any], key: str, where: str) -> str:
    optional = key.startswith("[")
    key = key.strip("[]")
    value = record.get(key, "" if optional else None)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" must be a text, but it is {json.dumps(value)[:60]}')
    return value


def answers(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the positions of the answers: the assistant's messages, except one that begins the conversation."""
    return [i for i, message in enumerate(messages) if i and message["role"] == ASSISTANT]
