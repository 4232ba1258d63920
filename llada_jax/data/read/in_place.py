"""Reads the rows of a set where they lie in a bucket: each row is one request for a range of its shard.

The row indices of the shards (data/row_index.py) say where the rows lie. They are small, about a thousandth of the
data, and each host keeps copies of those that it needs in config.data.cache: a shard's index is copied when the first
row of the shard is read, checked against the manifest, and found again by the next start. An entry is read from the
file of the copy when it is needed, so neither memory nor open files grow with the number of shards.

The index of a shard that has none is made from the footer of the shard. It has no checksums.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.chunks import DamagedChunk, chunk_offsets, record_of
from llada_jax.data.manifest import Shard
from llada_jax.data.row_index import ENTRY, checksum, index_name, index_size, row_index
from llada_jax.storage.ranges import IN_FLIGHT, Folder, Range, TooShort

_UNCHECKED = ".offsets"  # suffix of indices that were made from footers, without checksums
_REMEDY = "copy the whole folder there, or prepare the set again"


class DamagedRow(ValueError):
    """Raised if a row in a bucket is not what the index says."""


class InPlace:
    """The shards of one split of a set in a bucket. Several threads may read from it."""

    def __init__(self, path: str, shards: Sequence[Shard], folder: Path):
        """Checks that all shards and their row indices are there.

        Args:
          path: The address of the set.
          shards: The shards of the split.
          folder: The folder of this host that keeps the row indices of the set. It is made if needed.

        Raises:
          UserError: If a shard or an index is missing, or if the bucket cannot be read.
          StorageFailed: If the bucket does not answer.
        """
        self._bucket, self._shards, self._folder = Folder(path), shards, folder
        self._lock = threading.Lock()
        self._have: set[int] = set()  # shards whose indices are complete in the folder
        names = self._bucket.names()
        for shard in shards:
            for name in (shard.name, *([index_name(shard.name)] if shard.index_sha256 else ())):
                if name not in names:
                    raise UserError(f"{path}/{name} is missing: {_REMEDY}")

    def file(self, shard: int) -> str:
        return self._bucket.address(self._shards[shard].name)

    def read(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes | DamagedRow]:
        """Yields the record of each (shard, row in the shard), or its error if it is damaged.

        All records are requested at once.

        Raises:
          UserError: If a shard is missing, if an index is damaged, or if the bucket refuses access.
          StorageFailed: If the bucket does not answer.
        """
        self._need_indices(sorted({shard for shard, _ in places}))
        entries = [self._entry(shard, row) for shard, row in places]
        parts = [
            Range(self._shards[shard].name, int(entry["offset"][0]), int(entry["offset"][1]))
            for (shard, _), entry in zip(places, entries, strict=True)
        ]
        for (shard, _), part, entry, content in zip(places, parts, entries, self._contents(parts), strict=True):
            record = self._record(shard, part, entry, content)
            if isinstance(record, DamagedRow):  # perhaps on the way only
                record = self._record(shard, part, entry, self._contents([part])[0])
            yield record

    def _record(self, shard: int, part: Range, entry: np.ndarray, content: bytes) -> bytes | DamagedRow:
        try:
            record = record_of(content, part.start)
        except DamagedChunk as error:
            return DamagedRow(str(error))
        if self._shards[shard].index_sha256 and checksum(record) != int(entry["checksum"][0]):
            return DamagedRow("it does not have the checksum of the row index")
        return record

    def _entry(self, shard: int, row: int) -> np.ndarray:
        """Returns the entries of a row and of the next one."""
        with self._index(shard).open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), 2 * ENTRY.itemsize, row * ENTRY.itemsize)
        if len(content) != 2 * ENTRY.itemsize:
            raise UserError(f"{self._index(shard)} is cut short: remove the folder")
        return np.frombuffer(content, ENTRY)

    def _index(self, shard: int) -> Path:
        """Returns the file of this host that holds the index of a shard."""
        entry, name = self._shards[shard], index_name(self._shards[shard].name)
        return self._folder / (name if entry.index_sha256 else name + _UNCHECKED)

    def _need_indices(self, shards: Sequence[int]) -> None:
        """Copies the indices of shards to this host, unless they are there."""
        with self._lock:  # the threads that read ahead need the same indices
            missing = []
            for shard in shards:
                if shard in self._have:
                    continue
                try:
                    whole = self._index(shard).stat().st_size == index_size(self._shards[shard].rows)
                except (FileNotFoundError, NotADirectoryError):
                    whole = False
                if whole:
                    self._have.add(shard)
                else:
                    missing.append(shard)
            for start in range(0, len(missing), IN_FLIGHT):
                some = missing[start : start + IN_FLIGHT]
                self._copy_indices([shard for shard in some if self._shards[shard].index_sha256])
                for shard in some:
                    if not self._shards[shard].index_sha256:
                        self._make_index(shard)
                self._have.update(some)

    def _copy_indices(self, shards: Sequence[int]) -> None:
        entries = [self._shards[shard] for shard in shards]
        parts = [Range(index_name(entry.name), 0, index_size(entry.rows)) for entry in entries]
        for shard, entry, content in zip(shards, entries, self._contents(parts), strict=True):
            if hashlib.sha256(content).hexdigest() != entry.index_sha256:
                raise UserError(
                    f"{self._bucket.address(index_name(entry.name))} is not what the manifest says: copy it there "
                    "again, or prepare the set again"
                )
            self._keep(shard, content)

    def _make_index(self, shard: int) -> None:
        entry = self._shards[shard]
        try:
            offsets = chunk_offsets(lambda start, stop: self._contents([Range(entry.name, start, stop)])[0], entry.size)
            if len(offsets) != entry.rows + 1:
                raise DamagedChunk(f"it has {len(offsets) - 1} rows, but the manifest says {entry.rows}")
        except DamagedChunk as error:
            raise UserError(
                f"{self.file(shard)} is damaged: {error}; copy it there again, or prepare the set again"
            ) from error
        self._keep(shard, row_index(offsets, np.zeros(entry.rows, np.uint32)))

    def _contents(self, parts: Sequence[Range]) -> list[bytes]:
        try:
            return self._bucket.read(parts)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: {_REMEDY}") from error
        except TooShort as error:
            raise UserError(f"{error}: {_REMEDY}") from error

    def _keep(self, shard: int, content: bytes) -> None:
        """Writes the index of a shard, whole or not at all: other processes of this host may be doing the same."""
        target = self._index(shard)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(target)
        except OSError as error:
            raise UserError(
                f"{target} cannot be written: {' '.join(str(error).split())}; set config.data.cache to use another "
                "folder for the row indices"
            ) from error
