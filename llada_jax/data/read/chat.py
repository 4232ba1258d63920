"""Prepared conversations -> batches for instruction tuning (Section 2.3 and Appendix B of arXiv 2502.09992).

As in pipeline.py a row is a pure function of (seed, step, row). An epoch takes every conversation once; of one with
several answers it takes one, another in each epoch until all had their turn. Answers are padded with EOS, which is
part of the loss, up to the longest row of the global batch. From there to the next of at most four lengths of the
arrays (few programs are compiled) a row is padding that is neither attended to nor counted.
"""

from collections.abc import Sequence

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.pairs import Pair, load_index
from llada_jax.data.read.pipeline import Data, digest, in_turn, open_sets
from llada_jax.data.rows import HeldOut

WIDTHS = 4  # lengths of the arrays, at most
TILE = 128  # tokens: attention kernels want a multiple, where the sequence length is one


def widths(sequence_length: int) -> list[int]:
    """The lengths that arrays of rows may have, ascending, the last is `sequence_length`."""
    unit = TILE if sequence_length % TILE == 0 else 1
    quarter = -(-sequence_length // (WIDTHS * unit)) * unit
    return sorted({min(k * quarter, sequence_length) for k in range(1, WIDTHS + 1)})


def width_of(length: int, sequence_length: int) -> int:
    """The least of `widths` that a row of `length` tokens fits into."""
    return next(width for width in widths(sequence_length) if width >= length)


class ChatData(Data):
    """Answers with their prompts."""

    def __init__(
        self,
        paths: Sequence[str],
        weights: Sequence[float] = (),
        *,
        seed: int,
        batch_size: int,
        sequence_length: int,
        vocab_size: int,
    ):
        """Opens and checks everything. Arguments and errors are those of `pipeline.TrainingData`."""
        sets = open_sets(paths, "train", sequence_length, vocab_size, chat=True)
        self._indices = [load_index(rows.path, rows.manifest, "train") for rows in sets]
        super().__init__(sets, [len(starts) - 1 for starts, _ in self._indices], weights, seed, batch_size)
        self._T = sequence_length

    def epochs(self, rows: int) -> dict[str, tuple[int, float]]:
        """Path of each set -> its conversations, and how often a run of `rows` rows takes each of them."""
        total = sum(self._proportions)
        return {
            s.path: (size, rows * share / total / size)
            for s, size, share in zip(self._sets, self._sizes, self._proportions, strict=True)
        }

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """As `Data.batch`.

        Returns:
          "tokens": int32 [len(rows), W], W the least of `widths` that the longest row of the global batch fits into;
          "length": int32 [len(rows)], the tokens of that longest row, the same for all rows: beyond the end of its
          answer a row is EOS; "prompt": int32 [len(rows)], tokens of the prompt.
        """
        first = int(step) * self._batch_size
        records = [self._record(first + row) for row in range(self._batch_size)]
        longest = int(max(self._indices[which][1][index] for which, index in records))
        tokens_BT = np.full((len(rows), width_of(longest, self._T)), self.eos_id, np.int32)
        prompt = np.empty(len(rows), np.int32)
        for k, row in enumerate(rows):
            which, index = records[int(row)]
            pair: Pair = self._sets[which][index]
            if pair.length != self._indices[which][1][index]:
                raise UserError(
                    f"{self._sets[which].path}: row {index} is not as long as its index says: prepare it again"
                )
            tokens_BT[k, : pair.length], prompt[k] = pair.tokens, pair.prompt
        return {"tokens": tokens_BT, "length": np.full(len(rows), longest, np.int32), "prompt": prompt}

    def _record(self, n: int) -> tuple[int, int]:
        """Of row n of the run: which set, and which of its records."""
        which, conversation, epoch = self._place(n)
        starts, _ = self._indices[which]
        first, count = starts[conversation], starts[conversation + 1] - starts[conversation]
        if count == 1:
            return which, int(first)
        turn = digest(self._seed, f"turn {which}", conversation) + epoch
        return which, int(first) + turn % int(count)


def held_out_answers(paths: Sequence[str], rows: int, sequence_length: int, vocab_size: int) -> HeldOut:
    """The last answers of some held-out conversations, drawn from the sets in turn: always the same ones.

    Without padding up to the longest: the bound is that of the answers, each with its one EOS. There are fewer than
    `rows` if the sets hold out less. Raises UserError as `ChatData` does.
    """
    sets = open_sets(paths, "validation", sequence_length, vocab_size, chat=True)
    last = []
    for s in sets:
        starts, _ = load_index(s.path, s.manifest, "validation")
        # Files are often sorted: the first conversations are no sample of all.
        last.append(sorted((starts[1:] - 1).tolist(), key=lambda row: digest(0, "held out", row)))
    pairs: list[Pair] = [sets[which][last[which][i]] for which, i in in_turn([*map(len, last)], rows)]
    width = width_of(max((pair.length for pair in pairs), default=1), sequence_length)
    tokens_NT = np.full((len(pairs), width), sets[0].manifest.eos_id, np.int32)
    for row_T, pair in zip(tokens_NT, pairs, strict=True):
        row_T[: pair.length] = pair.tokens
    length, prompt = (np.array([getattr(pair, name) for pair in pairs], np.int32) for name in ("length", "prompt"))
    return HeldOut(tokens_NT, length, prompt, np.array([pair.bytes for pair in pairs], np.int64))
