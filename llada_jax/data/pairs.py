"""Rows of conversations: prompts with their answers, the records that hold them, and the index beside the shards.

A conversation with n answers gives n rows, one after the other: row k is the prompt of answer k, all turns before
it included, and that answer. A record is little-endian: uint32 tokens of the prompt, uint32 tokens of the answer,
uint32 bytes of text in the answer, then the ids of both in the dtype of the set.

The index of a split, a .npy file, has two uint32 columns: of each row the number of its conversation, ascending, and
its tokens. By it every host knows how long rows are that only others read.
"""

import array
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llada_jax.config import UserError
from llada_jax.data.manifest import Manifest, Shard, Split
from llada_jax.data.prepare.conversations import answers
from llada_jax.data.rows import ShardWriter, finished_file
from llada_jax.text.tokenizer import Tokenizer

HEADER = np.dtype("<u4")
HEADER_BYTES = 3 * HEADER.itemsize
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
    if len(record) < HEADER_BYTES:
        raise ValueError(f"a record of {len(record)} bytes is no prompt with its answer")
    prompt, answer, bytes_ = map(int, np.frombuffer(record, HEADER, 3))
    length = prompt + answer
    if not (prompt and answer and length <= sequence_length and len(record) == HEADER_BYTES + length * kind.itemsize):
        raise ValueError(f"a record of {len(record)} bytes is no prompt of {prompt} and answer of {answer} in {dtype}")
    return Pair(np.frombuffer(record, kind, length, offset=HEADER_BYTES).astype(np.int32), prompt, bytes_)


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
            turns = [k for k, message in enumerate(messages) if message["role"] == "user"]
            first = 0  # of the turns: the oldest that is kept. What is too old for one answer is so for all later ones.
            for i in answers(messages):
                if not (messages[i]["content"].strip() and any(m["content"].strip() for m in messages[:i])):
                    empty += 1
                    continue
                try:
                    pair, whole, first = self._fit(tokenizer, token_bytes, messages[: i + 1], turns, first)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
                if pair is None:
                    dropped += 1
                    continue
                cut += not whole
                pairs[-1].append(pair)
        return Encoded(pairs, dropped, cut, empty)

    def _fit(
        self,
        tokenizer: Tokenizer,
        token_bytes: np.ndarray,
        messages: Sequence[dict[str, Any]],
        turns: Sequence[int],
        first: int,
    ) -> tuple[Pair | None, bool, int]:
        """The pair for the last message, None if it is dropped; whether all of it is there; the oldest turn kept."""
        last = max(sum(turn < len(messages) - 1 for turn in turns) - 1, 0)
        while True:
            kept = [*messages[: turns[0]], *messages[turns[first] :]] if first else messages
            pair = _pair(tokenizer, token_bytes, kept)
            if pair.length <= self.sequence_length:
                return pair, not first, first
            if self.too_long == "drop":
                return None, False, first
            if first == last:
                break
            first += 1
        if pair.prompt >= self.sequence_length:
            return None, False, first
        return _counted(pair.tokens[: self.sequence_length], pair.prompt, token_bytes), False, first


def _pair(tokenizer: Tokenizer, token_bytes: np.ndarray, messages: Sequence[dict[str, Any]]) -> Pair:
    prompt, answer = tokenizer.encode_answer(messages)
    if tokenizer.eos_id in answer:  # what a template writes after it is not part of the answer
        answer = answer[: answer.index(tokenizer.eos_id)]
    return _counted(np.array([*prompt, *answer, tokenizer.eos_id], np.int32), len(prompt), token_bytes)


def _counted(tokens: np.ndarray, prompt: int, token_bytes: np.ndarray) -> Pair:
    return Pair(tokens, prompt, int(token_bytes[tokens[prompt:]].sum(dtype=np.int64)))


def template_hash(tokenizer: Tokenizer) -> str:
    """sha256 of the chat template that conversations are rendered with."""
    return hashlib.sha256((tokenizer.chat_template or tokenizer.default_chat_template).encode()).hexdigest()


class PairWriter:
    """Writes the pairs of one split as shards and an index."""

    def __init__(self, directory: Path, name: str, dtype: str, shard_rows: int):
        """`shard_rows`: rows per shard, at most."""
        self._path = directory / f"{name}.index.npy"
        self._dtype = dtype
        self._writer = ShardWriter(directory, name, shard_rows)
        self._index = array.array("I")  # conversation and length in turn
        self._bytes = self._conversations = 0

    def add(self, pairs: Sequence[Pair]) -> None:
        """Appends a conversation, nothing if no answer of it is left; raises OSError if it cannot be written."""
        for pair in pairs:
            self._writer.write(encode_pair(pair, self._dtype))
            self._index.extend((self._conversations, pair.length))
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
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: copy the whole folder, or prepare the set again") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise UserError(f"{file} is damaged, or of another set: copy it again, or prepare the set again")
    conversation_N, length_N = np.load(io.BytesIO(content), allow_pickle=False).astype(np.int64).T
    starts = np.flatnonzero(np.diff(conversation_N, prepend=-1))
    return np.append(starts, len(length_N)), length_N
