"""Defines the rows of conversations, the records that hold these rows, and the index beside the shards.

A row is a prompt with its answer. A conversation with n answers gives n rows, one after the other: row k holds the
prompt of answer k, which includes all turns before it, and answer k itself. A record is little-endian: the number of
tokens of the prompt (uint32), the number of tokens of the answer (uint32), the number of bytes of text in the answer
(uint32), and then the ids of the prompt and of the answer in the dtype of the set.

The index of a split is a .npy file with one line per row and two uint32 columns: the number of the row's conversation,
in ascending order, and the number of tokens of the row. The index tells every host the lengths of all rows, also of
those that only other hosts read.
"""

import array
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from llada_jax.config import UserError
from llada_jax.data.manifest import Manifest, Shard, Split, read_file
from llada_jax.data.rows import ShardWriter, finished_file

HEADER = np.dtype("<u4")
HEADER_BYTES = 3 * HEADER.itemsize


class Pair(NamedTuple):
    """One row: a prompt with its answer."""

    tokens: np.ndarray  # int32 [prompt + answer]
    prompt: int  # number of tokens of the prompt
    bytes: int  # bytes of text in the answer

    @property
    def length(self) -> int:
        return len(self.tokens)


def encode_pair(pair: Pair, dtype: str) -> bytes:
    """Returns the record of a pair, with its ids in `dtype`."""
    header = np.array([pair.prompt, pair.length - pair.prompt, pair.bytes], HEADER)
    return header.tobytes() + pair.tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def decode_pair(record: bytes, dtype: str, sequence_length: int) -> Pair:
    """Reads a record.

    Args:
      record: The bytes of the record.
      dtype: The dtype of the ids in the record.
      sequence_length: The maximum number of tokens of a pair.

    Raises:
      ValueError: If the record is not a pair of at most `sequence_length` ids in `dtype`.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    if len(record) < HEADER_BYTES:
        raise ValueError(f"a record of {len(record)} bytes is too short for a prompt with its answer")
    prompt, answer, bytes_ = map(int, np.frombuffer(record, HEADER, 3))
    length = prompt + answer
    if not (prompt and answer and length <= sequence_length and len(record) == HEADER_BYTES + length * kind.itemsize):
        raise ValueError(
            f"a record of {len(record)} bytes is not a prompt of {prompt} tokens and an answer of {answer} tokens "
            f"in {dtype}"
        )
    return Pair(np.frombuffer(record, kind, length, offset=HEADER_BYTES).astype(np.int32), prompt, bytes_)


class PairWriter:
    """Writes the pairs of one split as shards and an index."""

    def __init__(self, directory: Path, name: str, dtype: str, shard_rows: int):
        """Creates the writer.

        Args:
          directory: The folder that the files are written to.
          name: The name of the split, with which the names of the files begin.
          dtype: The dtype of the ids in the records.
          shard_rows: The maximum number of rows per shard.
        """
        self._path = directory / f"{name}.index.npy"
        self._dtype = dtype
        self._writer = ShardWriter(directory, name, shard_rows)
        self._index = array.array("I")  # for each row: the number of its conversation, then its length
        self._bytes = self._conversations = 0

    def add(self, pairs: Sequence[Pair]) -> None:
        """Appends the pairs of one conversation. A conversation that has no pairs left does not count.

        Raises:
          OSError: If the pairs cannot be written.
        """
        for pair in pairs:
            self._writer.write(encode_pair(pair, self._dtype))
            self._index.extend((self._conversations, pair.length))
            self._bytes += pair.bytes
        self._conversations += bool(pairs)

    def finish(self) -> tuple[Split, Shard]:
        """Closes the last shard, writes the index, and returns what the manifest says of the split and the index."""
        index_N2 = np.array(self._index, HEADER).reshape(-1, 2)
        with self._path.open("wb") as file:
            np.save(file, index_N2)
            file.flush()
        shards, tokens = self._writer.finish(), int(index_N2[:, 1].sum(dtype=np.int64))
        split = Split(self._writer.rows, tokens, self._bytes, self._conversations, shards)
        return split, finished_file(self._path, len(index_N2))


def load_index(path: str, manifest: Manifest, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the index of a split.

    Args:
      path: The folder of the set.
      manifest: The manifest of the set.
      split: The name of the split.

    Returns:
      Two int64 arrays. The first holds the first row of each conversation and, at its end, the number of rows. The
      second holds the number of tokens of each row.

    Raises:
      UserError: If the index is missing, or if its content is not what the manifest says.
    """
    entry = manifest.index(split)
    file = epath.Path(path) / entry.name
    try:
        content = read_file(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: copy the whole folder, or prepare the set again") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise UserError(f"{file} is damaged, or belongs to another set: copy it again, or prepare the set again")
    conversation_N, length_N = np.load(io.BytesIO(content), allow_pickle=False).astype(np.int64).T
    starts = np.flatnonzero(np.diff(conversation_N, prepend=-1))
    return np.append(starts, len(length_N)), length_N
