"""Rows of conversations: prompts with their answers, the records that hold them, and the index beside the shards.

A conversation with n answers gives n rows, one after the other: row k is the prompt of answer k, all turns before
it included, and that answer. A record is little-endian: uint32 tokens of the prompt, uint32 tokens of the answer,
uint32 bytes of text in the answer, then the ids of both in the dtype of the set.

The index of a split, a .npy file, has two uint32 columns: of each row the number of its conversation, ascending, and
its tokens. By it every host knows how long rows are that only others read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llada_jax.config import UserError
from llada_jax.data.conversations import answers
from llada_jax.data.manifest import Manifest, Shard, Split
from llada_jax.data.rows import ShardWriter, finished_file
from llada_jax.tokenizer import Tokenizer

HEADER = np.dtype("<u4")
RULES = ("drop", "cut")


class Pair(NamedTuple):
    """One record."""

    tokens: np.ndarray  # int32 [prompt + answer]
    prompt: int  # tokens of the prompt
    bytes: int  # of text in the answer

    @property
    def length(self) -> int:
        return len(self.tokens)


def encode_pair(pair: Pair, dtype: str) -> bytes:
    """The record of a pair."""
    header = np.array([pair.prompt, pair.length - pair.prompt, pair.bytes], HEADER)
    return header.tobytes() + pair.tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def decode_pair(record: bytes, dtype: str, sequence_length: int) -> Pair:
    """Reads a record; raises ValueError if it is no pair of at most `sequence_length` ids of `dtype`."""
    kind = np.dtype(dtype).newbyteorder("<")
    if len(record) < 3 * HEADER.itemsize:
        raise ValueError(f"a record of {len(record)} bytes is no prompt with its answer")
    prompt, answer, bytes_ = map(int, np.frombuffer(record, HEADER, 3))
    length = prompt + answer
    if not (prompt and answer and length <= sequence_length and len(record) == 12 + length * kind.itemsize):
        raise ValueError(f"a record of {len(record)} bytes is no prompt of {prompt} and answer of {answer} in {dtype}")
    return Pair(np.frombuffer(record, kind, length, offset=12).astype(np.int32), prompt, bytes_)


class Encoded(NamedTuple):
    """Conversations in tokens."""

    pairs: list[list[Pair]]  # of each conversation, in order
    dropped: int  # answers, see manifest.Chat
    cut: int
    empty: int


class ChatBatch(NamedTuple):
    """Conversations that are tokenised together."""

    messages: Sequence[Sequence[dict[str, Any]]]
    where: Sequence[str]  # file and line of each
    sequence_length: int
    too_long: str  # a name in RULES
    tag: Any = None

    def tokenize(self, tokenizer: Tokenizer, token_bytes: np.ndarray) -> Encoded:
        """The pairs of each conversation that fit, or are made to fit. UserError names file and line."""
        pairs, dropped, cut, empty = [], 0, 0, 0
        for messages, where in zip(self.messages, self.where, strict=True):
            pairs.append([])
            for i in answers(messages):
                if not messages[i]["content"].strip():
                    empty += 1
                    continue
                try:
                    found = fitted = _pair(tokenizer, token_bytes, messages[: i + 1])
                    if found.length > self.sequence_length:
                        fitted = self._fit(tokenizer, token_bytes, i, messages)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
                if fitted is None:
                    dropped += 1
                    continue
                cut += fitted is not found
                pairs[-1].append(fitted)
        return Encoded(pairs, dropped, cut, empty)

    def _fit(
        self, tokenizer: Tokenizer, token_bytes: np.ndarray, i: int, messages: Sequence[dict[str, Any]]
    ) -> Pair | None:
        """Without the oldest turns; if the last alone is too long, without the end of its answer; else None."""
        if self.too_long == "drop":
            return None
        turns = [k for k in range(i) if messages[k]["role"] == "user"]
        system = list(messages[: turns[0]]) if turns else []
        for turn in turns[1:]:
            pair = _pair(tokenizer, token_bytes, [*system, *messages[turn : i + 1]])
            if pair.length <= self.sequence_length:
                return pair
        last = messages[turns[-1] : i + 1] if turns else messages[: i + 1]
        pair = _pair(tokenizer, token_bytes, [*system, *last])
        if pair.prompt >= self.sequence_length:
            return None
        return _counted(pair.tokens[: self.sequence_length], pair.prompt, token_bytes)


def _pair(tokenizer: Tokenizer, token_bytes: np.ndarray, messages: Sequence[dict[str, Any]]) -> Pair:
    prompt, answer = tokenizer.encode_answer(messages)
    if answer[-1:] != [tokenizer.eos_id]:
        answer.append(tokenizer.eos_id)
    return _counted(np.array(prompt + answer, np.int32), len(prompt), token_bytes)


def _counted(tokens: np.ndarray, prompt: int, token_bytes: np.ndarray) -> Pair:
    return Pair(tokens, prompt, int(token_bytes[tokens[prompt:]].sum(dtype=np.int64)))


class PairWriter:
    """Writes the pairs of one split as shards and an index."""

    def __init__(self, directory: Path, name: str, dtype: str, shard_rows: int):
        """`shard_rows`: rows per shard, at most."""
        self._path = directory / f"{name}.index.npy"
        self._dtype = dtype
        self._writer = ShardWriter(directory, name, shard_rows)
        self._index: list[tuple[int, int]] = []
        self._bytes = self._conversations = 0

    def add(self, pairs: Sequence[Pair]) -> None:
        """Appends a conversation, nothing if no answer of it is left; raises OSError if it cannot be written."""
        for pair in pairs:
            self._writer.write(encode_pair(pair, self._dtype))
            self._index.append((self._conversations, pair.length))
            self._bytes += pair.bytes
        self._conversations += bool(pairs)

    def finish(self) -> tuple[Split, Shard]:
        """Closes the last shard and writes the index."""
        index_N2 = np.array(self._index, HEADER).reshape(-1, 2)
        with self._path.open("wb") as file:
            np.save(file, index_N2)
            file.flush()
        shards, tokens = self._writer.finish(), int(index_N2[:, 1].sum(dtype=np.int64))
        split = Split(self._writer.rows, tokens, self._bytes, self._conversations, shards)
        return split, finished_file(self._path, len(index_N2))


def load_index(path: str, manifest: Manifest, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The index of a split: the first row of each conversation and, at the end, the number of rows; tokens of each row.

    Both int64. UserError if it is missing or is not what the manifest says.
    """
    entry = manifest.index(split)
    file = epath.Path(path) / entry.name
    try:
        with file.open("rb") as opened:
            index_N2 = np.load(opened, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: copy the whole folder, or prepare the set again") from error
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{file} is damaged: copy it again, or prepare the set again") from error
    if index_N2.shape != (manifest.split(split).rows, 2) or file.stat().length != entry.size:
        raise UserError(f"{file} is not the index of this set: copy it again, or prepare the set again")
    conversation_N, length_N = index_N2.astype(np.int64).T
    starts = np.flatnonzero(np.diff(conversation_N, prepend=-1))
    if len(starts) != manifest.split(split).documents or (len(length_N) and length_N.max() > manifest.sequence_length):
        raise UserError(f"{file} is damaged: copy it again, or prepare the set again")
    return np.append(starts, len(length_N)), length_N
