"""Tokenises conversations: every answer becomes a pair of a prompt and an answer that fits into a row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax.config import UserError
from llada_jax.data.pairs import Pair
from llada_jax.data.prepare.blank import is_blank
from llada_jax.data.prepare.conversations import Conversation, answers
from llada_jax.data.prepare.left_out import BadItem
from llada_jax.text.chat_messages import MEANINGFUL, text_of
from llada_jax.text.tokenizer import Tokenizer

RULES = ("drop", "cut")


class Encoded(NamedTuple):
    """Several conversations after tokenisation."""

    pairs: list[list[Pair]]  # one list per conversation, with its pairs in order
    dropped: int  # number of answers; `manifest.Chat` explains this number and the next two
    cut: int
    empty: int
    context_only: int
    bad: list[BadItem | None]  # for each conversation, why it is left out
    unread: Counter[str]  # keys of messages that the chat template passes over, with the number of conversations


class ChatBatch(NamedTuple):
    """Conversations that are tokenised together."""

    conversations: Sequence[Conversation]
    sequence_length: int
    too_long: str  # a name in RULES
    tag: Any = None

    def tokenize(self, tokenizer: Tokenizer, token_bytes: np.ndarray) -> Encoded:
        """Returns the pairs of each conversation that fit into `sequence_length`, or that were cut to fit.

        A conversation that cannot be rendered has no pairs, and is bad.

        Args:
          tokenizer: The tokenizer; its chat template renders the conversations.
          token_bytes: int32 [ids], the bytes of text that each id stands for.
        """
        result = Encoded([], 0, 0, 0, 0, [], Counter())
        for conversation in self.conversations:
            try:
                each = self._of_one(tokenizer, token_bytes, conversation)
            except UserError as error:
                kind = getattr(error, "kind", "refused by the chat template")
                each = Encoded([[]], 0, 0, 0, 0, [BadItem(f"{conversation.where}: {error}", kind)], Counter())
            result = Encoded(*(total + more for total, more in zip(result, each, strict=True)))
        return result

    def _of_one(self, tokenizer: Tokenizer, token_bytes: np.ndarray, conversation: Conversation) -> Encoded:
        messages, variables = conversation.messages, conversation.variables
        unread = _unread(tokenizer, messages, variables)
        pairs, dropped, cut, empty, context_only = [], 0, 0, 0, 0
        turns = [k for k, message in enumerate(messages) if message["role"] == "user"]
        # Index into `turns` of the oldest turn that is kept. A turn that does not fit in front of one answer does
        # not fit in front of a later answer either, so the search continues where it stopped.
        first = 0
        for i in answers(messages):
            if i in conversation.masked:
                context_only += 1
                continue
            if not (_says_something(messages[i]) and any(map(_says_something, messages[:i]))):
                empty += 1
                continue
            pair, whole, first = self._fit(tokenizer, token_bytes, messages[: i + 1], turns, first, variables)
            if pair is None:
                dropped += 1
                continue
            cut += not whole
            pairs.append(pair)
        return Encoded([pairs], dropped, cut, empty, context_only, [None], Counter(unread))

    def _fit(
        self,
        tokenizer: Tokenizer,
        token_bytes: np.ndarray,
        messages: Sequence[dict[str, Any]],
        turns: Sequence[int],
        first: int,
        variables: Mapping[str, Any],
    ) -> tuple[Pair | None, bool, int]:
        """Makes the pair of the last message, and cuts it to fit if `too_long` says so.

        Args:
          tokenizer: The tokenizer.
          token_bytes: int32 [ids], the bytes of text that each id stands for.
          messages: The messages up to the answer, which is the last of them.
          turns: The positions of the user's messages in the whole conversation.
          first: The index into `turns` of the oldest turn to try to keep.
          variables: Further variables of the chat template.

        Returns:
          The pair, or None if the answer is dropped; whether the pair is complete, with nothing cut; and the index
          into `turns` of the oldest turn that was kept.
        """
        last = max(sum(turn < len(messages) - 1 for turn in turns) - 1, 0)
        while True:
            kept = [*messages[: turns[0]], *messages[turns[first] :]] if first else messages
            pair = _pair(tokenizer, token_bytes, kept, variables)
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


def _says_something(message: Mapping[str, Any]) -> bool:
    return not is_blank(text_of(message)) or any(message.get(key) for key in MEANINGFUL)


def _unread(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any]) -> list[str]:
    """Returns the harmless keys of messages that the chat template passes over.

    Raises:
      BadItem: If the template passes over a message, a key, or a variable, that changes what the model sees or learns.
    """
    if roles := tokenizer.unwritten_roles(messages, variables):
        raise BadItem(
            f'the chat template leaves out a message of the role "{roles[0]:.50}": use a template that writes it, or '
            "write it into a message of the user",
            "the chat template leaves out a message",
        )
    if not variables and all(message.keys() <= {"role", "content"} for message in messages):
        return []
    unread = tokenizer.unread_in_chat(messages, variables)
    for key in unread:
        # A switch that is off asks for nothing that a template without it would do.
        if key in MEANINGFUL or variables.get(key, False) is not False:
            raise BadItem(
                f'the chat template passes over "{key}": use a template that reads it, or remove it if the messages '
                "say the same",
                f'"{key}" is passed over',
            )
    return [key if key in variables else f"{key} of messages" for key in unread]


def _pair(
    tokenizer: Tokenizer, token_bytes: np.ndarray, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any]
) -> Pair:
    prompt, answer = tokenizer.encode_answer(messages, variables)
    if tokenizer.eos_id in answer:  # what the template writes after EOS is not part of the answer
        answer = answer[: answer.index(tokenizer.eos_id)]
    return _counted(np.array([*prompt, *answer, tokenizer.eos_id], np.int32), len(prompt), token_bytes)


def _counted(tokens: np.ndarray, prompt: int, token_bytes: np.ndarray) -> Pair:
    """Returns the pair of these tokens, with the bytes of text of its answer counted."""
    return Pair(tokens, prompt, int(token_bytes[tokens[prompt:]].sum(dtype=np.int64)))
