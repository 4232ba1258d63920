"""Tokenises conversations: every answer becomes a pair of a prompt and an answer that fits into a row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.pairs import Pair
from llada_jax.data.prepare.conversations import answers
from llada_jax.text.tokenizer import Tokenizer

RULES = ("drop", "cut")


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
            # not fit in front of a later answer either, so the search continues where it stopped.
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
