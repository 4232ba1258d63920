"""Text -> ArrayRecord shards of token ids, packed to the sequence length, and a manifest.

Packing. The texts of a split follow one another in the order of the input; EOS ends each stretch of
text that was contiguous in its source: a document, or, where a long .txt file is cut into pieces
(see data/text.py) and some of them are held out, each run of neighbouring pieces in the same split.
This stream of tokens is cut into rows of `sequence_length` without regard to documents; only the last row
of a split is padded.

Held-out text. A document (or piece) belongs to validation if the hash of its text is below a fraction of
the range of the hash, so the same text is always on the same side. If that holds for none, the one with
the smallest hash is held out.
"""

import errno
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.manifest import TOKENIZER_FOLDER, Manifest, Source, Split
from llada_jax.data.output import publish, refuse_existing, temporary_folder
from llada_jax.data.pool import Batch, Pool
from llada_jax.data.rows import SplitWriter
from llada_jax.data.text import Corpus, Piece
from llada_jax.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_HASH_BITS = 64
_HASH_RULE = "blake2b, 8 bytes, little-endian, of the text in UTF-8"
_BATCH_CHARACTERS = 1 << 18  # of text that a worker tokenises at a time
_SHARD_BYTES = 1 << 28  # of a shard before compression
_MAX_SEQUENCE_LENGTH = 1 << 20


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
    target = _check(output, tokenizer, train_tokenizer, sequence_length, validation_fraction, workers, shard_rows)
    corpus = Corpus(inputs, text_key)
    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    below = _held_out_below(corpus, validation_fraction)
    try:
        with temporary_folder(target) as folder:
            if loaded is None:
                loaded = _train(corpus, below, train_tokenizer, folder / TOKENIZER_FOLDER, progress)
            else:
                loaded.save(folder / TOKENIZER_FOLDER)
            dtype = "uint16" if loaded.vocab_size <= 1 << 16 else "uint32"
            shard_rows = shard_rows or max(1, _SHARD_BYTES // (8 + sequence_length * np.dtype(dtype).itemsize))
            writers = [
                SplitWriter(folder, name, sequence_length, dtype, loaded.eos_id, shard_rows)
                for name in ("train", "validation")
            ]
            sources = _write_rows(corpus, below, folder, writers, workers or _cores(), progress)
            train, validation = (writer.finish() for writer in writers)
            if not train.rows:
                raise UserError("all of the text is held out for validation: give more text or a smaller fraction")
            manifest = _manifest(loaded, sequence_length, dtype, validation_fraction, below, train, validation, sources)
            publish(folder, target, manifest)
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else " ".join(str(error).split())
        raise UserError(f"output {output} cannot be written: {reason}") from error
    return manifest


def _check(
    output: str | os.PathLike,
    tokenizer: str | None,
    train_size: int | None,
    sequence_length: int,
    fraction: float,
    workers: int,
    shard_rows: int,
) -> Path:
    """The output folder, once all settings are known to make sense."""
    if (tokenizer is None) == (train_size is None):
        raise UserError("give either tokenizer (a file or folder) or train_tokenizer (a vocabulary size)")
    if not 2 <= sequence_length <= _MAX_SEQUENCE_LENGTH:
        raise UserError(f"sequence_length={sequence_length}: from 2 to {_MAX_SEQUENCE_LENGTH} is possible")
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction={fraction}: from 0 to below 1 is possible")
    if workers < 0 or shard_rows < 0:
        raise UserError(f"workers={workers} and shard_rows={shard_rows} must not be negative")
    if not os.fspath(output):
        raise UserError("output: name the folder to write")
    if "://" in os.fspath(output):
        raise UserError(f"output {output}: prepare into a local folder, then copy it there")
    target = Path(os.path.abspath(output))
    refuse_existing(target)
    return target


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_HASH_BITS // 8).digest(), "little")


def _held_out_below(corpus: Corpus, fraction: float) -> int:
    """The bound below which a text's hash holds it out. Reads only until the first such text, if there is one."""
    below = int(fraction * 2**_HASH_BITS)
    smallest = largest = None
    for piece in corpus:
        key = _hash(piece.text)
        if not below or key < below:
            return below
        smallest = key if smallest is None else min(key, smallest)
        largest = key if largest is None else max(key, largest)
    if smallest is None:
        raise UserError(f"there is no text in the input: {', '.join(corpus.inputs)}")
    if smallest == largest:
        raise UserError(
            f"validation_fraction={fraction} needs at least two documents and the input is one: "
            "give more, or validation_fraction=0"
        )
    return smallest + 1


def _train(corpus: Corpus, below: int, size: int, folder: Path, progress: bool) -> Tokenizer:
    if progress:
        print(f"training a tokenizer of {size} tokens", file=sys.stderr)
    return train_tokenizer((piece.text for piece in corpus if _hash(piece.text) >= below), size, folder)


def _write_rows(
    corpus: Corpus, below: int, folder: Path, writers: Sequence[SplitWriter], workers: int, progress: bool
) -> tuple[Source, ...]:
    """Tokenises the corpus into the writers (train, validation); returns the counts per input."""
    totals = np.zeros((len(corpus.inputs), 3), np.int64)  # documents, tokens, bytes
    report = _Progress(corpus.total_bytes, progress)
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
        split = int(_hash(piece.text) < below)
        continued = False
        if waiting is not None:
            before, before_split, before_continued = waiting
            continued = not before.last and split == before_split
            yield before, before_split, before_continued, not continued
        waiting = piece, split, continued
    if waiting is not None:
        yield *waiting, True


def _manifest(
    tokenizer: Tokenizer,
    sequence_length: int,
    dtype: str,
    fraction: float,
    below: int,
    train: Split,
    validation: Split,
    sources: tuple[Source, ...],
) -> Manifest:
    return Manifest(
        tokenizer_kind=tokenizer.kind,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_size=tokenizer.size,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        mask_id=tokenizer.mask_id,
        start_header_id=tokenizer.start_header_id,
        end_header_id=tokenizer.end_header_id,
        eot_id=tokenizer.eot_id,
        sequence_length=sequence_length,
        dtype=dtype,
        validation_fraction=fraction,
        validation_hash=_HASH_RULE,
        validation_below=below,
        train=train,
        validation=validation,
        sources=sources,
    )


class _Progress:
    """A bar on a terminal, elsewhere a line every half minute, both on stderr."""

    def __init__(self, total: int, enabled: bool):
        self._total = total
        self._tokens = 0
        self._start = self._last = time.monotonic()
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = None
        if enabled and not self._lines:
            import tqdm

            self._bar = tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="preparing", file=sys.stderr)

    def update(self, position: int, tokens: int) -> None:
        self._tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(position - self._bar.n)
            self._bar.set_postfix_str(f"{self._tokens / max(now - self._start, 1e-9):,.0f} tokens/s", refresh=False)
        elif self._lines and now - self._last > 30:
            self._last = now
            done = 100 * position // max(self._total, 1)
            print(f"preparing: {done} % of the input, {self._tokens:,} tokens", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
