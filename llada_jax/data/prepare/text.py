"""Reads documents from files as a stream, so that memory does not grow with the input.

A document is a line of a .jsonl file, a row of a .parquet file, or a whole .txt file. A .txt file of more than 65,536
characters is read in pieces of at most 16,384 characters. It is cut at the ends of lines; a line that is longer is cut
at a space, and a word that is longer is cut anywhere. The pieces of a file together are exactly its text.

A text without any character that says something (see blank.py) is no document. A byte order mark at the beginning of a
file or of a text is no content.
"""

import codecs
import contextlib
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llada_jax.config import UserError
from llada_jax.data.prepare import stdlib, storage
from llada_jax.data.prepare.blank import is_blank
from llada_jax.data.prepare.json_lines import BOM, json_lines, under
from llada_jax.data.prepare.left_out import BadItem, Faults
from llada_jax.data.prepare.parquet import read_parquet

WHOLE_CHARACTERS = 65_536  # a .txt file of at most this length is one piece
PIECE_CHARACTERS = 16_384  # maximum length of a piece of a longer .txt file
STDLIB = "stdlib"  # the input that stands for the source files of the standard library

InputFile = Path | storage.RemoteFile

_READ_CHARACTERS = 1 << 20
_START_BYTES = 1024  # number of bytes from which the encoding of a file is told
_FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class Piece(NamedTuple):
    """A stretch of text: a document or part of a long .txt file."""

    text: str  # never empty
    source: int  # index into the inputs
    last: bool  # whether it is the last piece of its document
    blank: bool  # whether it says nothing; such a piece always continues the piece before it
    where: str  # its file and, where that has lines, its line, for messages
    item: int  # its position in the whole input
    removed: bool = False  # whether a filter leaves it out (see filters.py)


class Corpus:
    """Yields the documents of files, globs or "stdlib" in a fixed order; it can be iterated several times.

    Attributes:
      inputs: The inputs as the user gave them.
      total_bytes: The size of all files in bytes, as they are stored (compressed files count compressed).
      position: The number of these bytes that the current iteration has read, for a progress bar.
      faults: The bad documents of the current iteration.
      good: The number of documents that the current iteration has read and that are not bad. The reader may change it.
      items: The number of pieces and bad documents that the current iteration has read.
      filter: A function that each piece goes through before it is yielded; None changes nothing.
    """

    filter: Callable[[Piece], Piece] | None = None

    def __init__(
        self,
        inputs: Sequence[str],
        text_key: str = "text",
        on_error: str = "stop",
        files: Sequence[tuple[int, InputFile]] | None = None,
    ):
        """Finds the files that the inputs name.

        Args:
          inputs: Files, globs or "stdlib".
          text_key: The key of the text in a .jsonl file, and the name of its column in a .parquet file.
          on_error: What is done with a bad document: "stop" or "skip".
          files: (index of the input, file) of the files to read. None means all files that the inputs name.

        Raises:
          UserError: If an input names no file or an unknown kind of file, or if a file is named twice.
        """
        self.faults = Faults(on_error)
        self.inputs = tuple(inputs)
        self._text_key = text_key
        self._files = input_files(self.inputs) if files is None else list(files)
        self.total_bytes = sum(storage.size_of(file) for _, file in self._files)
        self.position = self.good = self.items = 0

    @property
    def files(self) -> list[tuple[int, InputFile]]:
        """(index of the input, file) of all files, in the order in which they are read."""
        return list(self._files)

    def file_count(self, source: int) -> int:
        """Returns the number of files that input number `source` stands for."""
        return sum(s == source for s, _ in self._files)

    def __iter__(self) -> Iterator[Piece]:
        """Yields the pieces.

        Raises:
          UserError: If a part of a file cannot be read. The message names the file and, where it has lines, the line.
        """
        begun = False  # whether a piece of the current document was yielded
        for source, (text, last, where) in self._walk():
            self.good += last
            text = text if begun else text.lstrip(BOM)
            blank = is_blank(text)
            if begun or not blank:  # blank pieces before the first one that says something are left out
                piece = Piece(text, source, last, blank, where, self.items)
                yield self.filter(piece) if self.filter else piece
            begun = not last and (begun or not blank)

    def _walk(self) -> Iterator[tuple[int, Any]]:
        """Yields (index of the input, item that `_read` yields) for all files and items, except for bad ones."""
        self.faults.clear()
        self.good = self.items = finished = 0
        for source, file in self._files:
            for item, position in self._read(source, file):
                self.position = finished + position
                self.items += 1
                if isinstance(item, BadItem):
                    self.faults.add(item, self.items)
                else:
                    yield source, item
            finished += storage.size_of(file)
        self.position = finished

    def _read(self, source: int, file: InputFile) -> Iterator[tuple[Any, int]]:
        """Yields ((text, whether it ends its document, where it is) or what is wrong with it, bytes read so far)."""
        if self.inputs[source] == STDLIB:
            yield (stdlib.read_source(file), True, str(file)), 0
            return
        kind, _ = kind_of(file)
        with opened(file) as (raw, stream):
            if kind == ".parquet":
                pieces = read_parquet(file, raw, self._text_key)
            elif kind == ".txt":
                pieces = _read_txt(file, stream, whole_first=self.faults.skip)
            else:
                pieces = _read_jsonl(file, stream, self._text_key)
            for piece in pieces:
                yield piece, raw.tell()


def input_files(inputs: Sequence[str]) -> list[tuple[int, InputFile]]:
    """Returns (index of the input, file) for all files that the inputs name; raises UserError as `Corpus` does."""
    if not inputs:
        raise UserError("no input: give at least one file, glob or the word stdlib")
    found: list[tuple[int, InputFile]] = []
    seen: dict[str, str] = {}
    for source, name in enumerate(inputs):
        for file in stdlib.source_files() if name == STDLIB else _expand(name):
            path = str(file) if storage.is_remote(file) else os.path.realpath(file)
            if path in seen:
                raise UserError(f"input {name}: {file} is already given by input {seen[path]}; name every file once")
            seen[path] = name
            found.append((source, file))
    return found


@contextlib.contextmanager
def opened(file: InputFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file and yields two streams: the file as it is stored, and its decompressed content.

    Raises:
      UserError: If the file is damaged, or if reading it fails while it is open.
    """
    compression = kind_of(file)[1]
    try:
        with file.open("rb") as raw:
            yield raw, _COMPRESSIONS[compression](raw) if compression else raw
    except _DAMAGED as error:
        raise UserError(f"{file} is damaged or cut short: {error}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def _expand(name: str) -> list[InputFile]:
    if storage.is_remote(name):
        files = storage.find(name)
        if not files:
            raise UserError(f"input {name}: there is no such file")
        for file in files:
            kind_of(file)
        return files
    if os.path.isdir(name):
        raise UserError(f"input {name} is a folder: name files in it, such as {os.path.join(name, '*.jsonl')}")
    names = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    files = [Path(n) for n in names if not os.path.isdir(n)]
    if not files:
        raise UserError(f"input {name}: there is no such file")
    for file in files:
        kind_of(file)
        if not os.access(file, os.R_OK):
            raise UserError(f"{file} cannot be read: permission denied")
    return files


def kind_of(file: InputFile) -> tuple[str, str]:
    """Returns the format and the compression of a file, both as the ending of a file name ("" = not compressed).

    Raises:
      UserError: If the ending of the file's name is unknown.
    """
    compression = file.suffix if file.suffix in _COMPRESSIONS else ""
    kind = Path(file.stem).suffix if compression else file.suffix
    if kind not in _FORMATS or (kind == ".parquet" and compression):
        raise UserError(f"{file}: unknown kind of file; use .txt or .jsonl (also .gz, .xz of these) or .parquet")
    return kind, compression


def _read_txt(file: InputFile, stream: BinaryIO, whole_first: bool) -> Iterator[tuple[str, bool, str] | BadItem]:
    """Yields the pieces of a file, or what is wrong with it.

    Args:
      file: The path of the file, for error messages.
      stream: Its decompressed content.
      whole_first: Whether the whole file is checked before the first piece, so that a bad file yields no piece.
    """
    if other := _other_encoding(stream):
        yield BadItem(f"{file} {other}", "not UTF-8")
        return
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")  # newline="" keeps line ends as they are
    try:
        text = reader.read(WHOLE_CHARACTERS + 1)
        if len(text) <= WHOLE_CHARACTERS:
            yield text, True, str(file)
            return
        if whole_first and (bad := _first_fault(file)):
            yield bad
            return
        more, text, line = text, "", 1
        while more:
            *whole, text = cut(text + more)
            for piece in whole:
                yield piece, False, f"{file}, from line {line}"
                line += piece.count("\n")
            more = reader.read(_READ_CHARACTERS)
        yield text, True, f"{file}, from line {line}"
    except UnicodeDecodeError as error:
        yield _first_fault(file) or BadItem(f"{file} is not UTF-8 text: {error.reason}", "not UTF-8")


def _first_fault(file: InputFile) -> BadItem | None:
    """Returns what is wrong with the first byte of a .txt file that is not UTF-8, or None if all of it is UTF-8."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with opened(file) as (_, stream):
        while True:
            chunk = stream.read(_READ_CHARACTERS)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                return BadItem(f"{file} is not UTF-8 text: {error.reason} in line {line}", "not UTF-8")
            if not chunk:
                return None
            line += chunk.count(b"\n")


def _other_encoding(stream: BinaryIO) -> str | None:
    """Returns what is wrong with a file that is UTF-16 or UTF-32, as its first bytes show, or None."""
    start = stream.peek(_START_BYTES)[:_START_BYTES]
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF32_LE begins with UTF16_LE
    # In UTF-16, every other byte of a text in Latin letters is 0, and none of the others is.
    zeros, others = sorted((start[0::2], start[1::2]), key=lambda part: -part.count(0))
    if start.startswith(marks) or (zeros.count(0) > len(zeros) / 2 and others and not others.count(0)):
        return "is not UTF-8 text, but looks like UTF-16: convert it, for example with iconv -f UTF-16 -t UTF-8"
    return None


def cut(text: str) -> Iterator[str]:
    """Yields a text in pieces of at most 16,384 characters, cut as the docstring of this module says."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        line = text.rfind("\n", start, end)
        space = text.rfind(" ", start + 1, end)
        stop = line + 1 if line >= 0 else space if space >= 0 else end
        yield text[start:stop]
        start = stop
    yield text[start:]


def _read_jsonl(file: InputFile, stream: BinaryIO, key: str) -> Iterator[tuple[str, bool, str] | BadItem]:
    for where, record in records(file, stream):
        try:
            if isinstance(record, BadItem):
                raise record
            text = under(record, key)
            if not isinstance(text, str):
                raise BadItem(
                    f'{where}: there is no text under the key "{key}" (text_key chooses another key)',
                    f'no text under "{key}"',
                )
            yield valid(text, where), True, where
        except BadItem as error:
            yield error
        except ValueError as error:
            yield BadItem(f"{where}: {error}", "a key occurs twice")


def records(file: InputFile, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yields what `json_lines` yields.

    Raises:
      UserError: If the file is in another encoding than UTF-8, so that none of its lines can be read.
    """
    if other := _other_encoding(stream):
        raise UserError(f"{file} {other}")
    yield from json_lines(file, stream)


def valid(text: str, where: str) -> str:
    """Returns the text if it can be encoded in UTF-8.

    JSON can spell half of a surrogate pair, which is not a character and has no form in UTF-8.

    Raises:
      BadItem: If a character of the text is not valid. The message begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadItem(f"{where}: {error.object[error.start]!r} is not a valid character", "half a character") from error
    return text
