"""Rows: packing tokens to the sequence length, and the records that hold them."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from llada_jax.data.manifest import Shard, Split

HEADER = np.dtype("<u4")  # two of them: tokens in the row, bytes of text in the row
# One record per group: any row is read alone. One thread: the bytes do not depend on timing.
_WRITER_OPTIONS = "group_size:1,zstd:1,max_parallelism:1"


class Row(NamedTuple):
    """One record."""

    tokens: np.ndarray  # int32 [T]
    length: int  # true length in tokens; EOS fills up the rest
    bytes: int  # of text


def encode_row(ids: np.ndarray, length: int, bytes_: int) -> bytes:
    """The record of `ids` [T], already in the little-endian dtype of the set."""
    return np.array([length, bytes_], HEADER).tobytes() + ids.tobytes()


def decode_row(record: bytes, dtype: str, sequence_length: int) -> Row:
    """Reads a record; raises ValueError if it is not a row of `sequence_length` ids of `dtype`."""
    kind = np.dtype(dtype).newbyteorder("<")
    if len(record) != 2 * HEADER.itemsize + sequence_length * kind.itemsize:
        raise ValueError(f"a record of {len(record)} bytes is no row of {sequence_length} tokens in {dtype}")
    length, bytes_ = np.frombuffer(record, HEADER, 2)
    tokens = np.frombuffer(record, kind, sequence_length, offset=2 * HEADER.itemsize).astype(np.int32)
    if not 1 <= length <= sequence_length:
        raise ValueError(f"a row of length {length} where 1 to {sequence_length} is possible")
    return Row(tokens, int(length), int(bytes_))


class HeldOut(NamedTuple):
    """Held-out rows, all of one width: text, or answers with their prompts."""

    tokens_NT: np.ndarray  # int32
    length_N: np.ndarray  # int32, true lengths, prompts included
    prompt_N: np.ndarray  # int32, tokens of the prompt at the start of each row; 0 of text
    bytes_N: np.ndarray  # int64, of text, or of the answers


class ShardWriter:
    """Writes the records of one split as shards."""

    def __init__(self, directory: Path, name: str, shard_rows: int):
        """`shard_rows`: rows per shard, at most."""
        self._directory, self._name, self._shard_rows = directory, name, shard_rows
        self._writer: ArrayRecordWriter | None = None
        self._shards: list[Shard] = []
        self._written = 0  # rows in the open shard
        self.rows = 0

    def write(self, record: bytes) -> None:
        """Appends a record; raises OSError if it cannot be written."""
        try:
            if self._writer is None:
                self._writer = ArrayRecordWriter(str(self._path()), _WRITER_OPTIONS)
            self._writer.write(record)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        self.rows += 1
        self._written += 1
        if self._written == self._shard_rows:
            self._close_shard()

    def finish(self) -> tuple[Shard, ...]:
        """Closes the last shard."""
        self._close_shard()
        return tuple(self._shards)

    def _path(self) -> Path:
        return self._directory / f"{self._name}-{len(self._shards):05d}.arrayrecord"

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        path = self._path()
        try:
            self._writer.close()
        except RuntimeError as error:
            raise OSError(str(error)) from error
        reader = ArrayRecordReader(str(path))
        if not reader.ok() or reader.num_records() != self._written:
            raise OSError(f"{path.name} was not written completely (disk full?)")
        reader.close()
        self._shards.append(finished_file(path, self._written))
        self._writer, self._written = None, 0


def finished_file(path: Path, rows: int) -> Shard:
    """What the manifest says of a file, once all of it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, rows, path.stat().st_size, digest)


class SplitWriter:
    """Packs the token stream of one split into rows and writes them as shards."""

    def __init__(self, directory: Path, name: str, sequence_length: int, dtype: str, eos_id: int, shard_rows: int):
        """`shard_rows`: rows per shard, at most."""
        self._writer = ShardWriter(directory, name, shard_rows)
        self._eos = np.array([eos_id], np.uint32)
        self._ids = np.full(sequence_length, eos_id, np.dtype(dtype).newbyteorder("<"))
        self._fill = self._row_bytes = 0  # of the row under construction
        self._tokens = self._bytes = self._documents = 0

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Appends tokens, each standing for `counts` bytes of text; raises OSError if they cannot be written."""
        start, total = 0, len(ids)
        self._tokens += total
        self._bytes += int(counts.sum(dtype=np.int64))
        while start < total:
            stop = min(total, start + len(self._ids) - self._fill)
            self._ids[self._fill : self._fill + stop - start] = ids[start:stop]
            self._row_bytes += int(counts[start:stop].sum(dtype=np.int64))
            self._fill += stop - start
            start = stop
            if self._fill == len(self._ids):
                self._write_row()

    def end_document(self) -> None:
        """Appends EOS."""
        self.add(self._eos, np.zeros(1, np.uint32))
        self._documents += 1

    def finish(self) -> Split:
        """Writes the last, partial row and closes the last shard."""
        if self._fill:
            self._ids[self._fill :] = self._eos[0]
            self._write_row()
        shards = self._writer.finish()
        return Split(self._writer.rows, self._tokens, self._bytes, self._documents, shards)

    def _write_row(self) -> None:
        self._writer.write(encode_row(self._ids, self._fill, self._row_bytes))
        self._fill = self._row_bytes = 0
