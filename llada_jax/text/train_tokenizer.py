"""Trains a tokenizer on text (SentencePiece, byte-pair encoding with byte fallback)."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator

from llada_jax.config import UserError
from llada_jax.text.backends import ROLES, SentencePiece
from llada_jax.text.tokenizer import Tokenizer

SAMPLE_BYTES = 32 << 20  # a new tokenizer is trained on at most this many bytes of text
_LEAST_PIECES = 3 + 256  # the unknown token, BOS and EOS, and one piece for every byte


def train_tokenizer(documents: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> Tokenizer:
    """Trains a SentencePiece BPE tokenizer with byte fallback and writes it into `directory`.

    Decoding the ids of any valid Unicode text gives exactly that text. The same documents give the same tokenizer.
    The tokenizer is trained on at most 32 MiB of the text (pieces chosen from all documents by their hash), so the
    memory needed does not grow with the text.

    Args:
      documents: The texts. They are read once.
      vocab_size: The `size` of the resulting tokenizer, including its control tokens.
      directory: The folder to write to, created if needed. `load_tokenizer` reads it.

    Raises:
      UserError: If `vocab_size` is too small or too large for the text, or if there is no text.
    """
    import sentencepiece

    appended = len(ROLES) - 2  # SentencePiece itself has BOS and EOS
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_sentences(documents),
            model_writer=model,
            model_type="bpe",
            # _LEAST_PIECES is always too small, but with even fewer SentencePiece does not say how many it needs.
            vocab_size=max(vocab_size - appended, _LEAST_PIECES),
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation is one token
            max_sentence_length=1 << 20,
            bos_piece=ROLES["bos"][0],
            eos_piece=ROLES["eos"][0],
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(_training_error(str(error), vocab_size, appended)) from error
    tokenizer = Tokenizer(SentencePiece({"tokenizer.model": model.getvalue()}))
    tokenizer.save(directory)
    return tokenizer


def _training_error(message: str, vocab_size: int, appended: int) -> str:
    too_large = re.search(r"too high.*<= (\d+)", message)
    too_small = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if too_large:
        most = int(too_large[1]) + appended
        return f"train_tokenizer={vocab_size} is too large for this text: {most} is the largest size, or give more text"
    if too_small:
        return (
            f"train_tokenizer={vocab_size} is too small for this text: {int(too_small[1]) + appended} is the smallest "
            "size"
        )
    if "sentences_.empty()" in message:
        return "train_tokenizer: the input contains no text to train a tokenizer on"
    return f"train_tokenizer={vocab_size}: {' '.join(message.split())}"


def _training_sentences(documents: Iterable[str]) -> Iterator[str]:
    # SentencePiece would skip a sentence with one of these characters. The tokenizer encodes them as bytes instead.
    for text in _sample(documents):
        yield from filter(None, re.split("[\0\t\u2581\u2585]", text))


def _sample(documents: Iterable[str]) -> list[str]:
    """Returns the pieces of up to 4,096 characters with a hash below a bound, halved until they fit SAMPLE_BYTES."""
    bound, total = 1 << 64, 0
    kept: list[tuple[int, str]] = []
    for document in documents:
        for start in range(0, len(document), 4096):
            text = document[start : start + 4096]
            content = text.encode()
            key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            if key >= bound:
                continue
            kept.append((key, text))
            total += len(content)
            while total > SAMPLE_BYTES:
                bound //= 2
                kept = [(k, t) for k, t in kept if k < bound]
                total = sum(len(t.encode()) for _, t in kept)
    return [text for _, text in kept]
