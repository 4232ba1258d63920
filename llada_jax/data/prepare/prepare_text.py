"""Text -> ArrayRecord shards of token ids, packed to the sequence length, and a manifest.

Packing. The texts of a split follow one another in the order of the input; EOS ends each stretch of
text that was contiguous in its source: a document, or, where a long .txt file is cut into pieces
(see data/text.py) and some of them are held out, each run of neighbouring pieces in the same split.
This stream of tokens is cut into rows of `sequence_length` without regard to documents; only the last row
of a split is padded.

Held-out text. A document (or piece) belongs to validation by the hash of its text, see data/held_out.py: the same
text is always on the same side.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.manifest import SPLITS, TOKENIZER_FOLDER, Manifest, Source, tokenizer_fields
from llada_jax.data.prepare.held_out import HASH_RULE, held_out_below, text_hash
from llada_jax.data.prepare.output import (
    SHARD_BYTES,
    Progress,
    check_settings,
    cores,
    id_dtype,
    publish,
    temporary_folder,
    write_errors,
)
from llada_jax.data.prepare.pool import Batch, Pool
from llada_jax.data.prepare.text import Corpus, Piece
from llada_jax.data.rows import SplitWriter
from llada_jax.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_BATCH_CHARACTERS = 1 << 18  # of text that a worker tokenises at a time


def prepare(
    inputs: Sequence[str],
    output: str | os.PathLike,
    *,
    tokenizer: str | None = None,
    train_tokenizer: int | None = None,
    sequence_length: int = 4096,
    validation_fraction: float = 0.02,
    workers: int = 0,
    shard_rows: int = 0,
    text_key: str = "text",
    progress: bool = True,
) -> Manifest:
    """Prepares a set for training in the folder `output`, which appears only when it is complete.

    The content of the folder depends on the text, the names of the inputs and the settings, not on the number of
    workers.

    Args:
      inputs: files or globs (.txt, .jsonl, also .gz and .xz of them, .parquet), or "stdlib".
      output: a local folder that does not exist yet.
      tokenizer: a SentencePiece .model, a tokenizer.json, or a folder; it is copied into the set.
      train_tokenizer: or the size of a vocabulary to train on the text that is not held out.
      sequence_length: tokens per row.
      validation_fraction: of the documents, held out; 0 = none.
      workers: processes that tokenise; 0 = one per core.
      shard_rows: rows per shard at most; 0 = about 256 MiB of ids.
      text_key: the key of the text in .jsonl, its column in .parquet.
      progress: whether to report on stderr.

    Raises UserError for anything wrong with the input, the tokenizer, the settings or the output folder.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("give either tokenizer (a file or folder) or train_tokenizer (a vocabulary size)")
    target = check_settings(output, sequence_length, validation_fraction, workers, shard_rows)
    corpus = Corpus(inputs, text_key)
    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    below = held_out_below((piece.text for piece in corpus), validation_fraction, corpus.inputs)
    with write_errors(output), temporary_folder(target) as folder:
        if loaded is None:
            loaded = _train(corpus, below, train_tokenizer, folder / TOKENIZER_FOLDER, progress)
        else:
            loaded.save(folder / TOKENIZER_FOLDER)
        dtype = id_dtype(loaded)
        shard_rows = shard_rows or max(1, SHARD_BYTES // (8 + sequence_length * np.dtype(dtype).itemsize))
        writers = [SplitWriter(folder, name, sequence_length, dtype, loaded.eos_id, shard_rows) for name in SPLITS]
        sources = _write_rows(corpus, below, folder, writers, workers or cores(), progress)
        train, validation = (writer.finish() for writer in writers)
        if not train.rows:
            raise UserError("all of the text is held out for validation: give more text or a smaller fraction")
        manifest = Manifest(
            **tokenizer_fields(loaded),
            sequence_length=sequence_length,
            dtype=dtype,
            validation_fraction=validation_fraction,
            validation_hash=HASH_RULE,
            validation_below=below,
            train=train,
            validation=validation,
            sources=sources,
        )
        publish(folder, target, manifest)
    return manifest


def _train(corpus: Corpus, below: int, size: int, folder: Path, progress: bool) -> Tokenizer:
    if progress:
        print(f"training a tokenizer of {size} tokens", file=sys.stderr)
    return train_tokenizer((piece.text for piece in corpus if text_hash(piece.text) >= below), size, folder)


def _write_rows(
    corpus: Corpus, below: int, folder: Path, writers: Sequence[SplitWriter], workers: int, progress: bool
) -> tuple[Source, ...]:
    """Tokenises the corpus into the writers (train, validation); returns the counts per input."""
    totals = np.zeros((len(corpus.inputs), 3), np.int64)  # documents, tokens, bytes
    report = Progress(corpus.total_bytes, progress)
    with Pool(folder / TOKENIZER_FOLDER, workers) as pool, report:
        for batch, tokens in pool.map(_batches(corpus, below)):
            start = 0
            for (source, split, ends), length in zip(batch.tag[0], tokens.lengths, strict=True):
                part = slice(start, start + length)
                start += length
                writers[split].add(tokens.ids[part], tokens.bytes[part])
                if ends:
                    writers[split].end_document()
                totals[source] += int(ends), length + int(ends), int(tokens.bytes[part].sum(dtype=np.int64))
            report.update(batch.tag[1], len(tokens.ids))
    return tuple(Source(name, corpus.file_count(i), *map(int, totals[i])) for i, name in enumerate(corpus.inputs))


def _batches(corpus: Corpus, below: int) -> Iterator[Batch]:
    """Texts for the workers; the tag says (source, split, whether EOS follows) of each, and the place in the input."""
    texts: list[str] = []
    continues: list[bool] = []
    tags: list[tuple[int, int, bool]] = []
    characters = 0
    for piece, split, continued, ends in _stretches(corpus, below):
        texts.append(piece.text)
        continues.append(continued)
        tags.append((piece.source, split, ends))
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield Batch(texts, continues, (tags, corpus.position))
            texts, continues, tags, characters = [], [], [], 0
    if texts:
        yield Batch(texts, continues, (tags, corpus.position))


def _stretches(corpus: Corpus, below: int) -> Iterator[tuple[Piece, int, bool, bool]]:
    """Each piece, its split (0 train, 1 validation), whether it continues the piece before, whether EOS follows."""
    waiting: tuple[Piece, int, bool] | None = None
    for piece in corpus:
        split = int(text_hash(piece.text) < below)
        continued = False
        if waiting is not None:
            before, before_split, before_continued = waiting
            continued = not before.last and split == before_split
            yield before, before_split, before_continued, not continued
        waiting = piece, split, continued
    if waiting is not None:
        yield *waiting, True
