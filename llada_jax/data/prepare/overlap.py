"""Finds text that occurs in evaluation sets, by n-grams of words, as GPT-3 did (arXiv 2005.14165, appendix C).

Words are runs of letters and digits, in small letters. A text of an evaluation set with 13 words or more stands for all
its runs of 13 words; one with 8 to 12 words stands for itself; shorter ones are common phrases and are passed over. A
document that contains such a run is left out as a whole.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llada_jax.config import UserError
from llada_jax.data.prepare import storage
from llada_jax.data.prepare.json_lines import BOM
from llada_jax.data.prepare.left_out import BadItem
from llada_jax.data.prepare.text import InputFile, kind_of, opened, records

LONGEST, SHORTEST = 13, 8

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Returns the words of a text in small letters, without punctuation."""
    return _WORD.findall(text.lower())


def runs_of(files: Sequence[str]) -> dict[int, frozenset[str]]:
    """Returns the runs of words in the files, by their number of words.

    Args:
      files: .txt and .jsonl files (also .gz, .xz) or .json files. Of JSON, every text under any key is read.

    Raises:
      UserError: If a file cannot be read, or if the files together have no text of at least 8 words.
    """
    found: dict[int, set[str]] = {}
    for file in files:
        for text in _texts(storage.RemoteFile(file) if storage.is_remote(file) else Path(file)):
            words = words_of(text)
            n = min(len(words), LONGEST)
            if n >= SHORTEST:
                found.setdefault(n, set()).update(_runs(words, n))
    if not found:
        raise UserError(f"decontaminate: there is no text of at least {SHORTEST} words in {', '.join(files)}")
    return {n: frozenset(found[n]) for n in sorted(found)}


def overlaps(text: str, runs: dict[int, frozenset[str]]) -> bool:
    """Returns whether a text contains a run of words of the evaluation sets."""
    words = words_of(text)
    return any(not known.isdisjoint(_runs(words, n)) for n, known in runs.items())


def _runs(words: Sequence[str], n: int) -> Iterator[str]:
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def _texts(file: InputFile) -> Iterator[str]:
    if file.suffix == ".json":
        try:
            with file.open("rb") as stream:
                yield from _strings(json.load(stream))
        except (OSError, ValueError) as error:
            raise UserError(f"decontaminate: {file} cannot be read: {error}") from error
        return
    kind, _ = kind_of(file)
    if kind == ".parquet":
        raise UserError(f"decontaminate: {file} is .parquet; give .txt, .jsonl or .json files")
    with opened(file) as (_, stream):
        if kind == ".txt":
            try:
                yield stream.read().decode().lstrip(BOM)
            except UnicodeDecodeError as error:
                raise UserError(f"decontaminate: {file} is not UTF-8 text: {error.reason}") from error
            return
        for _, record in records(file, stream):
            if isinstance(record, BadItem):
                raise record
            yield from _strings(record)


def _strings(value: Any) -> Iterator[str]:
    """Yields every text in a JSON value, but for the keys of its objects."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
