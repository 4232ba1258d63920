"""Prepares text: writes ArrayRecord shards of token ids, packed to the sequence length, and a manifest.

Packing. The texts of a split follow one another in the order of the input. EOS ends each stretch of text that was
contiguous in its source. Such a stretch is usually a document. A long .txt file, however, is cut into pieces (see
data/prepare/text.py); if some of its pieces are held out, or refused by the tokenizer, each run of neighbouring pieces
in the same split is a stretch. The resulting stream of tokens is cut into rows of `sequence_length` tokens without
regard to documents. Only the last row of a split is padded.

Held-out text. The hash of a document (or piece) decides whether it belongs to validation (see
data/prepare/held_out.py), so the same text is always in the same split.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llada_jax.cli.outputs import temporary_folder, write_errors
from llada_jax.config import UserError
from llada_jax.data.manifest import SPLITS, TOKENIZER_FOLDER, Manifest, Source, Split, tokenizer_fields
from llada_jax.data.prepare.filters import Filters
from llada_jax.data.prepare.held_out import HASH_RULE, held_out_below, text_hash
from llada_jax.data.prepare.judge import Verdicts, check_some_left, judge
from llada_jax.data.prepare.left_out import BadItem
from llada_jax.data.prepare.output import (
    SHARD_BYTES,
    Progress,
    check_settings,
    cores,
    id_dtype,
    publish,
)
from llada_jax.data.prepare.pool import Batch, Pool
from llada_jax.data.prepare.text import Corpus, Piece
from llada_jax.data.rows import SplitWriter
from llada_jax.text.agreement import notes_of
from llada_jax.text.tokenizer import Tokenizer, load_tokenizer
from llada_jax.text.train_tokenizer import train_tokenizer

_BATCH_CHARACTERS = 1 << 18  # number of characters that a worker tokenises at a time


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How text is prepared, whether by `prepare` or on a fleet (`fleet.prepare_on_fleet`)."""

    sequence_length: int = 4096  # tokens per row
    validation_fraction: float = 0.02  # share of the documents that is held out; 0 = none
    # Processes that tokenise; 0 = one per core. On a fleet, only for the direct runner. The set does not depend on it.
    workers: int = 0
    shard_rows: int = 0  # the most rows per shard; 0 = as many as fit into about 256 MiB of ids
    # The key of the text in a .jsonl file, and the name of its column in a .parquet file. "a.b" stands for b in a.
    text_key: str = "text"
    # What is done with a bad document: "stop" raises UserError, "skip" leaves it out and counts it in the manifest. See
    # data/prepare/left_out.py.
    on_error: str = "stop"
    # Which documents are left out on purpose, and counted in the manifest. The input is read once more for them. See
    # data/prepare/filters.py.
    filters: Filters = Filters()  # none
    progress: bool = True  # whether to report the progress on stderr

    def rows(self, dtype: str) -> int:
        """Returns the most rows that a shard of ids of this dtype has."""
        size = 8 + self.sequence_length * np.dtype(dtype).itemsize
        return self.shard_rows or max(1, SHARD_BYTES // size)


class TokenWriter(Protocol):
    """Takes the token stream of one split, as `rows.SplitWriter` does."""

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Appends tokens, each with the number of bytes of text that it stands for."""

    def end_document(self) -> None:
        """Appends EOS and counts a document."""


def prepare(
    inputs: Sequence[str],
    output: str | os.PathLike,
    *,
    tokenizer: str | None = None,
    train_tokenizer: int | None = None,
    **settings: Any,
) -> Manifest:
    """Prepares a set for training in the folder `output`, which appears only when it is complete.

    The content of the folder depends on the text, the names of the inputs and the settings. It does not depend on the
    number of workers.

    Args:
      inputs: Files or globs (.txt and .jsonl, both also compressed as .gz or .xz, and .parquet), or "stdlib" for the
        source files of Python's standard library.
      output: A local folder that does not exist yet or is empty.
      tokenizer: A SentencePiece .model, a tokenizer.json, or a folder with either. It is copied into the set. None
        means that a tokenizer is trained.
      train_tokenizer: The vocabulary size of a tokenizer that is trained on the text that is not held out. Exactly one
        of `tokenizer` and `train_tokenizer` must be given.
      **settings: Fields of `TextSettings`.

    Returns:
      The manifest of the set.

    Raises:
      UserError: If anything is wrong with the input, the tokenizer, the settings or the output folder, or if more than
        a tenth of the documents are bad although `on_error` is "skip".
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("give either tokenizer (a file or folder) or train_tokenizer (a vocabulary size)")
    given = TextSettings(**settings)
    target = check_settings(output, given.sequence_length, given.validation_fraction, given.workers, given.shard_rows)
    corpus = Corpus(inputs, given.text_key, given.on_error)
    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    workers = given.workers or cores()
    verdicts = judge(corpus, given.filters.checked(), workers, given.progress) if given.filters.active else None
    below = held_out_bound(corpus, verdicts, given.validation_fraction)
    for line in notes_of(loaded, tokenizer) if given.progress else ():
        print(line, file=sys.stderr)
    with write_errors(output), temporary_folder(target) as folder:
        if loaded is None:
            loaded = _train(corpus, below, train_tokenizer, folder / TOKENIZER_FOLDER, given.progress)
        else:
            loaded.save(folder / TOKENIZER_FOLDER)
        dtype = id_dtype(loaded)
        layout = (given.sequence_length, dtype, loaded.eos_id, given.rows(dtype))
        writers = [SplitWriter(folder, name, *layout) for name in SPLITS]
        with Pool(folder / TOKENIZER_FOLDER, workers) as pool:
            sources = write_tokens(corpus, below, pool, writers, given.progress)
        left_out = corpus.faults.checked(corpus.good, "documents")
        train, validation = (writer.finish() for writer in writers)
        manifest = text_manifest(
            loaded,
            sequence_length=given.sequence_length,
            validation_fraction=given.validation_fraction,
            validation_below=below,
            train=train,
            validation=validation,
            sources=sources,
            left_out=left_out,
            filtered=verdicts and verdicts.described(),
        )
        publish(folder, target, manifest)
    return manifest


def text_manifest(tokenizer: Tokenizer, *, train: Split, **fields: Any) -> Manifest:
    """Returns the manifest of a set of packed text.

    Args:
      tokenizer: The tokenizer of the set.
      train: The rows to train on.
      **fields: The other fields of the manifest that neither the tokenizer nor the kind of the set decides.

    Raises:
      UserError: If there are no rows to train on.
    """
    if not train.rows:
        raise UserError("all of the text is held out for validation: give more text or a smaller validation_fraction")
    return Manifest(
        **tokenizer_fields(tokenizer), dtype=id_dtype(tokenizer), validation_hash=HASH_RULE, train=train, **fields
    )


def held_out_bound(corpus: Corpus, verdicts: Verdicts | None, fraction: float) -> int:
    """Returns the bound of the hashes of held-out text, see held_out.py; from now on the corpus is filtered.

    Args:
      corpus: The input.
      verdicts: What the filters leave out, or None without filters.
      fraction: The share of the documents that is held out.

    Raises:
      UserError: If no text is left, or not enough to hold out some of it.
    """
    if verdicts is not None:
        corpus.filter = verdicts
        check_some_left(verdicts.sources)
    return held_out_below(_texts(corpus), fraction, corpus.inputs)


def _texts(corpus: Corpus) -> Iterator[str]:
    """Yields the pieces that say something, and then checks that not too many documents are bad."""
    yield from (piece.text for piece in corpus if not piece.blank and not piece.removed)
    corpus.faults.checked(corpus.good, "documents")


def _train(corpus: Corpus, below: int, size: int, folder: Path, progress: bool) -> Tokenizer:
    if progress:
        print(f"training a tokenizer of {size} tokens", file=sys.stderr)
    kept = (piece.text for piece in corpus if not piece.blank and not piece.removed)
    texts = (text for text in kept if text_hash(text) >= below)
    return train_tokenizer(texts, size, folder)


def write_tokens(
    corpus: Corpus, below: int, pool: Pool, writers: Sequence[TokenWriter], progress: bool
) -> tuple[Source, ...]:
    """Tokenises the corpus, adds the tokens to the writers (train, validation), and returns the counts per input."""
    totals = np.zeros((len(corpus.inputs), 3), np.int64)  # documents, tokens, bytes
    report = Progress(corpus.total_bytes, progress)
    stretch = 0  # bytes of the current stretch of text
    with report:
        for batch, tokens in pool.map(_batches(corpus, below)):
            start = 0
            for i, ((piece, split, ends), length) in enumerate(zip(batch.tag[0], tokens.lengths, strict=True)):
                if refused := i in tokens.refused:
                    error = BadItem(f"{piece.where}: {tokens.refused[i]}", "refused by the tokenizer")
                    corpus.faults.add(error, piece.item)
                # Only a piece of a long file is left out, not the file, so its other pieces count as good ones.
                corpus.good += int(not refused) - int(piece.last)
                part = slice(start, start + length)
                start += length
                # A blank piece stays with the text before it. If that was left out, so is the blank piece.
                size = int(tokens.bytes[part].sum(dtype=np.int64)) if stretch or not piece.blank else 0
                if size:  # a tokenizer may turn a text into nothing, which is no document
                    writers[split].add(tokens.ids[part], tokens.bytes[part])
                stretch += size
                ends = (ends or refused) and stretch > 0
                if ends:
                    writers[split].end_document()
                    stretch = 0
                totals[piece.source] += int(ends), (length if size else 0) + int(ends), size
            report.update(batch.tag[1], len(tokens.ids))
    return tuple(Source(name, corpus.file_count(i), *map(int, totals[i])) for i, name in enumerate(corpus.inputs))


def _batches(corpus: Corpus, below: int) -> Iterator[Batch]:
    """Yields batches of texts for the workers.

    The tag of a batch has two parts: a list of (piece, split, whether EOS follows) for each text, and the number of
    bytes of the input that are read so far.
    """
    texts: list[str] = []
    continues: list[bool] = []
    tags: list[tuple[Piece, int, bool]] = []
    characters = 0
    for piece, split, continued, ends in _stretches(corpus, below):
        texts.append(piece.text)
        continues.append(continued)
        tags.append((piece, split, ends))
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield Batch(texts, continues, (tags, corpus.position))
            texts, continues, tags, characters = [], [], [], 0
    if texts:
        yield Batch(texts, continues, (tags, corpus.position))


def _stretches(corpus: Corpus, below: int) -> Iterator[tuple[Piece, int, bool, bool]]:
    """Yields (piece, split, whether it continues the piece before it, whether EOS follows); split 1 is validation.

    A blank piece is in the split of the piece before it, so that no stretch is blank.
    """
    waiting: tuple[Piece, int, bool] | None = None
    for piece in corpus:
        if piece.removed:  # what was left out ends a stretch
            if waiting is not None:
                yield *waiting, True
            waiting = None
            continue
        split = waiting[1] if piece.blank and waiting else int(text_hash(piece.text) < below)
        continued = False
        if waiting is not None:
            before, before_split, before_continued = waiting
            continued = not before.last and split == before_split
            yield before, before_split, before_continued, not continued
        waiting = piece, split, continued
    if waiting is not None:
        yield *waiting, True
