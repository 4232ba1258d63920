"""Reads ArrayRecord files by ranges of bytes, and compares with what the library was given and what it reads."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from llada_jax.data import chunks
from llada_jax.data.row_index import ENTRY, checksum, index_size, write_index


def write(path, records, options: str = "group_size:1,zstd:1,max_parallelism:1") -> bytes:
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    assert ArrayRecordReader(str(path)).read_all() == records
    return path.read_bytes()


@pytest.mark.parametrize("compression", ["zstd:1", "uncompressed"])
@pytest.mark.parametrize(("count", "most"), [(1, 20), (400, 2000), (7, 200_000), (3000, 4)])
def test_every_record_can_be_read_alone(tmp_path, rng, count, most, compression, monkeypatch):
    records = [rng.integers(0, 7, rng.integers(1, most), dtype=np.uint16).tobytes() for _ in range(count)]
    content = write(tmp_path / "a.arrayrecord", records, f"group_size:1,{compression},max_parallelism:1")
    for guess in (chunks._FOOTER_GUESS, 0):
        monkeypatch.setattr(chunks, "_FOOTER_GUESS", guess)
        reads = []
        offsets = chunks.chunk_offsets(lambda a, b: reads.append((a, b)) or content[a:b], len(content))  # noqa: B023
        assert len(offsets) == count + 1 and len(reads) <= 2 and reads[0][1] <= len(content)
        found = [
            chunks.record_of(content[a:b], a) for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
        ]
        assert found == records


def test_what_is_no_such_file(tmp_path, rng):
    records = [rng.bytes(500) for _ in range(50)]
    grouped = write(tmp_path / "grouped", records, "group_size:8,zstd:1")
    whole = write(tmp_path / "whole", records)
    for content in (grouped, whole[:-70_000], bytes(200_000), rng.bytes(200_000)):
        with pytest.raises(chunks.DamagedChunk):
            chunks.chunk_offsets(lambda a, b: content[a:b], len(content))  # noqa: B023
    start, stop = chunks.chunk_offsets(lambda a, b: whole[a:b], len(whole))[:2].tolist()
    for wrong in (whole[start : stop - 1], whole[start:], whole[start + 1 : stop], b"", bytes(600)):
        with pytest.raises(chunks.DamagedChunk):
            chunks.record_of(wrong, start)


def test_no_flipped_byte_of_a_chunk_passes_the_checksum(tmp_path, rng):
    """Each flipped byte of a row's chunk gives an error or another record, except in fields that do not matter."""
    records = [rng.integers(0, 9, 60, dtype=np.uint16).tobytes() for _ in range(3)]
    content = write(tmp_path / "a.arrayrecord", records)
    index = np.frombuffer(write_index(tmp_path / "a.arrayrecord", [*map(checksum, records)]).read_bytes(), ENTRY)
    assert index.nbytes == index_size(3) and (tmp_path / "a.rows").exists()
    start, stop = index["offset"][1:3].tolist()
    for at in range(start, stop):
        flipped = bytearray(content[start:stop])
        flipped[at - start] ^= 1 << int(rng.integers(8))
        try:
            record = chunks.record_of(bytes(flipped), start)
        except chunks.DamagedChunk:
            continue
        assert (checksum(record) != index["checksum"][1]) == (record != records[1])
        assert record != records[1] or at - start < 40, "only hashes and sizes in the chunk's header are not needed"
