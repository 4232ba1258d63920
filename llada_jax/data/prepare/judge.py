"""Runs the filters of a preparation over the whole input, before it is tokenised.

One pass over the input judges every document in worker processes; what is kept in memory of each document is a byte,
and 16 bytes more for exact duplicates, or 128 for near ones (duplicates are found by sorting these, which takes about
as much again). The passes that follow then leave out what was judged so. The result depends on the texts and their
order only, not on the number of workers.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.manifest import Filtered, FilteredSource
from llada_jax.data.prepare.duplicates import EXACT_KEYS, repeated
from llada_jax.data.prepare.filters import EXACT, NEAR, REASONS, Filters, code_of
from llada_jax.data.prepare.left_out import printable
from llada_jax.data.prepare.output import Progress
from llada_jax.data.prepare.pool import Pool
from llada_jax.data.prepare.text import Corpus, Piece

_BATCH_CHARACTERS = 1 << 18
EXAMPLES = 3  # number of documents that are shown for each reason
_EXAMPLE_CHARACTERS = 100


class Judged(NamedTuple):
    """What the filters say of several documents, in order."""

    reasons: np.ndarray  # uint8 [N], index in REASONS
    keys: np.ndarray  # uint64 [N, filters.keys]; zeros where there is a reason
    lines: np.ndarray  # int64 [N], lines that were removed from documents that stay


class JudgedBatch(NamedTuple):
    """Texts that are judged together; `pool.Work`."""

    texts: Sequence[str]
    filters: Filters
    tag: Any = None

    def tokenize(self, _tokenizer: None, _token_bytes: None) -> Judged:
        """Returns what the filters say of each text."""
        result = Judged(
            np.zeros(len(self.texts), np.uint8),
            np.zeros((len(self.texts), self.filters.keys), np.uint64),
            np.zeros(len(self.texts), np.int64),
        )
        for i, text in enumerate(self.texts):
            result.reasons[i], edited, result.lines[i] = self.filters.judge(text)
            if not result.reasons[i]:
                result.keys[i] = self.filters.duplicate_keys(edited)
        return result


class Verdicts:
    """What is left out of an input, as the function `Corpus.filter`.

    Attributes:
      reasons: uint8 [items + 1], the index in REASONS of each item, by `Piece.item`.
      sources: What was left out of each input.
    """

    def __init__(self, filters: Filters, reasons: np.ndarray, sources: Sequence[FilteredSource]):
        self._filters = filters
        self.reasons, self.sources = reasons, tuple(sources)
        self._examples: dict[str, dict[int, str]] = {}

    def __call__(self, piece: Piece) -> Piece:
        """Returns the piece as it is prepared: marked as removed, or with the lines that C4's rules leave."""
        if reason := REASONS[self.reasons[piece.item]]:
            found = self._examples.setdefault(reason, {})
            if len(found) < EXAMPLES and not piece.blank:  # every pass finds the same first ones
                found[piece.item] = printable(f"{piece.where}: {piece.text[:_EXAMPLE_CHARACTERS].strip()}")
            return piece._replace(removed=True)
        text = piece.text if piece.blank else self._filters.edit(piece.text)
        # The last line of a piece that the text goes on after keeps its end.
        return piece._replace(text=text if piece.last or text is piece.text else f"{text}\n")

    @property
    def examples(self) -> dict[str, tuple[str, ...]]:
        """The first documents of each reason that the passes so far have met."""
        return {reason: tuple(found.values()) for reason, found in sorted(self._examples.items())}

    def described(self) -> Filtered:
        """Returns what the manifest says, once the whole input was read."""
        return self._filters.described(self.sources, self.examples)


def check_some_left(sources: Sequence[FilteredSource]) -> None:
    """Raises UserError if the filters leave out everything."""
    total = sum(source.documents for source in sources)
    removed = sum((Counter(source.removed) for source in sources), Counter())
    if total and removed.total() == total:
        reason, count = removed.most_common(1)[0]
        raise UserError(f"the filters leave out all {total:,} documents; most often ({count:,}): {reason}")


class Places(NamedTuple):
    """Where the judged documents are."""

    items: np.ndarray  # int64 [N], `Piece.item`
    sources: np.ndarray  # int64 [N], index into the inputs
    blanks: np.ndarray  # int64 [blank pieces, 2], item of a blank piece, and of the piece before it


def judge(corpus: Corpus, filters: Filters, workers: int, progress: bool) -> Verdicts:
    """Judges all documents of a corpus.

    Args:
      corpus: The input. It is read once.
      filters: The filters.
      workers: The number of processes.
      progress: Whether to report the progress on stderr.

    Raises:
      UserError: If the input cannot be read, or if a document is bad and bad documents are not left out.
    """
    judged, places = judge_documents(corpus, filters, workers, progress)
    reasons = with_duplicates(judged, filters)
    sources = counted(corpus, reasons, judged.lines, places)
    return Verdicts(filters, by_item(reasons, places, corpus.items), sources)


def judge_documents(corpus: Corpus, filters: Filters, workers: int, progress: bool) -> tuple[Judged, Places]:
    """Judges each document of a corpus on its own, without regard to duplicates."""
    parts: list[Judged] = []
    items: list[tuple[int, int]] = []
    blanks: list[tuple[int, int]] = []
    with Pool(None, workers) as pool, Progress(corpus.total_bytes, progress, "filtering") as report:
        for batch, judged in pool.map(_batches(corpus, filters, blanks)):
            parts.append(judged)
            items += batch.tag[0]
            report.update(batch.tag[1], 0)
    empty = Judged(np.zeros(0, np.uint8), np.zeros((0, filters.keys), np.uint64), np.zeros(0, np.int64))
    where = np.array(items, np.int64).reshape(-1, 2)
    places = Places(where[:, 0], where[:, 1], np.array(blanks, np.int64).reshape(-1, 2))
    return Judged(*map(np.concatenate, zip(*(parts or [empty]), strict=True))), places


def with_duplicates(judged: Judged, filters: Filters) -> np.ndarray:
    """Returns the reasons, uint8 [N], of documents which were judged on their own, now with duplicates among them."""
    reasons = judged.reasons.copy()
    stay = np.flatnonzero(reasons == 0)
    keys = judged.keys[stay]
    # The keys of near duplicates first, so that "exact duplicate" is the reason of what is both.
    for column in range(EXACT_KEYS, filters.keys):
        reasons[stay[repeated(keys[:, column])]] = code_of(NEAR)
    if filters.keys:
        reasons[stay[repeated(keys[:, :EXACT_KEYS])]] = code_of(EXACT)
    return reasons


def by_item(reasons: np.ndarray, places: Places, items: int) -> np.ndarray:
    """Returns the reasons by item, uint8 [items + 1]. A blank piece has that of the piece before it."""
    result = np.zeros(items + 1, np.uint8)
    result[places.items] = reasons
    for item, before in places.blanks:
        result[item] = result[before]
    return result


def counted(corpus: Corpus, reasons: np.ndarray, lines: np.ndarray, places: Places) -> list[FilteredSource]:
    """Returns what was left out of each input of a corpus."""
    result = []
    for source, name in enumerate(corpus.inputs):
        chosen = places.sources == source
        codes = np.bincount(reasons[chosen], minlength=len(REASONS))
        removed = {reason: int(count) for reason, count in zip(REASONS, codes, strict=True) if reason and count}
        stay = chosen & (reasons == 0)
        result.append(FilteredSource(name, int(chosen.sum()), removed, int(lines[stay].sum())))
    return result


def _batches(corpus: Corpus, filters: Filters, blanks: list[tuple[int, int]]) -> Iterator[JudgedBatch]:
    """Yields the texts of a corpus in batches with the tag ((item, source) of each, bytes read); notes blank pieces."""
    texts: list[str] = []
    places: list[tuple[int, int]] = []
    characters = before = 0
    for piece in corpus:
        if piece.blank:
            blanks.append((piece.item, before))
        else:
            texts.append(piece.text)
            places.append((piece.item, piece.source))
            characters += len(piece.text)
        before = piece.item
        if characters >= _BATCH_CHARACTERS:
            yield JudgedBatch(texts, filters, (places, corpus.position))
            texts, places, characters = [], [], 0
    if texts:
        yield JudgedBatch(texts, filters, (places, corpus.position))
