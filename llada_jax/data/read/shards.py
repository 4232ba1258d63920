"""Opens the shards of prepared sets, and gives random access to their rows.

A set may have thousands of shards, more than a process may have open files. Readers are therefore opened when a row of
theirs is read, and the least recently used ones are closed.
"""

import bisect
import collections
import itertools
import resource
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from llada_jax.cli import machine_errors
from llada_jax.config import UserError
from llada_jax.data.manifest import Manifest, Shard
from llada_jax.data.pairs import Pair, decode_pair
from llada_jax.data.read import remote
from llada_jax.data.read.in_place import InPlace
from llada_jax.data.rows import Row, decode_row
from llada_jax.storage.objects import is_bucket

_OPEN_THREADS = 16  # shards checked in parallel when a run starts
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # the fastest setting for random access
_MOST_OPEN = 1024  # readers; each has one open file and an index of its records in memory


def most_open() -> int:
    """Returns how many readers may be open: half of the files that this process may open, but not too many."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, limit // 2))


class _Readers:
    """The open readers of all sets of this process, the most recently used ones last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[tuple[Hashable, int], ArrayRecordReader] = collections.OrderedDict()

    def get(self, owner: Hashable, shard: int, file: str) -> ArrayRecordReader:
        """Returns the reader of a shard of `owner`, and opens it if needed.

        A reader that is closed to make room is closed only when the last thread that uses it is done with it.
        """
        key = owner, shard
        with self._lock:
            if reader := self._open.get(key):
                self._open.move_to_end(key)
                return reader
        reader = _opened(file)
        if reader is None:
            raise ValueError("it is not an ArrayRecord file")
        with self._lock:
            self._open[key] = reader
            while len(self._open) > most_open():
                self._open.popitem(last=False)
        return reader

    def forget(self, owner: Hashable) -> None:
        """Closes all readers of `owner`."""
        with self._lock:
            for key in [key for key in self._open if key[0] == owner]:
                del self._open[key]


_readers = _Readers()
_owners = itertools.count()


def _opened(file: str) -> ArrayRecordReader | None:
    """Returns a reader of a file, or None if the file is damaged.

    Raises:
      OSError: If the machine does not let this process read the file.
      UserError: If the file is missing.
    """
    for _ in range(3):
        reader = ArrayRecordReader(file, _READER_OPTIONS)
        if reader.ok():
            return reader
        # The reader does not say why. If the file can be read now, the reason may have been one that has passed, such
        # as too many open files.
        machine_errors.check_readable(file)
    return None


class _Local:
    """The shards of one split of a set in a folder of this machine."""

    def __init__(self, path: str, shards: Sequence[Shard]):
        """Checks the shards and opens them. The errors are those of `Rows`."""
        folder = epath.Path(path)
        self._files = [str(folder / shard.name) for shard in shards]
        with ThreadPoolExecutor(min(_OPEN_THREADS, most_open())) as executor:
            for _ in executor.map(_check_shard, self._files, shards):
                pass
        self._owner = next(_owners)
        weakref.finalize(self, _readers.forget, self._owner)

    def file(self, shard: int) -> str:
        return self._files[shard]

    def read(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes | Exception]:
        """Yields the record of each (shard, row in the shard), or its error if it is damaged."""
        for shard, place in places:
            try:
                (record,) = _readers.get(self._owner, shard, self._files[shard]).read([place])
                yield record
            except (RuntimeError, ValueError) as error:
                if failed := machine_errors.machine_error(error, self._files[shard]):
                    raise failed from error
                machine_errors.check_readable(self._files[shard])
                yield error


class Rows:
    """Gives random access to the rows of one split of one set, and checks each row that it reads."""

    def __init__(self, path: str, manifest: Manifest, split: str, vocab_size: int, cache: str = ""):
        """Checks the shards.

        Args:
          path: The folder of the set. If it is in a bucket, rows are read in place.
          manifest: The manifest of the set.
          split: The name of the split.
          vocab_size: The vocabulary size of the model; every id must be below it.
          cache: The folder for the row indices of sets in buckets; "" means ~/.cache/llada_jax.

        Raises:
          UserError: If a shard is missing or damaged.
          OSError: If the machine does not let this process read a shard, or if the bucket does not answer.
        """
        self.path, self.manifest = path, manifest
        self._vocab_size = vocab_size
        self._shards = manifest.split(split).shards
        self._len = sum(shard.rows for shard in self._shards)
        self._ends = list(itertools.accumulate(shard.rows for shard in self._shards))
        self.in_place = is_bucket(path)
        self._source: _Local | InPlace
        if self.in_place:
            self._source = InPlace(path, self._shards, remote.cache_folder(manifest, cache))
        else:
            self._source = _Local(path, self._shards)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Row | Pair:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[Row | Pair]:
        """Returns several rows. Those of a set in a bucket are requested at once."""
        places = []
        for index in map(int, indices):
            if not 0 <= index < self._len:
                raise IndexError(index)
            shard = bisect.bisect_right(self._ends, index)
            places.append((shard, index - (self._ends[shard] - self._shards[shard].rows)))
        return [
            self._decoded(self._source.file(shard), place, record)
            for (shard, place), record in zip(places, self._source.read(places), strict=True)
        ]

    def _decoded(self, file: str, place: int, record: bytes | Exception) -> Row | Pair:
        decode = decode_pair if self.manifest.chat else decode_row
        try:
            if isinstance(record, Exception):
                raise record
            row = decode(record, self.manifest.dtype, self.manifest.sequence_length)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{file}, row {place}, is damaged: {' '.join(str(error).split())}") from error
        highest = int(row.tokens.max())
        if highest >= self._vocab_size or int(row.tokens.min()) < 0:
            raise UserError(
                f"{file}, row {place}, holds the token id {highest}, but the model's vocabulary ends at "
                f"{self._vocab_size}: the set has another tokenizer, or model.vocab_size is too small"
            )
        return row


def read_rows(sets: Sequence[Rows], places: Sequence[tuple[int, int]]) -> list[Row | Pair]:
    """Returns rows of several sets, each given as (index of the set, row of the set). A row is read once.

    Raises:
      UserError: If a row is damaged or holds an id that the model does not have.
      OSError: If the machine, or the bucket, does not let this process read.
    """
    found: dict[tuple[int, int], Row | Pair] = {}
    for which in dict.fromkeys(which for which, _ in places):
        indices = list(dict.fromkeys(int(index) for each, index in places if each == which))
        found |= {(which, index): row for index, row in zip(indices, sets[which].read(indices), strict=True)}
    return [found[which, int(index)] for which, index in places]


def open_sets(
    paths: Sequence[str], split: str, sequence_length: int, vocab_size: int, chat: bool, cache: str = ""
) -> list[Rows]:
    """Opens one split of every set. All manifests are checked before any shard is.

    Args:
      paths: The folders of the sets.
      split: The name of the split.
      sequence_length: T, which must be the sequence length of the sets.
      vocab_size: The vocabulary size of the model.
      chat: Whether the sets must hold conversations. False means that they must hold packed text.
      cache: The folder for the row indices of sets in buckets; "" means ~/.cache/llada_jax.

    Raises:
      UserError: If a set cannot be used.
    """
    if not paths:
        raise UserError("config.data.path names no prepared set: give at least one folder")
    manifests = [remote.manifest_of(path) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        if chat != (manifest.chat is not None):
            held, wanted = ("conversations", "text") if manifest.chat else ("text", "conversations")
            raise UserError(
                f"{path} holds {held}, but config.diffusion.objective trains on {wanted}: "
                "choose another objective, or prepare the set with" + ("out" if manifest.chat else "") + " --chat"
            )
        if manifest.sequence_length != sequence_length:
            raise UserError(
                f"{path} was prepared for a sequence length of {manifest.sequence_length}, but sequence_length is "
                f"{sequence_length}: prepare the set again or change the setting"
            )
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise UserError(f"{path} and {paths[0]} have different tokenizers: prepare both with the same one")
        if manifest.needed_rows > vocab_size:
            raise UserError(
                f"{path} has a tokenizer of {manifest.needed_rows} ids, but the model's vocabulary has only "
                f"{vocab_size}: model.vocab_size={manifest.vocab_size} would be large enough"
            )
        if chat and manifest.chat.template_sha256 != manifests[0].chat.template_sha256:
            raise UserError(f"{path} and {paths[0]} have different chat templates: prepare both with the same one")
    return [Rows(path, manifest, split, vocab_size, cache) for path, manifest in zip(paths, manifests, strict=True)]


def _check_shard(file: str, shard: Shard) -> None:
    """Raises UserError unless the file has the size that the manifest says and can be opened."""
    path = epath.Path(file)
    if not path.exists():
        raise UserError(f"{file} is missing: copy the whole folder, or prepare the set again")
    size = path.stat().length
    if size != shard.size:
        raise UserError(
            f"{file} is cut short or changed: it has {size:,} bytes, but the manifest says {shard.size:,}; "
            "copy it again, or prepare the set again"
        )
    try:
        reader = _opened(file)
        complete = reader is not None and reader.num_records() == shard.rows
    except RuntimeError as error:
        if failed := machine_errors.machine_error(error, file):
            raise failed from error
        complete = False
    if not complete:
        raise UserError(f"{file} is damaged: copy it again, or prepare the set again")
