"""Reads prepared conversations as batches for instruction tuning (Section 2.3 and Appendix B of arXiv 2502.09992).

As in pipeline.py, a row is a pure function of (seed, step, row). An epoch takes every conversation once. From a
conversation with several answers, an epoch takes one answer, and each further epoch takes another one until all had
their turn.

Answers are padded with EOS up to the longest row of the global batch. This padding is part of the loss. The arrays may
be longer than that row: they have one of at most four lengths, so that few programs are compiled. What lies beyond the
longest row of the global batch is padding that is neither attended to nor counted in the loss.
"""

from collections.abc import Sequence

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.pairs import Pair, load_index
from llada_jax.data.read.pipeline import Data, digest, in_turn
from llada_jax.data.read.shards import open_sets, read_rows
from llada_jax.data.rows import HeldOut

WIDTHS = 4  # maximum number of different lengths of the arrays
# Attention kernels want arrays whose length is a multiple of this number of tokens. If the sequence length is a
# multiple of TILE, so are all lengths of arrays.
TILE = 128


def widths(sequence_length: int) -> list[int]:
    """Returns the lengths that arrays of rows may have, in ascending order; the last one is `sequence_length`."""
    unit = TILE if sequence_length % TILE == 0 else 1
    quarter = -(-sequence_length // (WIDTHS * unit)) * unit
    return sorted({min(k * quarter, sequence_length) for k in range(1, WIDTHS + 1)})


def width_of(length: int, sequence_length: int) -> int:
    """Returns the smallest of `widths` that a row of `length` tokens fits into."""
    return next(width for width in widths(sequence_length) if width >= length)


class ChatData(Data):
    """The training rows of sets of conversations: prompts with their answers."""

    def __init__(
        self,
        paths: Sequence[str],
        weights: Sequence[float] = (),
        *,
        seed: int,
        batch_size: int,
        sequence_length: int,
        vocab_size: int,
        copies: int = 1,
        cache: str = "",
    ):
        """Opens and checks the sets. `pipeline.TrainingData` explains the arguments and the errors."""
        sets = open_sets(paths, "train", sequence_length, vocab_size, chat=True, cache=cache)
        self._indices = [load_index(rows.path, rows.manifest, "train") for rows in sets]
        super().__init__(sets, [len(starts) - 1 for starts, _ in self._indices], weights, seed, batch_size, copies)
        self._T = sequence_length

    def epochs(self, rows: int) -> dict[str, tuple[int, float]]:
        """Returns how many conversations each set has and how often a run takes each one, by the path of the set.

        Args:
          rows: The number of rows of the run.
        """
        total = sum(self._proportions) * self._copies
        return {
            s.path: (size, rows * share / total / size)
            for s, size, share in zip(self._sets, self._sizes, self._proportions, strict=True)
        }

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the rows of one step; the arguments and the errors are those of `Data.batch`.

        Returns:
          A dict with three arrays. "tokens" is int32 [len(rows), W], where W is the smallest of `widths` that the
          longest row of the global batch fits into; after the end of its answer, a row is EOS. "length" is int32
          [len(rows)], the number of tokens of that longest row, which is the same for all rows. "prompt" is int32
          [len(rows)], the number of tokens of each row's prompt.
        """
        records = [self._record(self._sequence(step, row)) for row in range(self._batch_size)]
        longest = int(max(self._indices[which][1][index] for which, index in records))
        tokens_BT = np.full((len(rows), width_of(longest, self._T)), self.eos_id, np.int32)
        prompt = np.empty(len(rows), np.int32)
        places = [records[int(row)] for row in rows]
        pairs: list[Pair] = read_rows(self._sets, places)
        for k, ((which, index), pair) in enumerate(zip(places, pairs, strict=True)):
            if pair.length != self._indices[which][1][index]:
                raise UserError(
                    f"{self._sets[which].path}: row {index} is not as long as the index says: prepare the set again"
                )
            tokens_BT[k, : pair.length], prompt[k] = pair.tokens, pair.prompt
        return {"tokens": tokens_BT, "length": np.full(len(rows), longest, np.int32), "prompt": prompt}

    def _record(self, n: int) -> tuple[int, int]:
        """Returns the index of the set that sequence n of the run comes from, and of the record in that set."""
        which, conversation, epoch = self._place(n)
        starts, _ = self._indices[which]
        first, count = starts[conversation], starts[conversation + 1] - starts[conversation]
        if count == 1:
            return which, int(first)
        turn = digest(self._seed, f"turn {which}", conversation) + epoch
        return which, int(first) + turn % int(count)


def held_out_answers(
    paths: Sequence[str], rows: int, sequence_length: int, vocab_size: int, cache: str = ""
) -> HeldOut:
    """Returns the last answers of some held-out conversations, taken from the sets in turn; always the same ones.

    Unlike in training, the length of a row does not include the padding up to the longest row. The likelihood bound
    therefore counts the answers themselves, each with its one EOS.

    Args:
      paths: The folders of the sets.
      rows: The number of answers to return. The result has fewer if the sets hold out fewer conversations.
      sequence_length: T, which must be the sequence length of the sets.
      vocab_size: The vocabulary size of the model; every id must be below it.
      cache: The folder for the row indices of sets in buckets; "" means ~/.cache/llada_jax.

    Raises:
      UserError: If a set or a shard cannot be used, as for `ChatData`.
    """
    sets = open_sets(paths, "validation", sequence_length, vocab_size, chat=True, cache=cache)
    last = []
    for s in sets:
        starts, _ = load_index(s.path, s.manifest, "validation")
        # Files are often sorted, and then their first conversations are not typical. A hash picks a sample instead.
        last.append(sorted((starts[1:] - 1).tolist(), key=lambda row: digest(0, "held out", row)))
    pairs: list[Pair] = read_rows(sets, [(which, last[which][i]) for which, i in in_turn([*map(len, last)], rows)])
    width = width_of(max((pair.length for pair in pairs), default=1), sequence_length)
    tokens_NT = np.full((len(pairs), width), sets[0].manifest.eos_id, np.int32)
    for row_T, pair in zip(tokens_NT, pairs, strict=True):
        row_T[: pair.length] = pair.tokens
    length, prompt = (np.array([getattr(pair, name) for pair in pairs], np.int32) for name in ("length", "prompt"))
    return HeldOut(tokens_NT, length, prompt, np.array([pair.bytes for pair in pairs], np.int64))
