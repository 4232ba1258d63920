"""Reads the lines of .jsonl files: all legal JSON is read, and everything else is named by its line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llada_jax.data.prepare.left_out import BadItem

BOM = "\ufeff"  # a byte order mark, which is no content at the beginning of a file or a text


class Repeated(dict):
    """A JSON object in which a key occurs more than once. JSON allows that, but no reader can tell which one counts.

    Attributes:
      keys_twice: The keys that occur more than once.
    """

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.keys_twice = {name for name in names if names.count(name) > 1}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
# Python refuses to read integers of thousands of digits. As a float, such a number becomes infinite.
_DECODER_OF_HUGE_NUMBERS = json.JSONDecoder(object_pairs_hook=_object, parse_int=float)


def json_lines(file: Path, stream: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Yields (file and line as a text for messages, value of the line) for each line that is not empty.

    If a line is not JSON in UTF-8, a `BadItem` takes the place of its value.
    """
    for number, line in enumerate(stream, start=1):
        where = f"{file}, line {number}"
        try:
            content = line.decode().lstrip(BOM).rstrip("\r\n")
            if not content.strip():
                continue
            yield where, _value(content)
        except UnicodeDecodeError as error:
            yield where, BadItem(f"{where}: not UTF-8 text: {error.reason}", "not UTF-8")
        except RecursionError:
            yield where, BadItem(f"{where}: not JSON that can be read: it is nested too deeply", "not JSON")
        except json.JSONDecodeError as error:
            yield where, BadItem(f"{where}: not JSON: {error.msg} at character {error.pos + 1}", "not JSON")


def _value(content: str) -> Any:
    try:
        return _DECODER.decode(content)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer with too many digits
        return _DECODER_OF_HUGE_NUMBERS.decode(content)


def repeated_key(value: Any) -> str | None:
    """Returns a key that occurs twice in an object anywhere in the value, or None."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Repeated):
            return min(each.keys_twice)
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return None


def under(record: Any, key: str) -> Any:
    """Returns the value under a key, or None. A key "a.b" that the record does not have is looked up as b in a.

    Raises:
      ValueError: If the key occurs twice. The message says so.
    """
    if not isinstance(record, dict):
        return None
    if key not in record and "." in key:
        first, rest = key.split(".", 1)
        return under(under(record, first), rest)
    if isinstance(record, Repeated) and key in record.keys_twice:
        raise ValueError(f'the key "{key}" occurs twice')
    return record.get(key)


def shown(value: Any) -> str:
    """Returns the beginning of a value as JSON, for error messages."""
    try:
        return json.dumps(value)[:60]
    except RecursionError:
        return "a deeply nested value"
