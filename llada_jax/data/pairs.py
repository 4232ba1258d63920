"""Defines the rows of conversations, the records that hold these rows, and the index beside the shards.

A row is a prompt with its answer. A conversation with n answers gives n rows, one after the other: row k holds the
prompt of answer k, which includes all turns before it, and answer k itself. A record is little-endian: the number of
tokens of the prompt (uint32), the number of tokens of the answer (uint32), the number of bytes of text in the answer
(uint32), and then the ids of the prompt and of the answer in the dtype of the set.

The index of a split is a .npy file with one line per row and two uint32 columns: the number of the row's conversation,
in ascending order, and the number of tokens of the row. The index tells every host the lengths of all rows, also of
those that only other hosts read.
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
    """One row: a prompt with its answer."""

    tokens: np.ndarray  # int32 [prompt + answer]
    prompt: int  # number of tokens of the prompt
    bytes: int  # bytes of text in the answer

    @property
    def length(self) -> int:
        return len(self.tokens)


def encode_pair(pair: Pair, dtype: str) -> bytes:
    """Returns the record of a pair, with its ids in `dtype`."""
    header = np.array([pair.prompt, pair.length - pair.prompt, pair.bytes], HEADER)
    return header.tobytes() + pair.tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def decode_pair(record: bytes, dtype: str, sequence_length: int) -> Pair:
    """Reads a record.

    Args:
      record: The bytes of the record.
      dtype: The dtype of the ids in the record.
      sequence_length: The maximum number of tokens of a pair.

    Raises:
      ValueError: If the record is not a pair of at most `sequence_length` ids in `dtype`.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    if len(record) < HEADER_BYTES:
        raise ValueError(f"a record of {len(record)} bytes is too short for a prompt with its answer")
    prompt, answer, bytes_ = map(int, np.frombuffer(record, HEADER, 3))
    length = prompt + answer
    if not (prompt and answer and length <= sequence_length and len(record) == HEADER_BYTES + length * kind.itemsize):
        raise ValueError(
            f"a record of {len(record)} bytes is not a prompt of {prompt} tokens and an answer of {answer} tokens "
            f"in {dtype}"
        )
    return Pair(np.frombuffer(record, kind, length, offset=HEADER_BYTES).astype(np.int32), prompt, bytes_)


class Encoded(NamedTuple):
    """Several conversations after tokenisation."""

    pairs: list[list[Pair]]  # one list per conversation, with its pairs in order
    dropped: int  # number of answers; `manifest.Chat` explains this number and the next two
    cut: int
    empty: int


class ChatBatch(NamedTuple):
    """Conversations that are tokenised together."""

    messages: Sequence[Sequence[dict[str, Any]]]
    where: Sequence[str]  # file and line of each conversation
    sequence_length: int
    too_long: str  # a name in RULES
    tag: Any = None

    def tokenize(self, tokenizer: Tokenizer, token_bytes: np.ndarray) -> Encoded:
        """Returns the pairs of each conversation that fit into `sequence_length`, or that were cut to fit.

        Args:
          tokenizer: The tokenizer; its chat template renders the conversations.
          token_bytes: int32 [ids], the bytes of text that each id stands for.

        Raises:
          UserError: If a conversation cannot be rendered. The message names its file and line.
        """
        pairs, dropped, cut, empty = [], 0, 0, 0
        for messages, where in zip(self.messages, self.where, strict=True):
            pairs.append([])
            turns = [k for k, message in enumerate(messages) if message["role"] == "user"]
            # Index into `turns` of the oldest turn that is kept. A turn that does not fit in front of one answer does
            # not fit in front of a later answer either, so the search for it goes on where it stopped.
            first = 0
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
        """Makes the pair of the last message, and cuts it to fit if `too_long` says so.

        Args:
          tokenizer: The tokenizer.
          token_bytes: int32 [ids], the bytes of text that each id stands for.
          messages: The messages up to the answer, which is the last of them.
          turns: The positions of the user's messages in the whole conversation.
          first: The index into `turns` of the oldest turn to try to keep.

        Returns:
          The pair, or None if the answer is dropped; whether the pair is complete, with nothing cut; and the index
          into `turns` of the oldest turn that was kept.
        """
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
    if tokenizer.eos_id in answer:  # what the template writes after EOS is not part of the answer
        answer = answer[: answer.index(tokenizer.eos_id)]
    return _counted(np.array([*prompt, *answer, tokenizer.eos_id], np.int32), len(prompt), token_bytes)


def _counted(tokens: np.ndarray, prompt: int, token_bytes: np.ndarray) -> Pair:
    """Returns the pair of these tokens, with the bytes of text of its answer counted."""
    return Pair(tokens, prompt, int(token_bytes[tokens[prompt:]].sum(dtype=np.int64)))


def template_hash(tokenizer: Tokenizer) -> str:
    """Returns the sha256 of the chat template that renders the conversations."""
    return hashlib.sha256((tokenizer.chat_template or tokenizer.default_chat_template).encode()).hexdigest()


class PairWriter:
    """Writes the pairs of one split as shards and an index."""

    def __init__(self, directory: Path, name: str, dtype: str, shard_rows: int):
        """Creates the writer.

        Args:
          directory: The folder that the files are written to.
          name: The name of the split, with which the names of the files begin.
          dtype: The dtype of the ids in the records.
          shard_rows: The maximum number of rows per shard.
        """
        self._path = directory / f"{name}.index.npy"
        self._dtype = dtype
        self._writer = ShardWriter(directory, name, shard_rows)
        self._index = array.array("I")  # for each row: the number of its conversation, then its length
        self._bytes = self._conversations = 0

    def add(self, pairs: Sequence[Pair]) -> None:
        """Appends the pairs of one conversation. A conversation that has no pairs left does not count.

        Raises:
          OSError: If the pairs cannot be written.
        """
        for pair in pairs:
            self._writer.write(encode_pair(pair, self._dtype))
            self._index.extend((self._conversations, pair.length))
            self._bytes += pair.bytes
        self._conversations += bool(pairs)

    def finish(self) -> tuple[Split, Shard]:
        """Closes the last shard, writes the index, and returns what the manifest says of the split and the index."""
        index_N2 = np.array(self._index, HEADER).reshape(-1, 2)
        with self._path.open("wb") as file:
            np.save(file, index_N2)
            file.flush()
        shards, tokens = self._writer.finish(), int(index_N2[:, 1].sum(dtype=np.int64))
        split = Split(self._writer.rows, tokens, self._bytes, self._conversations, shards)
        return split, finished_file(self._path, len(index_N2))


def load_index(path: str, manifest: Manifest, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the index of a split.

    Args:
      path: The folder of the set.
      manifest: The manifest of the set.
      split: The name of the split.

    Returns:
      Two int64 arrays. The first holds the first row of each conversation and, at its end, the number of rows. The
      second holds the number of tokens of each row.

    Raises:
      UserError: If the index is missing, or if its content is not what the manifest says.
    """
    entry = manifest.index(split)
    file = epath.Path(path) / entry.name
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: copy the whole folder, or prepare the set again") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise UserError(f"{file} is damaged, or belongs to another set: copy it again, or prepare the set again")
    conversation_N, length_N = np.load(io.BytesIO(content), allow_pickle=False).astype(np.int64).T
    starts = np.flatnonzero(np.diff(conversation_N, prepend=-1))
    return np.append(starts, len(length_N)), length_N
