import numpy as np
import pytest

from llada_jax.data.rows import SplitWriter, decode_row, encode_row

from .conftest import read_split


class FakeManifest:
    dtype, sequence_length = "uint16", 8

    def __init__(self, split):
        self.split = lambda name: split


@pytest.mark.parametrize("dtype, top", [("uint16", 65_535), ("uint32", 126_463)])
def test_record_layout(dtype, top):
    ids = np.array([1, 2, top], np.dtype(dtype).newbyteorder("<"))
    record = encode_row(ids, 2, 77)
    assert record[:8] == b"\x02\0\0\0\x4d\0\0\0"
    assert record[8:] == ids.tobytes()
    row = decode_row(record, dtype, 3)
    assert row.tokens.dtype == np.int32
    assert (row.tokens.tolist(), row.length, row.bytes) == ([1, 2, top], 2, 77)


def test_record_of_another_shape():
    record = encode_row(np.zeros(4, "<u2"), 4, 0)
    with pytest.raises(ValueError, match="not a row of 5 tokens"):
        decode_row(record, "uint16", 5)
    with pytest.raises(ValueError, match="length 0"):
        decode_row(encode_row(np.zeros(4, "<u2"), 0, 0), "uint16", 4)


@pytest.mark.parametrize("total", [1, 7, 8, 9, 16, 100])
def test_packing_loses_nothing(tmp_path, total):
    rng = np.random.default_rng(total)
    ids = rng.integers(3, 60_000, total, np.uint32)
    counts = rng.integers(0, 9, total, np.uint32)
    writer = SplitWriter(tmp_path, "train", 8, "uint16", 2, shard_rows=3)
    for part in np.array_split(np.arange(total), 5):
        writer.add(ids[part], counts[part])
    split = writer.finish()
    rows = read_split(tmp_path, FakeManifest(split), "train")
    assert np.concatenate([row.tokens[: row.length] for row in rows]).tolist() == ids.tolist()
    assert [row.length for row in rows[:-1]] == [8] * (len(rows) - 1)
    assert (rows[-1].tokens[rows[-1].length :] == 2).all()
    starts = range(0, total, 8)
    assert [row.bytes for row in rows] == [int(counts[s : s + 8].sum()) for s in starts]
    assert (split.rows, split.tokens, split.bytes) == (len(starts), total, int(counts.sum()))
    assert [shard.rows for shard in split.shards] == [min(3, len(starts) - s) for s in range(0, len(starts), 3)]
    assert all((tmp_path / shard.name).stat().st_size == shard.size for shard in split.shards)


def test_nothing_in_nothing_out(tmp_path):
    split = SplitWriter(tmp_path, "validation", 8, "uint16", 2, shard_rows=3).finish()
    assert (split.rows, split.shards) == (0, ())
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_full(tmp_path):
    (tmp_path / "train-00000.arrayrecord").symlink_to("/dev/full")
    writer = SplitWriter(tmp_path, "train", 1 << 16, "uint32", 2, shard_rows=3)
    with pytest.raises(OSError, match=r"[Nn]o space left"):
        for _ in range(3):
            writer.add(np.random.default_rng(0).integers(0, 2**32, 1 << 16, np.uint32), np.zeros(1 << 16, np.uint32))
