"""Trains a SentencePiece model of the usual kind, which puts a space in front of every text."""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece


def train_prefixing(lines: Iterable[str], path: Path, **options) -> Path:
    """Trains a model of 400 tokens on some lines of text, writes it to `path`, and returns the path."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path
