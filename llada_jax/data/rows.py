"""Packs tokens into rows of the sequence length, and defines the records that hold these rows."""

import array
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from llada_jax.data.manifest import Shard, Split
from llada_jax.data.row_index import checksum, write_index

HEADER = np.dtype("<u4")  # a record begins with two of these: the row's tokens and its bytes of text
# With one record per group, any row can be read alone. With one thread, the bytes of a file do not depend on timing.
_WRITER_OPTIONS = "group_size:1,zstd:1,max_parallelism:1"


class Row(NamedTuple):
    """One row of packed text."""

    tokens: np.ndarray  # int32 [T]
    length: int  # true length in tokens; EOS fills the rest of the row
    bytes: int  # bytes of text that the row stands for


def encode_row(ids: np.ndarray, length: int, bytes_: int) -> bytes:
    """Returns the record of a row.

    Args:
      ids: The ids, [T], which already have the little-endian dtype of the set.
      length: The true length of the row in tokens.
      bytes_: The number of bytes of text that the row stands for.
    """
    return np.array([length, bytes_], HEADER).tobytes() + ids.tobytes()


def decode_row(record: bytes, dtype: str, sequence_length: int) -> Row:
    """Reads a record.

    Args:
      record: The bytes of the record.
      dtype: The dtype of the ids in the record.
      sequence_length: T, the number of ids in the record.

    Raises:
      ValueError: If the record is not a row of `sequence_length` ids in `dtype`, or if its true length is impossible.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    if len(record) != 2 * HEADER.itemsize + sequence_length * kind.itemsize:
        raise ValueError(f"a record of {len(record)} bytes is not a row of {sequence_length} tokens in {dtype}")
    length, bytes_ = np.frombuffer(record, HEADER, 2)
    tokens = np.frombuffer(record, kind, sequence_length, offset=2 * HEADER.itemsize).astype(np.int32)
    if not 1 <= length <= sequence_length:
        raise ValueError(f"a row has length {length}, but only lengths from 1 to {sequence_length} are possible")
    return Row(tokens, int(length), int(bytes_))


class HeldOut(NamedTuple):
    """Held-out rows of one width: packed text, or prompts with their answers."""

    tokens_NT: np.ndarray  # int32
    length_N: np.ndarray  # int32, true length of each row, the prompt included
    prompt_N: np.ndarray  # int32, tokens of the prompt at the start of each row; 0 for text
    bytes_N: np.ndarray  # int64, bytes of text in each row; for prompts with answers, those of the answer


class ShardWriter:
    """Writes the records of one split as shards, each with the index of its rows."""

    def __init__(self, directory: Path, name: str, shard_rows: int):
        """Creates the writer.

        Args:
          directory: The folder that the shards are written to.
          name: The name of the split, with which the names of the shards begin.
          shard_rows: The maximum number of rows per shard.
        """
        self._directory, self._name, self._shard_rows = directory, name, shard_rows
        self._writer: ArrayRecordWriter | None = None
        self._shards: list[Shard] = []
        self._checksums = array.array("I")  # of the rows in the open shard
        self.rows = 0

    def write(self, record: bytes) -> None:
        """Appends a record.

        Raises:
          OSError: If the record cannot be written.
        """
        try:
            if self._writer is None:
                self._writer = ArrayRecordWriter(str(self._path()), _WRITER_OPTIONS)
            self._writer.write(record)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        self.rows += 1
        self._checksums.append(checksum(record))
        if len(self._checksums) == self._shard_rows:
            self._close_shard()

    def finish(self) -> tuple[Shard, ...]:
        """Closes the last shard, and returns what the manifest says of all shards."""
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
        written = len(self._checksums)
        reader = ArrayRecordReader(str(path))
        if not reader.ok() or reader.num_records() != written:
            raise OSError(f"{path.name} was not written completely (is the disk full?)")
        reader.close()
        index = finished_file(write_index(path, self._checksums), written)
        self._shards.append(dataclasses.replace(finished_file(path, written), index_sha256=index.sha256))
        self._writer, self._checksums = None, array.array("I")


def finished_file(path: Path, rows: int) -> Shard:
    """Makes sure that a file is on the disk, and returns what the manifest says of it.

    Args:
      path: The file, which is completely written.
      rows: The number of rows in the file.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, rows, path.stat().st_size, digest)


class SplitWriter:
    """Packs the token stream of one split into rows and writes them as shards."""

    def __init__(self, directory: Path, name: str, sequence_length: int, dtype: str, eos_id: int, shard_rows: int):
        """Creates the writer.

        Args:
          directory: The folder that the shards are written to.
          name: The name of the split, with which the names of the shards begin.
          sequence_length: The number of tokens per row.
          dtype: The dtype of the ids in the records.
          eos_id: The id of EOS.
          shard_rows: The maximum number of rows per shard.
        """
        self._writer = ShardWriter(directory, name, shard_rows)
        self._eos = np.array([eos_id], np.uint32)
        self._ids = np.full(sequence_length, eos_id, np.dtype(dtype).newbyteorder("<"))
        self._fill = self._row_bytes = 0  # tokens and bytes of text in the row under construction
        self._tokens = self._bytes = self._documents = 0

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Appends tokens, and writes each row that becomes full.

        Args:
          ids: The ids of the tokens.
          counts: The number of bytes of text that each token stands for.

        Raises:
          OSError: If a row cannot be written.
        """
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
        """Appends EOS and counts a document."""
        self.add(self._eos, np.zeros(1, np.uint32))
        self._documents += 1

    def finish(self) -> Split:
        """Writes the last, partial row, closes the last shard, and returns what the manifest says of the split."""
        if self._fill:
            self._ids[self._fill :] = self._eos[0]
            self._write_row()
        shards = self._writer.finish()
        return Split(self._writer.rows, self._tokens, self._bytes, self._documents, shards)

    def _write_row(self) -> None:
        self._writer.write(encode_row(self._ids, self._fill, self._row_bytes))
        self._fill = self._row_bytes = 0
