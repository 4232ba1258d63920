"""Prepared sets -> batches.

Row i of step s is a pure function of (seed, s, i): there is no iterator state to save, a run can be
resumed at any step and its rows spread over any number of hosts. With n = s * batch_size + i, the place of the row in
the run:

  the mixture      n -> (set, place in that set), in closed form and in exact proportions;
  the set          place -> row: Grain shuffles each epoch of a set anew, every row once per epoch;
  random lengths   one n in every block of `random_length_every` consecutive ones is cut short.
"""

import fractions
import functools
import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from etils import epath

from llada_jax.config import UserError
from llada_jax.data.manifest import Manifest, load_manifest
from llada_jax.data.pairs import Pair, decode_pair
from llada_jax.data.rows import HeldOut, Row, decode_row

_OPEN_THREADS = 16  # shards looked at in parallel when a run starts: with gs:// each takes a round trip
_READER_OPTIONS = {"max_parallelism": "0"}  # the fastest for random access


class Data:
    """The training rows of one or several prepared sets; what a batch of them is, a subclass says.

    Attributes:
      manifests: of the sets.
      hashes: their sha256, the identity of the data.
      eos_id: fills rows up beyond their length.
    """

    def __init__(
        self, sets: Sequence["Rows"], sizes: Sequence[int], weights: Sequence[float], seed: int, batch_size: int
    ):
        """`sizes`: what an epoch of each set takes, of which `_place` gives one; UserError for impossible weights."""
        if weights and len(weights) != len(sets):
            raise UserError(f"data.weights has {len(weights)} values for {len(sets)} sets in data.path")
        if any(not math.isfinite(w) or w < 0 for w in weights) or (weights and not any(weights)):
            raise UserError(f"data.weights {tuple(weights)}: numbers of at least 0, not all 0, are needed")
        for rows in sets:
            if not len(rows):
                raise UserError(f"{rows.path} has no training rows")
        self.manifests: tuple[Manifest, ...] = tuple(rows.manifest for rows in sets)
        self.hashes: tuple[str, ...] = tuple(manifest.sha256 for manifest in self.manifests)
        self.eos_id = self.manifests[0].eos_id
        self._sets, self._sizes = sets, sizes
        self._seed, self._batch_size = seed, batch_size
        self._proportions = _integer_proportions(weights or sizes)
        self._shuffled = [
            # Grain counts epochs by adding 1 to the seed: seeds far apart keep sets and runs independent.
            grain.MapDataset.range(size).shuffle(seed=digest(seed, "shuffle", i) % 2**32).repeat()
            for i, size in enumerate(sizes)
        ]

    def _place(self, n: int) -> tuple[int, int, int]:
        """Of row n of the run: which set, which of its `sizes`, and in which of that set's epochs."""
        which, place = _select(n, self._proportions)
        return which, int(self._shuffled[which][place]), place // self._sizes[which]

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows of one step.

        Args:
          step: from 0.
          rows: places in the global batch, each in 0..batch_size - 1.

        Raises UserError if a row is damaged or holds an id that the model does not have.
        """
        raise NotImplementedError

    def iterate(
        self, start_step: int, rows: Sequence[int], *, prefetch: int = 4, threads: int = 1
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields (step, `batch(step, rows)`) from `start_step` on, without end.

        Args:
          start_step: first step.
          rows: as in `batch`.
          prefetch: batches read ahead in the background; 0 = none.
          threads: that read them.

        An exception in the background is raised here, at its step. `close()` stops the reading.
        """
        step = start_step
        if prefetch < 1:
            while True:
                yield step, self.batch(step, rows)
                step += 1
        executor = ThreadPoolExecutor(max(1, threads), thread_name_prefix="data")
        ahead: deque[Future[dict[str, np.ndarray]]] = deque()
        try:
            while True:
                while len(ahead) < prefetch:
                    ahead.append(executor.submit(self.batch, step + len(ahead), rows))
                batch = ahead.popleft().result()
                ahead.append(executor.submit(self.batch, step + prefetch, rows))
                yield step, batch
                step += 1
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


class TrainingData(Data):
    """Packed text."""

    def __init__(
        self,
        paths: Sequence[str],
        weights: Sequence[float] = (),
        *,
        seed: int,
        batch_size: int,
        sequence_length: int,
        random_length_every: int,
        vocab_size: int,
    ):
        """Opens and checks everything.

        Args:
          paths: folders written by llada_jax.prepare.
          weights: share of each set in the rows, in any scale; () = by number of rows, so that all sets end an
            epoch together.
          seed: any int >= 0; order of the rows and their random lengths.
          batch_size: rows per step, over all hosts.
          sequence_length: T, which must be that of the sets.
          random_length_every: rows; exactly one in every so many gets a length uniform in 1..T; 0 = never.
          vocab_size: of the model; no id may reach it.

        Raises UserError for a set, weight or shard that cannot be used.
        """
        sets = open_sets(paths, "train", sequence_length, vocab_size, chat=False)
        super().__init__(sets, [len(rows) for rows in sets], weights, seed, batch_size)
        self._T, self._every = sequence_length, random_length_every
        self._random_length = functools.lru_cache(maxsize=64)(self._draw_random_length)

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """As `Data.batch`.

        Returns:
          "tokens": int32 [len(rows), T]; "length": int32 [len(rows)], beyond which a row is EOS, neither
          attended to nor counted.
        """
        tokens = np.empty((len(rows), self._T), np.int32)
        lengths = np.empty(len(rows), np.int32)
        for k, row in enumerate(rows):
            n = int(step) * self._batch_size + int(row)
            which, index, _ = self._place(n)
            record: Row = self._sets[which][index]
            length = record.length
            if self._every:
                block, offset = divmod(n, self._every)
                short_offset, short_length = self._random_length(block)
                if offset == short_offset:
                    length = min(length, short_length)
            tokens[k] = record.tokens
            tokens[k, length:] = self.eos_id
            lengths[k] = length
        return {"tokens": tokens, "length": lengths}

    def _draw_random_length(self, block: int) -> tuple[int, int]:
        """Which row of a block is cut short, and to which length."""
        # Philox is counter-based; its raw output, unlike the distributions of numpy, never changes.
        key = np.array([digest(self._seed, "length", 0), block], np.uint64)
        offset, length = np.random.Philox(key=key).random_raw(2)
        return int(offset) % self._every, int(length) % self._T + 1


def validation_rows(paths: Sequence[str], rows: int, sequence_length: int, vocab_size: int) -> HeldOut:
    """The first held-out rows of text, taken from the sets in turn: always the same ones.

    There are fewer than `rows` if the sets hold out less. Raises UserError as `TrainingData` does.
    """
    sets = open_sets(paths, "validation", sequence_length, vocab_size, chat=False)
    chosen: list[Row] = [sets[which][i] for which, i in in_turn([*map(len, sets)], rows)]
    tokens = np.array([row.tokens for row in chosen], np.int32).reshape(len(chosen), sequence_length)
    length = np.array([row.length for row in chosen], np.int32)
    return HeldOut(tokens, length, np.zeros_like(length), np.array([row.bytes for row in chosen], np.int64))


def in_turn(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(which, place in it) of the first `count` items of sequences of these sizes, one of each in turn."""
    order = sorted((i, which) for which, size in enumerate(sizes) for i in range(min(count, size)))[:count]
    return [(which, i) for i, which in order]


class Rows:
    """Random access to the checked rows of one split of one set."""

    def __init__(self, path: str, manifest: Manifest, split: str, vocab_size: int):
        self.path, self.manifest = path, manifest
        self._vocab_size = vocab_size
        self._shards = manifest.split(split).shards
        self._len = sum(shard.rows for shard in self._shards)
        folder = epath.Path(path)
        files = [str(folder / shard.name) for shard in self._shards]
        with ThreadPoolExecutor(_OPEN_THREADS) as executor:
            for _ in executor.map(_check_shard, files, self._shards):
                pass
        # With the number of rows in the name, files are opened when they are first read.
        names = [f"{file}[0:{shard.rows}]" for file, shard in zip(files, self._shards, strict=True)]
        self._records = grain.sources.ArrayRecordDataSource(names, _READER_OPTIONS) if names else []

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Row | Pair:
        decode = decode_pair if self.manifest.chat else decode_row
        try:
            row = decode(self._records[index], self.manifest.dtype, self.manifest.sequence_length)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self._place(index)} is damaged: {' '.join(str(error).split())}") from error
        highest = int(row.tokens.max())
        if highest >= self._vocab_size or int(row.tokens.min()) < 0:
            raise UserError(
                f"{self._place(index)} holds the token id {highest}, and the model's vocabulary ends at "
                f"{self._vocab_size}: another tokenizer, or model.vocab_size is too small"
            )
        return row

    def _place(self, index: int) -> str:
        for shard in self._shards:
            if index < shard.rows:
                return f"{epath.Path(self.path) / shard.name}, row {index},"
            index -= shard.rows
        raise IndexError(index)


def open_sets(paths: Sequence[str], split: str, sequence_length: int, vocab_size: int, chat: bool) -> list[Rows]:
    """Opens one split of every set, which must hold conversations or, if not `chat`, text.

    All manifests are looked at before any shard. Raises UserError for a set that cannot be used.
    """
    if not paths:
        raise UserError("data.path: no prepared set is named")
    manifests = [load_manifest(path) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        if chat != (manifest.chat is not None):
            held, wanted = ("conversations", "text") if manifest.chat else ("text", "conversations")
            raise UserError(
                f"{path} holds {held}, and config.diffusion.objective trains on {wanted}: "
                "choose another objective, or prepare the set with" + ("out" if manifest.chat else "") + " --chat"
            )
        if manifest.sequence_length != sequence_length:
            raise UserError(
                f"{path} is prepared for a sequence length of {manifest.sequence_length}, and sequence_length is "
                f"{sequence_length}: prepare it again or change the setting"
            )
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise UserError(f"{path} and {paths[0]} have different tokenizers: prepare them with the same one")
        if manifest.tokenizer_size > vocab_size:
            raise UserError(
                f"{path} has a tokenizer of {manifest.tokenizer_size} ids, and the model's vocabulary is {vocab_size}: "
                f"model.vocab_size={manifest.vocab_size} would do"
            )
        if chat and manifest.chat.template_sha256 != manifests[0].chat.template_sha256:
            raise UserError(f"{path} and {paths[0]} have different chat templates: prepare them with the same one")
    return [Rows(path, manifest, split, vocab_size) for path, manifest in zip(paths, manifests, strict=True)]


def _check_shard(file: str, shard: Any) -> None:
    """Raises UserError unless the file has the size that the manifest says, and opens."""
    from array_record.python.array_record_module import ArrayRecordReader

    path = epath.Path(file)
    if not path.exists():
        raise UserError(f"{file} is missing: copy the whole folder, or prepare the set again")
    size = path.stat().length
    if size != shard.size:
        raise UserError(f"{file} is cut short or changed: {size:,} bytes, {shard.size:,} in the manifest")
    try:
        reader = ArrayRecordReader(file, "readahead_buffer_size:0,max_parallelism:0")
        complete = reader.ok() and reader.num_records() == shard.rows
        reader.close()
    except RuntimeError:
        complete = False
    if not complete:
        raise UserError(f"{file} is damaged: copy it again, or prepare the set again")


def digest(seed: int, purpose: str, index: int) -> int:
    """64 bits out of any seed, another for each purpose and index."""
    text = f"{seed} {purpose} {index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _integer_proportions(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as exact integers, as they are written: 0.7 and 0.3 are 7 and 3."""
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(f.denominator for f in exact))
    integers = [int(f * common) for f in exact]
    divisor = math.gcd(*integers)
    return tuple(i // divisor for i in integers)


def _select(n: int, proportions: Sequence[int]) -> tuple[int, int]:
    """Position n of the mixture -> (set, position within the set).

    Of the first m positions, floor(m (total - p) / total) go to the sets after the first, of proportion p; among
    those the rule applies again. Any sum(proportions) positions from a multiple of it hold exactly p of each set,
    and every set is read without gaps. (Grain's own mixture rounds the proportions.)
    """
    total = sum(proportions)
    start, stop = n, n + 1
    for which, proportion in enumerate(proportions):
        rest_start = start * (total - proportion) // total
        rest_stop = stop * (total - proportion) // total
        if rest_start == rest_stop:
            return which, start - rest_start
        start, stop, total = rest_start, rest_stop, total - proportion
    raise AssertionError("the last set takes what is left")
