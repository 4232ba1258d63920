"""Reading documents out of files, streamed: memory does not grow with the input.

A document is a line of a .jsonl file, a row of a .parquet file, or a whole .txt file. A .txt file of
more than 65,536 characters comes in pieces of at most 16,384 characters, cut at line ends (in a longer
line at a space, in a longer word anywhere); the pieces of a file together are exactly its text.
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

WHOLE_CHARACTERS = 65_536  # a .txt file up to this length is one piece
PIECE_CHARACTERS = 16_384  # at most, of a longer one
STDLIB = "stdlib"  # the input that stands for the standard library's own source files

_READ_CHARACTERS = 1 << 20
_FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class Piece(NamedTuple):
    """A stretch of text: a document or part of a long .txt file."""

    text: str  # never empty
    source: int  # index into the inputs
    last: bool  # whether its document ends with it


class Corpus:
    """The documents of files, globs or "stdlib", in a fixed order; can be iterated several times.

    Attributes:
      inputs: as given.
      total_bytes: size of all files, as stored.
      position: bytes of them read so far in the running iteration, for a progress bar.
    """

    def __init__(self, inputs: Sequence[str], text_key: str = "text"):
        """Raises UserError for an input that names no file, an unknown kind of file, or a file named twice."""
        self.inputs = tuple(inputs)
        self._text_key = text_key
        self._files = input_files(self.inputs)
        self.total_bytes = sum(file.stat().st_size for _, file in self._files)
        self.position = 0

    def file_count(self, source: int) -> int:
        """Number of files that input `source` stands for."""
        return sum(s == source for s, _ in self._files)

    def __iter__(self) -> Iterator[Piece]:
        """Yields the pieces; raises UserError, naming file and line, for whatever cannot be read."""
        for source, (text, last) in self._walk():
            if text:
                yield Piece(text, source, last)

    def _walk(self) -> Iterator[tuple[int, Any]]:
        """(index of the input, what `_read` yields) of all files."""
        finished = 0
        for source, file in self._files:
            for item, position in self._read(source, file):
                self.position = finished + position
                yield source, item
            finished += file.stat().st_size
        self.position = finished

    def _read(self, source: int, file: Path) -> Iterator[tuple[Any, int]]:
        """Yields (text, whether its document ends), and bytes of the file read so far."""
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
    """(index of the input, file) of all files that inputs name. UserError as `Corpus`."""
    if not inputs:
        raise UserError("no input: give at least one file, glob or the word stdlib")
    found: list[tuple[int, Path]] = []
    seen: dict[str, str] = {}
    for source, name in enumerate(inputs):
        for file in stdlib.source_files() if name == STDLIB else _expand(name):
            path = os.path.realpath(file)
            if path in seen:
                raise UserError(f"input {name}: {file} is already given by {seen[path]}; name every file once")
            seen[path] = name
            found.append((source, file))
    return found


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as stored, and decompressed; UserError for what goes wrong while they are read."""
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
    """Format and compression, both as file name endings."""
    compression = file.suffix if file.suffix in _COMPRESSIONS else ""
    kind = Path(file.stem).suffix if compression else file.suffix
    if kind not in _FORMATS or (kind == ".parquet" and compression):
        raise UserError(f"{file}: unknown kind of file; .txt and .jsonl (also .gz, .xz) and .parquet are known")
    return kind, compression


def _read_txt(file: Path, stream: BinaryIO) -> Iterator[tuple[str, bool]]:
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")  # line ends stay as they are
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
    """The pieces of at most 16,384 characters that a long text is handled in."""
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
            raise UserError(f'{where}: no text under the key "{key}" (text_key names another)')
        yield valid(record[key], where), True


def json_lines(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """File and line, and the value of each line that is not empty; UserError for one that is not JSON."""
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
            raise UserError(f'{file} has no column "{column}" (text_key names another): it has {", ".join(kinds)}')
        if not (pa.types.is_string(kinds[column]) or pa.types.is_large_string(kinds[column])):
            raise UserError(f'{file}: column "{column}" holds {kinds[column]}, not text')
        row = 0
        for batch in table.iter_batches(batch_size=64, columns=[column], use_threads=False):
            for value in batch.column(0):
                text = value.as_py()
                row += 1
                if text is None:
                    raise UserError(f'{file}, row {row}: no text in the column "{column}"')
                yield text, True
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a parquet file that can be read: {' '.join(str(error).split())}") from error


def valid(text: str, where: str) -> str:
    """The text; UserError if it has no UTF-8 form. JSON can spell half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error.object[error.start]!r} is not a valid character") from error
    return text
