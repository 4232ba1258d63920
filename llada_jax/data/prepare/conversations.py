"""Reads conversations for instruction tuning from .jsonl files (also .gz, .xz).

shapes.py says which shapes a line may have. The files of an input may have different shapes, and so may the lines of a
file.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llada_jax.config import UserError
from llada_jax.data.prepare.left_out import BadItem
from llada_jax.data.prepare.shapes import ASSISTANT, read_line
from llada_jax.data.prepare.text import Corpus, kind_of, opened, records, valid


class Conversation(NamedTuple):
    """The conversation of one line."""

    messages: list[dict[str, Any]]
    source: int  # index into the inputs
    where: str  # file and line, for error messages
    group: str  # all conversations of one group are in the same split
    number: int = 0  # position in the whole input, counting bad lines
    masked: frozenset[int] = frozenset()  # positions of the answers that are context only
    variables: Mapping[str, Any] = {}  # further variables of the chat template, such as the tools


class Conversations(Corpus):
    """Yields the conversations of files or globs in a fixed order; it can be iterated several times.

    Attributes:
      unread: The keys of lines that have no effect, with the number of lines that have them, in the current iteration.
    """

    def __init__(self, inputs: Sequence[str], group_key: str | None = None, on_error: str = "stop"):
        """Finds the files that the inputs name.

        Args:
          inputs: Files or globs.
          group_key: The key whose value in a line names the group of the conversation. None means that conversations
            with the same messages before the first answer form a group.
          on_error: What is done with a bad line: "stop" or "skip".

        Raises:
          UserError: If an input names no file or a file that is not .jsonl, or if a file is named twice.
        """
        super().__init__(inputs, on_error=on_error)
        self._group_key = group_key
        self.unread: Counter[str] = Counter()
        for _, file in self._files:
            if kind_of(file)[0] != ".jsonl":
                raise UserError(f"{file} is not .jsonl: conversations are read from .jsonl files (also .gz, .xz)")

    def __iter__(self) -> Iterator[Conversation]:
        """Yields the conversations.

        Raises:
          UserError: If a line is not a conversation. The message names the file and the line.
        """
        self.unread.clear()
        for source, (where, record) in self._walk():
            try:
                read = read_line(record, where, self._group_key)
                group = self._group(record, read.messages, where)
            except BadItem as error:
                self.faults.add(error, self.items)
                continue
            self.good += 1
            self.unread.update(read.unread)
            yield Conversation(read.messages, source, where, group, self.items, read.masked, read.variables)

    def _group(self, record: dict[str, Any], messages: list[dict[str, Any]], where: str) -> str:
        if self._group_key is None:
            return json.dumps(messages[: answers(messages)[0]], sort_keys=True)
        value = record.get(self._group_key)
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise BadItem(
                f'{where}: group_key needs a text or a number under the key "{self._group_key}"',
                "no value for group_key",
            )
        return valid(str(value), where)

    def _read(self, source: int, file: Path) -> Iterator[tuple[Any, int]]:
        with opened(file) as (raw, stream):
            for where, record in records(file, stream):
                yield record if isinstance(record, BadItem) else (where, record), raw.tell()


def answers(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the positions of the answers: the assistant's messages, except one that begins the conversation."""
    return [i for i, message in enumerate(messages) if i and message["role"] == ASSISTANT]
