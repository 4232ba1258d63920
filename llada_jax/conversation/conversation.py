"""Holds the messages and settings of a conversation, and makes the model's answers.

`conversation/session.py` shows a conversation to the user.

An answer is made by the reverse process (Section 2.4 of arXiv 2502.09992) on [chat so far | MASK ... MASK], step by
step, so that the user can watch it and stop it. Messages and settings change only after the change is known to be
possible, and an answer is stored only when it is complete. Whatever fails or is stopped therefore leaves a
conversation that can continue.
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llada_jax.config import UserError
from llada_jax.conversation.dialogue import TYPED, Message, asked, check_dialogue, shortened
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import lengths
from llada_jax.sampling.sampler import denoise_steps
from llada_jax.sampling.settings import NONE, check_settings, resolve
from llada_jax.sampling.text_completion import LENGTH_MULTIPLE, Options, text_length
from llada_jax.sampling.watching import open_id
from llada_jax.text.tokenizer import Tokenizer

LONGEST = 1 << 20  # largest gen_length, in tokens; far more than any model can use

_WORDS = {True: ("on", "true", "yes", "1"), False: ("off", "false", "no", "0")}
_KINDS = {int: "a whole number", float: "a number", bool: "on or off", str: "a word"}


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """The settings by which answers are made."""

    gen_length: int = 128  # maximum number of tokens in an answer, whatever `length` is
    seed: int = 0  # seed of the noise, which also depends on the turn and on how often the turn was answered

    def checked(self, model: Transformer | None = None) -> "Settings":
        """Returns these settings unchanged after checking them.

        Args:
          model: The model that the settings are for. None means that only the model-independent checks are made.

        Raises:
          UserError: If a setting is impossible. The message names the setting.
        """
        if not 1 <= self.gen_length <= LONGEST:
            raise UserError(f"gen_length={shortened(self.gen_length)}: it must be at least 1 and at most {LONGEST:,}")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed={shortened(self.seed)}: it must be from 0 to 2**32 - 1")
        config = check_settings(self.sampler(0, self.gen_length, model is not None and model.config.causal))
        if model is not None:
            resolve(config, model)
        return self

    def changed(self, name: str, text: str) -> "Settings":
        """Returns a copy of these settings in which one setting has a new value.

        Args:
          name: The name of the setting.
          text: The new value as a user types it. "default" means the default of the setting.

        Raises:
          UserError: If there is no such setting or the value is impossible.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if name not in defaults:
            raise UserError(f"there is no setting {shortened(name)!r}: choose one of {', '.join(defaults)}")
        hint = typing.get_type_hints(Settings)[name]
        kind = (typing.get_args(hint) or (hint,))[0]
        try:
            if len(text) > TYPED:  # treated as no number, although a number may be that long
                raise ValueError
            if text == "default":
                value = defaults[name]
            elif kind is bool:
                value = next(value for value, words in _WORDS.items() if text.lower() in words)
            else:
                value = kind(text)
        except (ValueError, StopIteration):
            raise UserError(f"{name}={shortened(text)}: it must be {_KINDS[kind]} or the word default") from None
        return dataclasses.replace(self, **{name: value}).checked()

    def described(self) -> dict[str, str]:
        """Returns a dictionary from the names of the settings to their values in words."""
        words = {True: "on", False: "off", None: "that of the rule"}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found = {name: words[x] if x is None or isinstance(x, bool) else str(x) for name, x in values.items()}
        return found | ({"steps": "one per token"} if self.steps is None else {})


@dataclasses.dataclass(frozen=True)
class Frame:
    """An answer after a reverse step, up to its end (EOS or end of turn, not included) if the end is known."""

    tokens_T: np.ndarray  # int32, MASK where the token is not decided yet
    new_T: np.ndarray  # bool, True for tokens decided by this step
    step: int  # number of steps taken
    done: bool  # True if the answer is complete and stored in the conversation
    ended: bool  # True if the end of the answer is known


class Conversation:
    """The messages and the settings of a conversation. The method `answer` makes the model's answers.

    Args:
      model: The model, as returned by `llada_jax.load`.
      tokenizer: The tokenizer, as returned by `llada_jax.load`.
      settings: The settings to start with.
      messages: The messages to start with, in the form that `check_dialogue` requires.

    Raises:
      UserError: If the model cannot converse (it has no ids for what the chat template writes, or no MASK), if a
        setting is impossible with the model, or if the template refuses the messages.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, settings: Settings, messages: Sequence[Message] = ()
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings.checked(model)
        self.messages: list[Message] = []
        self._attempts = 0  # number of answers begun to the user's last message
        self.replace(messages)

    def replace(self, messages: Sequence[Message]) -> None:
        """Replaces all messages of the conversation.

        Raises:
          UserError: If the messages are not a conversation, the chat template refuses them, or the model lacks a token
            that the template needs. In all these cases nothing changes.
        """
        messages = check_dialogue(messages)
        # Try the template on the messages that will be answered. If the user has not written any, add a placeholder.
        tried = asked(messages) or [*messages, {"role": "user", "content": "?"}]
        highest = max(self.tokenizer.encode_chat(tried))
        if highest >= self.model.config.vocab_size:
            raise UserError(
                f"the chat template needs token {highest}, but the model's vocabulary is "
                f"{self.model.config.vocab_size}: this model cannot converse"
            )
        self.messages = messages
        self._attempts = int(bool(messages) and messages[-1]["role"] == "assistant")

    def say(self, text: str) -> None:
        """Adds the user's next message, in place of the last message if that has no answer yet.

        Raises:
          UserError: In the same cases as `replace`.
        """
        unanswered = bool(self.messages) and self.messages[-1]["role"] == "user"
        before = self.messages[:-1] if unanswered else self.messages
        self.replace([*before, {"role": "user", "content": text}])

    def edit(self, text: str) -> None:
        """Changes the text of the user's last message and removes its answer.

        Raises:
          UserError: If there is no message of the user yet, and in the same cases as `replace`.
        """
        *before, last = self._asked()
        self.replace([*before, last | {"content": text}])

    def undo(self) -> None:
        """Removes the user's last message and its answer. Raises UserError if there is no message of the user."""
        self.replace(self._asked()[:-1])

    def restart(self) -> None:
        """Removes all messages except the system message. The settings stay."""
        self.replace([message for message in self.messages[:1] if message["role"] == "system"])

    def instruct(self, text: str) -> None:
        """Sets the system message, or removes it if the text is empty.

        Raises:
          UserError: In the same cases as `replace`.
        """
        system = [{"role": "system", "content": text}] if text else []
        attempts = self._attempts
        self.replace([*system, *(message for message in self.messages if message["role"] != "system")])
        self._attempts = attempts  # the user's message is the same, so its next answer must get new noise

    def set(self, name: str, text: str) -> None:
        """Changes a setting. If the change is impossible, raises UserError and changes nothing."""
        self.settings = self.settings.changed(name, text).checked(self.model)

    def last_message(self) -> str:
        """Returns the text of the user's last message. Raises UserError if there is none."""
        return self._asked()[-1]["content"]

    def length(self) -> int:
        """Returns the number of tokens in the chat up to the next answer, plus gen_length for the answer."""
        return len(self.tokenizer.encode_chat(self._asked())) + self.settings.gen_length

    def text(self, frame: Frame) -> str:
        """Returns the text of a complete answer."""
        return self.tokenizer.decode(frame.tokens_T, skip_special=True, continuation=True)

    def answer(self) -> Iterator[Frame]:
        """Answers the user's last message, or answers it again.

        When the last frame is yielded, its `done` is True and the answer is stored in the conversation, in place of
        any earlier answer. A caller who stops before the last frame leaves the conversation as it is. If the messages
        are changed in the meantime, the answer no longer belongs to any of them, so the iterator ends without storing
        it. The noise depends on the seed, the turn, and the number of answers to the turn that were begun before.

        Yields:
          The answer before the first reverse step and after each step.

        Raises:
          UserError: If there is no message to answer, or not enough memory.
          NonFinite: If the output of the model is NaN or infinite.
        """
        before, chat, settings = self.messages, self._asked(), self.settings
        ids = self.tokenizer.encode_chat(chat)
        turn = sum(message["role"] == "user" for message in chat)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), turn), self._attempts)
        self._attempts += 1
        config = settings.sampler(0, settings.gen_length, self.model.config.causal)
        # Few lengths mean few compilations. There is always some padding, because a canvas without padding needs
        # another program.
        padding = LENGTH_MULTIPLE - len(ids) % LENGTH_MULTIPLE
        prompt_BT = np.pad(np.asarray([ids], np.int32), ((0, 0), (padding, 0)))
        real_BT = np.arange(prompt_BT.shape[1])[None] >= padding
        steps = denoise_steps(self.model, prompt_BT, config, key, real_BT)
        for number, step in enumerate(_with_memory(steps, prompt_BT.shape[1] + settings.gen_length)):
            tokens_T, new_T = (x_BT[0, prompt_BT.shape[1] :] for x_BT in (step.tokens_BT, step.new_BT))
            end = text_length(tokens_T, self.model, self.tokenizer)
            ended, final = end < len(tokens_T), end
            # A decided token never changes. Once no token before the end is masked, neither the rest of the block nor
            # the blocks after it matter. The sampler's own stop_at_end is not used: it waits for the end of the block.
            # So must this if tokens can be taken back.
            if settings.revoke != NONE:
                final = (end // settings.block_length + 1) * settings.block_length
            done = not np.any(tokens_T[:final] == open_id(self.model.config.mask_id))
            end = min(end, lengths.shown(tokens_T, prompt_BT[0, :0], config, self.model.config))
            frame = Frame(tokens_T[:end], new_T[:end], number, done, ended)
            if self.messages is not before:
                return
            if done:
                self.messages = [*chat, {"role": "assistant", "content": self.text(frame)}]
            yield frame
            if done:
                return

    def _asked(self) -> list[Message]:
        if not (found := asked(self.messages)):
            raise UserError("there is no message yet: write a message first")
        return found


def _with_memory(steps: Iterator[Any], length: int) -> Iterator[Any]:
    """Yields from `steps`, and raises UserError if there is not enough memory for a canvas of this length."""
    try:
        yield from steps
    except (jax.errors.JaxRuntimeError, MemoryError) as error:  # from the device or from the host
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"not enough memory for {length} tokens: start a new conversation or set a smaller gen_length"
        ) from error
