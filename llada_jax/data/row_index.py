"""Defines the row index of a shard: where each row lies in the file, and the checksum of the row.

With the index, a row can be read from a bucket by one request, and checked, without the rest of its shard. The file
SHARD.rows lies beside the shard. It has one entry of 12 bytes for each row, and a last one for the end of the rows,
little-endian: the offset of the row's chunk in the shard (uint64), and the CRC-32 of the row's record (uint32, 0 in the
last entry). `chunks.py` explains chunks.

A set that was prepared before there were indices has none. Its shards' footers tell the offsets, but no checksums.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llada_jax.data.chunks import chunk_offsets

ENTRY = np.dtype([("offset", "<u8"), ("checksum", "<u4")])
SUFFIX = ".rows"


def index_name(shard: str) -> str:
    """Returns the name of the index of a shard."""
    return Path(shard).stem + SUFFIX


def index_size(rows: int) -> int:
    """Returns the size in bytes of the index of a shard with so many rows."""
    return (rows + 1) * ENTRY.itemsize


def checksum(record: bytes) -> int:
    """Returns the checksum of a record."""
    return zlib.crc32(record)


def row_index(offsets: np.ndarray, checksums: Sequence[int]) -> bytes:
    """Returns the content of an index.

    Args:
      offsets: The offsets of the rows' chunks, and the end of the last one: uint64 [rows + 1].
      checksums: The checksum of each row.
    """
    entries = np.zeros(len(offsets), ENTRY)
    entries["offset"], entries["checksum"][:-1] = offsets, checksums
    return entries.tobytes()


def write_index(shard: Path, checksums: Sequence[int]) -> Path:
    """Writes the index of a complete shard beside it, and returns its path.

    Raises:
      OSError: If it cannot be written.
      ValueError: If the shard does not have as many rows as there are checksums.
    """
    with shard.open("rb") as file:
        offsets = chunk_offsets(lambda start, stop: os.pread(file.fileno(), stop - start, start), shard.stat().st_size)
    if len(offsets) != len(checksums) + 1:
        raise ValueError(f"{shard.name} has {len(offsets) - 1} rows instead of {len(checksums)}")
    path = shard.with_name(index_name(shard.name))
    path.write_bytes(row_index(offsets, checksums))
    return path
