"""Reads documents from files as a stream, so that memory does not grow with the input.

A document is a line of a .jsonl file, a row of a .parquet file, or a whole .txt file. A .txt file of more than 65,536
characters is read in pieces of at most 16,384 characters. It is cut at the ends of lines; a line that is longer is cut
at a space, and a word that is longer is cut anywhere. The pieces of a file together are exactly its text.
"""

import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llada_jax.config import UserError
from llada_jax.data.prepare import stdlib

WHOLE_CHARACTERS = 65_536  # a .txt file of at most this length is one piece
PIECE_CHARACTERS = 16_384  # maximum length of a piece of a longer .txt file
STDLIB = "stdlib"  # the input that stands for the source files of the standard library

_READ_CHARACTERS = 1 << 20
_FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class Piece(NamedTuple):
    """A stretch of text: a document or part of a long .txt file."""

    text: str  # never empty
    source: int  # index into the inputs
    last: bool  # whether it is the last piece of its document


class Corpus:
    """Yields the documents of files, globs or "stdlib" in a fixed order; it can be iterated several times.

    Attributes:
      inputs: The inputs as the user gave them.
      total_bytes: The size of all files in bytes, as they are stored (compressed files count compressed).
      position: The number of these bytes that the current iteration has read, for a progress bar.
    """

    def __init__(self, inputs: Sequence[str], text_key: str = "text"):
        """Finds the files that the inputs name.

        Args:
          inputs: Files, globs or "stdlib".
          text_key: The key of the text in a .jsonl file, and the name of its column in a .parquet file.

        Raises:
          UserError: If an input names no file or an unknown kind of file, or if a file is named twice.
        """
        self.inputs = tuple(inputs)
        self._text_key = text_key
        self._files = input_files(self.inputs)
        self.total_bytes = sum(file.stat().st_size for _, file in self._files)
        self.position = 0

    def file_count(self, source: int) -> int:
        """Returns the number of files that input number `source` stands for."""
        return sum(s == source for s, _ in self._files)

    def __iter__(self) -> Iterator[Piece]:
        """Yields the pieces.

        Raises:
          UserError: If a part of a file cannot be read. The message names the file and, where it has lines, the line.
        """
        for source, (text, last) in self._walk():
            if text:
                yield Piece(text, source, last)

    def _walk(self) -> Iterator[tuple[int, Any]]:
        """Yields (index of the input, item that `_read` yields) for all files."""
        finished = 0
        for source, file in self._files:
            for item, position in self._read(source, file):
                self.position = finished + position
                yield source, item
            finished += file.stat().st_size
        self.position = finished

    def _read(self, source: int, file: Path) -> Iterator[tuple[Any, int]]:
        """Yields ((text, whether it ends its document), number of bytes of the file read so far)."""
        if self.inputs[source] == STDLIB:
            yield (stdlib.read_source(file), True), 0
            return
        kind, _ = kind_of(file)
        with opened(file) as (raw, stream):
            if kind == ".parquet":
                pieces = _read_parquet(file, raw, self._text_key)
            else:
                pieces = _read_txt(file, stream) if kind == ".txt" else _read_jsonl(file, stream, self._text_key)
            for piece in pieces:
                yield piece, raw.tell()


def input_files(inputs: Sequence[str]) -> list[tuple[int, Path]]:
    """Returns (index of the input, file) for all files that the inputs name; raises UserError as `Corpus` does."""
    if not inputs:
        raise UserError("no input: give at least one file, glob or the word stdlib")
    found: list[tuple[int, Path]] = []
    seen: dict[str, str] = {}
    for source, name in enumerate(inputs):
        for file in stdlib.source_files() if name == STDLIB else _expand(name):
            path = os.path.realpath(file)
            if path in seen:
                raise UserError(f"input {name}: {file} is already given by input {seen[path]}; name every file once")
            seen[path] = name
            found.append((source, file))
    return found


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
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


def _expand(name: str) -> list[Path]:
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


def kind_of(file: Path) -> tuple[str, str]:
    """Returns the format and the compression of a file, both as the ending of a file name ("" = not compressed).

    Raises:
      UserError: If the ending of the file's name is unknown.
    """
    compression = file.suffix if file.suffix in _COMPRESSIONS else ""
    kind = Path(file.stem).suffix if compression else file.suffix
    if kind not in _FORMATS or (kind == ".parquet" and compression):
        raise UserError(f"{file}: unknown kind of file; use .txt or .jsonl (also .gz, .xz of these) or .parquet")
    return kind, compression


def _read_txt(file: Path, stream: BinaryIO) -> Iterator[tuple[str, bool]]:
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")  # newline="" keeps line ends as they are
    try:
        text = reader.read(WHOLE_CHARACTERS + 1)
        if len(text) <= WHOLE_CHARACTERS:
            yield text, True
            return
        more, text = text, ""
        while more:
            *whole, text = cut(text + more)
            for piece in whole:
                yield piece, False
            more = reader.read(_READ_CHARACTERS)
        yield text, True
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason}") from error


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


def _read_jsonl(file: Path, stream: BinaryIO, key: str) -> Iterator[tuple[str, bool]]:
    for where, record in json_lines(file, stream):
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise UserError(f'{where}: there is no text under the key "{key}" (text_key chooses another key)')
        yield valid(record[key], where), True


def json_lines(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yields (file and line as a text for messages, value of the line) for each line that is not empty.

    Raises:
      UserError: If a line is not JSON in UTF-8. The message names the file and the line.
    """
    for number, line in enumerate(stream, start=1):
        where = f"{file}, line {number}"
        try:
            content = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not content.strip():
                continue
            record = json.loads(content)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text: {error.reason}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        yield where, record


def _read_parquet(file: Path, raw: BinaryIO, column: str) -> Iterator[tuple[str, bool]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
        kinds = {field.name: field.type for field in table.schema_arrow}
        if column not in kinds:
            raise UserError(
                f'{file} has no column "{column}" (text_key chooses another column); its columns are {", ".join(kinds)}'
            )
        if not (pa.types.is_string(kinds[column]) or pa.types.is_large_string(kinds[column])):
            raise UserError(f'{file}: column "{column}" holds {kinds[column]}, not text')
        row = 0
        for batch in table.iter_batches(batch_size=64, columns=[column], use_threads=False):
            for value in batch.column(0):
                text = value.as_py()
                row += 1
                if text is None:
                    raise UserError(f'{file}, row {row}: there is no text in the column "{column}"')
                yield text, True
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a parquet file: {' '.join(str(error).split())}") from error


def valid(text: str, where: str) -> str:
    """Returns the text if it can be encoded in UTF-8.

    JSON can spell half of a surrogate pair, which is not a character and has no form in UTF-8.

    Raises:
      UserError: If a character of the text is not valid. The message begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error.object[error.start]!r} is not a valid character") from error
    return text
