"""What the workers of a fleet do; fleet.py says in which order. Beam itself is not needed here.

Each function does one unit of work and may be called again, after a failure or beside itself: it writes the same bytes
under the same names, a whole file at a time, the file that says "done" last. If that file is there, nothing is done.
"""

import dataclasses
import functools
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.manifest import SPLITS, TOKENIZER_FOLDER, Shard
from llada_jax.data.prepare import storage
from llada_jax.data.prepare.duplicates import EXACT_KEYS
from llada_jax.data.prepare.filters import EXACT, NEAR, Filters, code_of
from llada_jax.data.prepare.judge import Places, Verdicts, by_item, counted, judge_documents
from llada_jax.data.prepare.pool import Pool
from llada_jax.data.prepare.prepare_text import write_tokens
from llada_jax.data.prepare.text import Corpus
from llada_jax.data.row_index import index_name
from llada_jax.data.rows import SplitWriter

_READ_TOKENS = 1 << 22  # number of tokens that are read at a time


class Job(NamedTuple):
    """What all workers must know; it is small, and part of every unit of work."""

    work: str  # the folder for unfinished work
    output: str  # the folder that the shards are written to
    sequence_length: int
    dtype: str
    eos_id: int
    shard_rows: int
    text_key: str
    on_error: str
    filters: Filters
    identity: str  # hash of all that the set depends on
    workers: int = 1  # number of processes that a unit of work may use

    def corpus(self, index: int, filtered: bool = True) -> Corpus:
        """Returns the input file of a number as a corpus, without what the filters leave out unless told otherwise."""
        inputs, files = _loaded(f"{self.work}/inputs", self.identity)
        corpus = Corpus(inputs, self.text_key, self.on_error, files=[files[index]])
        if self.filters.active and filtered:
            corpus.filter = Verdicts(self.filters, *storage.load(self.path("verdicts", index)))
        return corpus

    def path(self, kind: str, index: int, ending: str = "") -> str:
        """Returns the path of an unfinished file."""
        return f"{self.work}/{kind}/{index:07d}{ending}"

    @property
    def token(self) -> np.dtype:
        """The record of a token in a token file."""
        return np.dtype([("id", np.dtype(self.dtype).newbyteorder("<")), ("bytes", "<u4")])


class TokenFile:
    """Writes the token stream of one split of one input file, as `rows.SplitWriter` takes it."""

    def __init__(self, file: Any, token: np.dtype, eos_id: int):
        self._file, self._token, self._eos_id = file, token, eos_id
        self.tokens = self.bytes = self.documents = 0

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Appends tokens, each with the number of bytes of text that it stands for."""
        records = np.empty(len(ids), self._token)
        records["id"], records["bytes"] = ids, counts
        self._file.write(records.tobytes())
        self.tokens += len(ids)
        self.bytes += int(counts.sum(dtype=np.int64))

    def end_document(self) -> None:
        """Appends EOS and counts a document."""
        self.add(np.array([self._eos_id], np.uint32), np.zeros(1, np.uint32))
        self.documents += 1


class Tokenised(NamedTuple):
    """What became of one input file."""

    index: int
    error: str = ""  # why the whole preparation must fail
    splits: tuple[tuple[int, int, int], ...] = ()  # tokens, bytes and documents of each split
    counts: tuple[tuple[int, int, int], ...] = ()  # documents, tokens and bytes of each input
    good: int = 0  # documents that are not bad
    items: int = 0
    faults: Any = None  # `Faults.found`
    examples: Any = None  # `Verdicts.examples`


def tokenise(job: Job, below: int, index: int) -> Tokenised:
    """Tokenises an input file into one token file per split."""
    if done := storage.load(job.path("tokens", index)):
        return done
    corpus = job.corpus(index)
    names = [job.path("tokens", index, f"-{name}") for name in SPLITS]
    try:
        with storage.whole(names[0]) as train, storage.whole(names[1]) as validation:
            writers = [TokenFile(file, job.token, job.eos_id) for file in (train, validation)]
            sources = write_tokens(corpus, below, _pool(job), writers, progress=False)
    except UserError as error:
        return Tokenised(index, str(error))
    result = Tokenised(
        index,
        splits=tuple((writer.tokens, writer.bytes, writer.documents) for writer in writers),
        counts=tuple((source.documents, source.tokens, source.bytes) for source in sources),
        good=corpus.good,
        items=corpus.items,
        faults=corpus.faults.found,
        examples=corpus.filter.examples if isinstance(corpus.filter, Verdicts) else {},
    )
    storage.save(job.path("tokens", index), result)
    return result


class ShardPlan(NamedTuple):
    """Which tokens a shard consists of."""

    split: int  # index in SPLITS
    number: int
    tokens: int
    parts: tuple[tuple[int, int, int], ...]  # index of the input file, first token, number of tokens


def write_shard(job: Job, number: int) -> tuple[int, Shard]:
    """Packs the tokens of one shard into rows. Returns the number of the plan, and what the manifest says of it."""
    plan = _loaded(f"{job.work}/plans", job.identity)[number]
    if done := storage.load(job.path("shards", number)):
        return number, done
    local = None if storage.is_remote(job.work) else job.work
    with tempfile.TemporaryDirectory(dir=local) as folder:
        writer = SplitWriter(
            Path(folder), SPLITS[plan.split], job.sequence_length, job.dtype, job.eos_id, job.shard_rows
        )
        for index, start, count in plan.parts:
            with storage.open_file(job.path("tokens", index, f"-{SPLITS[plan.split]}"), "rb") as file:
                file.seek(start * job.token.itemsize)
                for size in _sizes(count):
                    records = np.frombuffer(file.read(size * job.token.itemsize), job.token)
                    if len(records) != size:
                        raise OSError(f"{job.work} has lost tokens: remove it and prepare again")
                    writer.add(records["id"], records["bytes"])
        split = writer.finish()
        (shard,) = split.shards
        if split.tokens != plan.tokens:
            raise OSError(f"{job.work} has lost tokens: remove it and prepare again")
        name = f"{SPLITS[plan.split]}-{plan.number:05d}.arrayrecord"
        storage.move(Path(folder) / shard.name, f"{job.output}/{name}")
        storage.move(Path(folder) / index_name(shard.name), f"{job.output}/{index_name(name)}")
    shard = dataclasses.replace(shard, name=name)
    storage.save(job.path("shards", number), shard)
    return number, shard


def plan_shards(job: Job, tokenised: list[Tokenised]) -> list[ShardPlan]:
    """Returns the shards of both splits, in order: the token streams of the files follow one another."""
    plans = []
    for split in range(len(SPLITS)):
        ends = np.cumsum([each.splits[split][0] for each in tokenised])
        total, size = int(ends[-1]), job.shard_rows * job.sequence_length
        for number, first in enumerate(range(0, total, size)):
            last, parts = min(first + size, total), []
            index = int(np.searchsorted(ends, first, side="right"))
            while first < last:
                begin, end = int(ends[index]) - tokenised[index].splits[split][0], min(last, int(ends[index]))
                if end > first:
                    parts.append((index, first - begin, end - first))
                first, index = end, index + 1
            plans.append(ShardPlan(split, number, sum(count for *_, count in parts), tuple(parts)))
    return plans


class Settled(NamedTuple):
    """What the filters leave out of one input file."""

    index: int
    error: str = ""
    sources: Any = ()  # `FilteredSource` of each input


def judge_file(job: Job, index: int) -> Iterator[tuple[bytes, tuple[int, int, str]]]:
    """Judges an input file, and yields (key, (file, position, error)) for each key of the documents that stay.

    One more pair says that the file was judged; its key is the number of the file alone, and its position is -1.
    """
    corpus, error = job.corpus(index, filtered=False), ""
    try:
        judged, places = judge_documents(corpus, job.filters, job.workers, progress=False)
        storage.save(job.path("judged", index), (judged._replace(keys=None), places, corpus.items))
        keys = judged.keys.astype("<u8")
        for position in np.flatnonzero(judged.reasons == 0).tolist():
            parts = [keys[position, :EXACT_KEYS], *keys[position, EXACT_KEYS:, None]] if job.filters.keys else []
            for column, part in enumerate(parts):
                yield bytes([column]) + part.tobytes(), (index, position, "")
    except UserError as failed:
        error = str(failed)
    yield b"file %d" % index, (index, -1, error)


def repeated(group: tuple[bytes, Iterable[tuple[int, int, str]]]) -> Iterator[tuple[int, tuple[int, int, str]]]:
    """Yields (file, (position, reason, error)) for all documents of a key but the first, and for a judged file."""
    key, places = group
    if key.startswith(b"file "):
        for index, _, error in places:
            yield index, (-1, 0, error)
        return
    code, first = code_of(NEAR if key[0] else EXACT), None
    for place in places:
        if first is not None:
            later = max(first, place)
            yield later[0], (later[1], code, "")
            place = min(first, place)
        first = place


def settle(job: Job, group: tuple[int, Iterable[tuple[int, int, str]]]) -> Settled:
    """Writes which documents of an input file are left out, duplicates among them, and returns the counts."""
    index, found = group
    found = list(found)
    if error := max(error for *_, error in found):
        return Settled(index, error)
    judged, places, items = storage.load(job.path("judged", index))
    reasons = judged.reasons.copy()
    for position, code, _ in found:
        # "exact duplicate" is the reason of what is both.
        if position >= 0 and reasons[position] != code_of(EXACT):
            reasons[position] = code
    sources = counted(job.corpus(index, filtered=False), reasons, judged.lines, Places(*places))
    storage.save(job.path("verdicts", index), (by_item(reasons, places, items), sources))
    return Settled(index, sources=tuple(sources))


def _sizes(count: int) -> Iterator[int]:
    for start in range(0, count, _READ_TOKENS):
        yield min(_READ_TOKENS, count - start)


@functools.lru_cache(maxsize=2)
def _loaded(path: str, _identity: str) -> Any:
    return storage.load(path)


_pools: dict[str, Pool] = {}  # the pool of the job that this process works on, by the job's identity
_lock = threading.Lock()  # runners call the functions of this module from several threads


def _pool(job: Job) -> Pool:
    """Returns the pool that tokenises in this process; it is kept until `close`."""
    with _lock:
        if job.identity not in _pools:
            _close()
            _pools[job.identity] = _new_pool(job)
        return _pools[job.identity]


def _new_pool(job: Job) -> Pool:
    folder = f"{job.work}/{TOKENIZER_FOLDER}"
    if not storage.is_remote(folder):
        return Pool(folder, job.workers)
    with tempfile.TemporaryDirectory() as local:
        storage.copy_folder(folder, local)
        return Pool(local, 1)  # processes of its own would read the files later


def close() -> None:
    """Ends the processes that tokenise for this process."""
    with _lock:
        _close()


def _close() -> None:
    while _pools:
        _pools.popitem()[1].close()
