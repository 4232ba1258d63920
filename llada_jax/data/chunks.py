"""Reads rows of ArrayRecord files by ranges of bytes, without the library, which can read only files.

prepare writes one record per group, so each record is a chunk of its own, which can be read alone. A file of the
format Riegeli/records, which ArrayRecord builds on, is laid out like this (numbers are little-endian):

  blocks    Every 64 KiB there is a block header of 24 bytes. It interrupts the chunk that lies there.
  chunk     A header of 40 bytes (8 hash of the header, 8 size of the data, 8 hash of the data, 1 type, 7 number of
            records, 8 size of the records) and the data. The data of a simple chunk (type "r") are the kind of
            compression (1 byte, 0 or "z" for zstd), the size of the next part (varint), the sizes of the records
            (varints), and the records. If they are compressed, each of the two parts begins with its size when
            decompressed (varint).
  the end   The last block begins with a chunk whose record is the message {1: offset of the footer}. The footer is a
            chunk of messages: one about the file, and then {1: offset of the chunk, ...} for each chunk.

The hashes of the chunks are not checked here: data/row_index.py has a checksum for each row.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

BLOCK = 1 << 16  # bytes
_BLOCK_HEADER, _CHUNK_HEADER = 24, 40  # bytes
_FOOTER_GUESS = 1 << 20  # bytes before the last block that are read with it, in the hope that they hold the footer


class DamagedChunk(ValueError):
    """Raised if bytes are not a chunk of an ArrayRecord file that prepare has written."""


def record_of(content: bytes, begin: int) -> bytes:
    """Returns the record of a chunk that holds one record.

    Args:
      content: The bytes of the file from the beginning of the chunk to its end.
      begin: The offset of the chunk in the file.

    Raises:
      DamagedChunk: If the bytes are not such a chunk.
    """
    records = _records(_without_block_headers(content, begin))
    if len(records) != 1:
        raise DamagedChunk(f"a chunk has {len(records)} records instead of one")
    return records[0]


def chunk_offsets(read: Callable[[int, int], bytes], size: int) -> np.ndarray:
    """Returns the offsets of all records' chunks, and the end of the last one: uint64 [records + 1], ascending.

    Args:
      read: A function that returns the bytes of the file from one offset to another. It is called once or twice.
      size: The size of the file in bytes.

    Raises:
      DamagedChunk: If the file is not an ArrayRecord file with one record per chunk.
    """
    last = (size - 1) // BLOCK * BLOCK
    start = max(0, last - _FOOTER_GUESS)
    content = read(start, size)
    (postscript, *_) = _records(_chunk(_without_block_headers(content[last - start :], last))) or [b""]
    footer = _fields(postscript).get(1, size)
    if footer >= last:
        raise DamagedChunk("the file has no footer")
    if footer < start:
        content, start = read(footer, last), footer
    _, *entries = _records(_chunk(_without_block_headers(content[footer - start : last - start], footer))) or [b""]
    fields = [_fields(entry) for entry in entries]
    offsets = np.array([*(entry.get(1, 0) for entry in fields), footer], np.uint64)
    if any(entry.get(3, 0) != 1 for entry in fields) or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise DamagedChunk("the file does not have one record per chunk")
    return offsets


def _without_block_headers(content: bytes, begin: int) -> bytes:
    """Returns the bytes from offset `begin` of a file on, without the block headers among them."""
    first = -begin % BLOCK
    if first >= len(content):
        return content
    blocks = [content[:first]]
    blocks += [content[at + _BLOCK_HEADER : at + BLOCK] for at in range(first, len(content), BLOCK)]
    return b"".join(blocks)


def _chunk(content: bytes) -> bytes:
    """Returns the first chunk of bytes that may hold more than that."""
    return content[: _CHUNK_HEADER + int.from_bytes(content[8:16], "little")]


def _records(chunk: bytes) -> list[bytes]:
    if len(chunk) <= _CHUNK_HEADER or chunk[24:25] != b"r":
        raise DamagedChunk("there is no chunk of records where one is expected")
    if len(chunk) != _CHUNK_HEADER + int.from_bytes(chunk[8:16], "little"):
        raise DamagedChunk("a chunk does not have the size that its header says")
    count, compression = int.from_bytes(chunk[25:32], "little"), chunk[40]
    try:
        sizes_size, at = _varint(chunk, _CHUNK_HEADER + 1)
        sizes, values = chunk[at : at + sizes_size], chunk[at + sizes_size :]
        if compression == ord("z"):
            sizes, values = _decompressed(sizes), _decompressed(values)
        elif compression:
            raise DamagedChunk(f"a chunk has the unknown compression {compression}")
        ends, at = [0], 0
        for _ in range(count):
            record, at = _varint(sizes, at)
            ends.append(ends[-1] + record)
    except (IndexError, OSError, pa.ArrowException) as error:
        raise DamagedChunk(f"a chunk cannot be decompressed: {' '.join(str(error).split())}") from error
    if ends[-1] != len(values):
        raise DamagedChunk("the records of a chunk do not have the sizes that it says")
    return [values[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _decompressed(part: bytes) -> bytes:
    size, at = _varint(part, 0)
    if size > 1 << 30:
        raise DamagedChunk("the records of a chunk do not have the sizes that it says")
    return pa.Codec("zstd").decompress(part[at:], size).to_pybytes() if size else b""


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Returns the varint at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = content[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
        shift += 7


def _fields(message: bytes) -> dict[int, int]:
    """Returns the fields of a protocol buffer message that are varints; the others may only come after them."""
    found, at = {}, 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7:
            break
        found[tag >> 3], at = _varint(message, at)
    return found
