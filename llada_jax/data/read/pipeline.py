"""Reads prepared sets as batches.

Row i of step s is a pure function of (seed, s, i). There is no iterator state to save: a run can be resumed at any
step, and its rows can be spread over any number of hosts. The place of the row in the run is n = s * batch_size + i.
Three parts turn n into a row:

  the mixture      It maps n to (set, place in that set), in closed form and in exact proportions.
  the set          It maps the place to a row. Grain shuffles each epoch of a set anew; an epoch has every row once.
  random lengths   In every block of `random_length_every` consecutive rows of the run, one row is cut short.
"""

import bisect
import fractions
import functools
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import grain
import numpy as np

from llada_jax.config import UserError
from llada_jax.data.manifest import Manifest
from llada_jax.data.read.shards import Rows, open_sets, read_rows
from llada_jax.data.rows import HeldOut, Row
from llada_jax.storage.ranges import IN_FLIGHT

_ROWS_AHEAD = 2 * IN_FLIGHT  # the least number of rows that are read ahead from a bucket


class Data:
    """The training rows of one or several prepared sets. A subclass defines what a batch of them contains.

    Attributes:
      manifests: The manifests of the sets.
      hashes: The sha256 of each manifest; together they identify the data.
      eos_id: The id of EOS, which fills a row beyond its length.
    """

    def __init__(
        self,
        sets: Sequence["Rows"],
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        batch_size: int,
        copies: int = 1,
    ):
        """Prepares the order of the rows.

        Args:
          sets: The training rows of each set.
          sizes: For each set, the number of items in an epoch; `_place` chooses one item for each row of the run.
          weights: The share of each set, in any scale; () means the sizes.
          seed: The seed of the order.
          batch_size: The number of rows per step, over all hosts.
          copies: The number of consecutive rows that hold the same sequence. It must divide the batch size.

        Raises:
          UserError: If the weights are impossible, or if a set has no training rows.
        """
        if weights and len(weights) != len(sets):
            raise UserError(f"data.weights has {len(weights)} values for {len(sets)} sets in data.path")
        if any(not math.isfinite(w) or w < 0 for w in weights) or (weights and not any(weights)):
            raise UserError(
                f"data.weights={tuple(weights)} must consist of finite numbers of at least 0 that are not all 0"
            )
        for rows in sets:
            if not len(rows):
                raise UserError(f"{rows.path} has no training rows")
        self.manifests: tuple[Manifest, ...] = tuple(rows.manifest for rows in sets)
        self.hashes: tuple[str, ...] = tuple(manifest.sha256 for manifest in self.manifests)
        self.eos_id = self.manifests[0].eos_id
        self._sets, self._sizes = sets, sizes
        self._seed, self._batch_size, self._copies = seed, batch_size, copies
        self._proportions = _integer_proportions(weights or sizes)
        self._shuffled = [
            # Grain adds 1 to the seed for each epoch. Seeds that are far apart keep sets and runs independent.
            grain.MapDataset.range(size).shuffle(seed=digest(seed, "shuffle", i) % 2**32).repeat()
            for i, size in enumerate(sizes)
        ]

    def _sequence(self, step: int, row: int) -> int:
        """Returns the number of the sequence, among all of the run, that a row of a step holds."""
        return (int(step) * self._batch_size + int(row)) // self._copies

    def _place(self, n: int) -> tuple[int, int, int]:
        """Returns the index of the set that sequence n of the run comes from, its item there, and the set's epoch."""
        which, place = _select(n, self._proportions)
        return which, int(self._shuffled[which][place]), place // self._sizes[which]

    def _record(self, n: int) -> tuple[int, int]:
        """Returns the index of the set that sequence n of the run comes from, and of the record in that set."""
        return self._place(n)[:2]

    def origins(self, step: int) -> dict[str, dict[str, list[int]]]:
        """Returns where the rows of a step come from: path of the set -> name of the shard -> places in the shard."""
        found: dict[str, dict[str, list[int]]] = {}
        ends = [list(itertools.accumulate(shard.rows for shard in one.train.shards)) for one in self.manifests]
        for which, index in sorted({self._record(self._sequence(step, row)) for row in range(self._batch_size)}):
            k = bisect.bisect_right(ends[which], index)
            shard = self.manifests[which].train.shards[k]
            places = found.setdefault(self._sets[which].path, {}).setdefault(shard.name, [])
            places.append(index - (ends[which][k] - shard.rows))
        return found

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the rows of one step.

        Args:
          step: The step, counted from 0.
          rows: The places of the rows in the global batch, each in 0..batch_size - 1.

        Raises:
          UserError: If a row is damaged or holds an id that the model does not have.
        """
        raise NotImplementedError

    def iterate(
        self, start_step: int, rows: Sequence[int], *, prefetch: int = 4, threads: int = 1
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields (step, `batch(step, rows)`) from `start_step` on, without end.

        An exception in a background thread is raised here, when its step is due. `close()` stops the reading.

        Args:
          start_step: The first step.
          rows: The places of the rows in the global batch, as in `batch`.
          prefetch: The number of batches that are read ahead in the background; 0 means none. If rows come from a
            bucket, as many more are read ahead as keep its connections busy.
          threads: The number of background threads that read batches. If rows come from a bucket, each batch that is
            read ahead has one.
        """
        step = start_step
        if prefetch < 1:
            while True:
                yield step, self.batch(step, rows)
                step += 1
        if any(each.in_place for each in self._sets):  # then threads wait for answers more than they compute
            prefetch = max(prefetch, -(-_ROWS_AHEAD // max(1, len(rows))))
            threads = max(threads, prefetch)
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
    """The training rows of sets of packed text."""

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
        copies: int = 1,
        cache: str = "",
    ):
        """Opens and checks the sets.

        Args:
          paths: The folders of the sets, written by llada_jax.prepare.
          weights: The share of each set in the rows, in any scale. () means by the number of rows, so that all sets
            end an epoch together.
          seed: The seed of the order of the rows and of their random lengths, any int >= 0.
          batch_size: The number of rows per step, over all hosts.
          sequence_length: T, which must be the sequence length of the sets.
          random_length_every: The number of rows in a block of which exactly one row gets a random length, uniform in
            1..T; 0 means that no row gets one.
          vocab_size: The vocabulary size of the model; every id must be below it.
          copies: The number of consecutive rows that hold the same sequence, with the same length.
          cache: The folder for the row indices of sets in buckets; "" means ~/.cache/llada_jax.

        Raises:
          UserError: If a set, a weight or a shard cannot be used.
        """
        sets = open_sets(paths, "train", sequence_length, vocab_size, chat=False, cache=cache)
        super().__init__(sets, [len(rows) for rows in sets], weights, seed, batch_size, copies)
        self._T, self._every = sequence_length, random_length_every
        self._random_length = functools.lru_cache(maxsize=64)(self._draw_random_length)

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the rows of one step; the arguments and the errors are those of `Data.batch`.

        Returns:
          A dict with two arrays: "tokens" is int32 [len(rows), T], and "length" is int32 [len(rows)]. Beyond its
          length, a row is EOS, which is neither attended to nor counted in the loss.
        """
        tokens = np.empty((len(rows), self._T), np.int32)
        lengths = np.empty(len(rows), np.int32)
        sequences = [self._sequence(step, row) for row in rows]
        records: list[Row] = read_rows(self._sets, [self._place(n)[:2] for n in sequences])
        for k, (n, record) in enumerate(zip(sequences, records, strict=True)):
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
        """Returns which row of a block is cut short, and to which length."""
        # Philox is counter-based. Its raw output never changes, unlike the output of NumPy's distributions.
        key = np.array([digest(self._seed, "length", 0), block], np.uint64)
        offset, length = np.random.Philox(key=key).random_raw(2)
        return int(offset) % self._every, int(length) % self._T + 1


def validation_rows(paths: Sequence[str], rows: int, sequence_length: int, vocab_size: int, cache: str = "") -> HeldOut:
    """Returns the first held-out rows of packed text, taken from the sets in turn; always the same ones.

    Args:
      paths: The folders of the sets.
      rows: The number of rows to return. The result has fewer if the sets hold out fewer rows.
      sequence_length: T, which must be the sequence length of the sets.
      vocab_size: The vocabulary size of the model; every id must be below it.
      cache: The folder for the row indices of sets in buckets; "" means ~/.cache/llada_jax.

    Raises:
      UserError: If a set or a shard cannot be used, as for `TrainingData`.
    """
    sets = open_sets(paths, "validation", sequence_length, vocab_size, chat=False, cache=cache)
    chosen: list[Row] = read_rows(sets, in_turn([*map(len, sets)], rows))
    tokens = np.array([row.tokens for row in chosen], np.int32).reshape(len(chosen), sequence_length)
    length = np.array([row.length for row in chosen], np.int32)
    return HeldOut(tokens, length, np.zeros_like(length), np.array([row.bytes for row in chosen], np.int64))


def in_turn(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Returns the first `count` items of several sequences, taken in turn: one item of each, then the next of each.

    Args:
      sizes: The length of each sequence. A sequence that has no items left is skipped.
      count: The maximum number of items.

    Returns:
      (index of the sequence, place in that sequence) of each item.
    """
    order = sorted((i, which) for which, size in enumerate(sizes) for i in range(min(count, size)))[:count]
    return [(which, i) for i, which in order]


def digest(seed: int, purpose: str, index: int) -> int:
    """Returns 64 bits that are derived from any seed and that differ for each purpose and index."""
    text = f"{seed} {purpose} {index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _integer_proportions(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns integers in exactly the proportions of the weights as they are written: 0.7 and 0.3 give 7 and 3."""
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(f.denominator for f in exact))
    integers = [int(f * common) for f in exact]
    divisor = math.gcd(*integers)
    return tuple(i // divisor for i in integers)


def _select(n: int, proportions: Sequence[int]) -> tuple[int, int]:
    """Maps position n of the mixture to (index of the set, position in that set).

    Let p be the proportion of the first set. Of the first m positions of the mixture, floor(m (total - p) / total) go
    to the sets after the first one; the same rule then divides these positions among those sets. Any sum(proportions)
    consecutive positions that begin at a multiple of sum(proportions) hold exactly as many positions of each set as its
    proportion says, and every set is read without gaps. (Grain's own mixture rounds the proportions.)
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
