"""A conversation: its messages, its settings and one answer at a time. What a user sees of it: chat_session.py.

An answer is the reverse process (Section 2.4 of arXiv 2502.09992) on [chat so far | MASK ... MASK], watched step by
step, so that it can be stopped. Messages and settings change only when a change is known to be possible, the
answer only when the new one is whole: whatever fails or is stopped leaves a conversation that can go on.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llada_jax.config import UserError
from llada_jax.conversation.dialogue import TYPED, Message, asked, check_dialogue, shortened
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.sampler import check_settings, denoise_steps, resolve
from llada_jax.sampling.text_completion import LENGTH_MULTIPLE, Options, text_length
from llada_jax.text.tokenizer import Tokenizer

LONGEST = 1 << 20  # tokens of an answer; the longest of any model are a small part of it

_WORDS = {True: ("on", "true", "yes", "1"), False: ("off", "false", "no", "0")}
_KINDS = {int: "a whole number", float: "a number", bool: "on or off"}


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How answers are made."""

    gen_length: int = 128  # tokens of the longest answer
    seed: int = 0  # of the noise, with the turn and how often it was answered

    def checked(self, model: Transformer | None = None) -> "Settings":
        """These settings. UserError names one that is impossible, with this model or (None) with any."""
        if not 1 <= self.gen_length <= LONGEST:
            raise UserError(f"gen_length={shortened(self.gen_length)}: it must be at least 1 and at most {LONGEST:,}")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed={shortened(self.seed)}: it must be from 0 to 2**32 - 1")
        config = check_settings(self.sampler(0, self.gen_length))
        if model is not None:
            resolve(config, model)
        return self

    def changed(self, name: str, text: str) -> "Settings":
        """These settings with one as a user types it; "default" is its default. UserError names what is wrong."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if name not in defaults:
            raise UserError(f"there is no setting {shortened(name)!r}: {', '.join(defaults)}")
        kind = int if defaults[name] is None else type(defaults[name])
        try:
            if len(text) > TYPED:  # no number: some of them are
                raise ValueError
            if text == "default":
                value = defaults[name]
            elif kind is bool:
                value = next(value for value, words in _WORDS.items() if text.lower() in words)
            else:
                value = kind(text)
        except (ValueError, StopIteration):
            raise UserError(f"{name}={shortened(text)}: it must be {_KINDS[kind]}, or default") from None
        return dataclasses.replace(self, **{name: value}).checked()

    def described(self) -> dict[str, str]:
        """Name -> value in words."""
        words = {None: "one per token", True: "on", False: "off"}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: words[x] if x is None or isinstance(x, bool) else str(x) for name, x in values.items()}


@dataclasses.dataclass(frozen=True)
class Frame:
    """An answer after a reverse step, as far as its end, if that is known: EOS or end of turn, not included."""

    tokens_T: np.ndarray  # int32, MASK where nothing is decided yet
    new_T: np.ndarray  # bool: decided by this step
    step: int  # steps taken
    done: bool  # the answer is whole, and in the conversation
    ended: bool  # its end is known; False = it goes on as far as gen_length allows


class Conversation:
    """Messages and settings; see `answer`.

    Args:
      model, tokenizer: from `llada_jax.load`.
      settings: to start with.
      messages: to start with, as `check_dialogue` wants them.

    Raises:
      UserError: the model cannot converse (it has no ids for what the chat template writes, or no MASK), a setting
        is impossible with it, or the template refuses the messages.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, settings: Settings, messages: Sequence[Message] = ()
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings.checked(model)
        self.messages: list[Message] = []
        self._attempts = 0  # answers begun to the last message of the user's
        self.replace(messages)

    def replace(self, messages: Sequence[Message]) -> None:
        """Makes these the conversation. UserError, and nothing changes, if they are none or the template refuses."""
        messages = check_dialogue(messages)
        # The template is tried on what will be answered; without a turn, on one that stands for it.
        tried = asked(messages) or [*messages, {"role": "user", "content": "?"}]
        highest = max(self.tokenizer.encode_chat(tried))
        if highest >= self.model.config.vocab_size:
            raise UserError(
                f"the chat template needs token {highest}, the model's vocabulary is {self.model.config.vocab_size}: "
                "this model cannot converse"
            )
        self.messages = messages
        self._attempts = int(bool(messages) and messages[-1]["role"] == "assistant")

    def say(self, text: str) -> None:
        """The user's next message. It takes the place of one that has no answer. Errors as `replace`."""
        unanswered = bool(self.messages) and self.messages[-1]["role"] == "user"
        before = self.messages[:-1] if unanswered else self.messages
        self.replace([*before, {"role": "user", "content": text}])

    def edit(self, text: str) -> None:
        """Another text for the user's last message, whose answer goes. Errors as `replace`; there must be one."""
        *before, last = self._asked()
        self.replace([*before, last | {"content": text}])

    def undo(self) -> None:
        """Takes back the user's last message and its answer. UserError if there is none."""
        self.replace(self._asked()[:-1])

    def restart(self) -> None:
        """Forgets everything but the system message and the settings."""
        self.replace([message for message in self.messages[:1] if message["role"] == "system"])

    def instruct(self, text: str) -> None:
        """Sets the system message; "" = none. Errors as `replace`."""
        system = [{"role": "system", "content": text}] if text else []
        attempts = self._attempts
        self.replace([*system, *(message for message in self.messages if message["role"] != "system")])
        self._attempts = attempts  # the message stays: another answer to it is still another

    def set(self, name: str, text: str) -> None:
        """Changes a setting. UserError, and nothing changes, if that is impossible."""
        self.settings = self.settings.changed(name, text).checked(self.model)

    def last_message(self) -> str:
        """The user's last message. UserError if there is none."""
        return self._asked()[-1]["content"]

    def length(self) -> int:
        """Tokens: of the chat up to the answer that would come now, and gen_length for that."""
        return len(self.tokenizer.encode_chat(self._asked())) + self.settings.gen_length

    def text(self, frame: Frame) -> str:
        """The text of a whole answer."""
        return self.tokenizer.decode(frame.tokens_T, skip_special=True, continuation=True)

    def answer(self) -> Iterator[Frame]:
        """Answers the user's last message, or answers it again.

        Yields the answer before the first reverse step and after each. With the last, `done`, it is in the
        conversation, in the place of an earlier answer; who stops before keeps the conversation as it is. If the
        messages are changed in between, the answer is to none of them any more: it ends without that last one. The
        noise depends on the seed, the turn, and how many answers to it were begun before.

        Raises UserError: there is nothing to answer, or not the memory for it.
        """
        before, chat, settings = self.messages, self._asked(), self.settings
        ids = self.tokenizer.encode_chat(chat)
        turn = sum(message["role"] == "user" for message in chat)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), turn), self._attempts)
        self._attempts += 1
        config = settings.sampler(0, settings.gen_length)
        # Few lengths, few compilations; at least one token of padding, as a canvas without any is another program.
        padding = LENGTH_MULTIPLE - len(ids) % LENGTH_MULTIPLE
        prompt_BT = np.pad(np.asarray([ids], np.int32), ((0, 0), (padding, 0)))
        real_BT = np.arange(prompt_BT.shape[1])[None] >= padding
        steps = denoise_steps(self.model, prompt_BT, config, key, real_BT)
        for step, (tokens_BT, new_BT) in enumerate(_with_memory(steps, prompt_BT.shape[1] + settings.gen_length)):
            tokens_T, new_T = (x_BT[0, prompt_BT.shape[1] :] for x_BT in (tokens_BT, new_BT))
            end = text_length(tokens_T, self.model, self.tokenizer)
            # What is decided stays: once nothing before the end is masked, neither the rest of its block nor the blocks
            # after it matter. So nothing is asked of the sampler's own stop_at_end, which waits for the block's end.
            done = not np.any(tokens_T[:end] == self.model.config.mask_id)
            frame = Frame(tokens_T[:end], new_T[:end], step, done, end < len(tokens_T))
            if self.messages is not before:
                return
            if done:
                self.messages = [*chat, {"role": "assistant", "content": self.text(frame)}]
            yield frame
            if done:
                return

    def _asked(self) -> list[Message]:
        if not (found := asked(self.messages)):
            raise UserError("there is no message yet: write one")
        return found


def _with_memory(steps: Iterator[Any], length: int) -> Iterator[Any]:
    """The same, with one line for the user when a canvas of this length is too long for the memory."""
    try:
        yield from steps
    except (jax.errors.JaxRuntimeError, MemoryError) as error:  # of the device; of the host
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"not enough memory for {length} tokens: start anew, or set a smaller gen_length") from error
