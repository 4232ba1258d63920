"""The part of a tokenizer that writes chats as text and as ids, with the folder's chat template or LLaDA's own."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llada_jax.config import UserError
from llada_jax.text import chat_messages, chat_template


class ChatEncoding:
    """Methods of `Tokenizer`, whose docstring explains the attributes."""

    chat_template: str | None
    default_chat_template: str
    _tool_template: str | None  # the folder's template for chats with tools, if it is another one
    _variables: Mapping[str, Any]  # what the folder's template gets beside the messages
    _special: Mapping[str, int]  # literal -> id of every control token
    _header: str  # the header of an answer in LLaDA's template
    _encode_special: Callable[..., list[int]]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text of a chat, written by the folder's chat template or by LLaDA's own.

        LLaDA's template writes BOS; then for each message <|start_header_id|>ROLE<|end_header_id|>, two newlines, the
        trimmed content and <|eot_id|>; then the header of the assistant's answer.

        Args:
          messages: The messages, each {"role": "system" | "user" | "assistant", "content": text}. A message may have
            further fields for the template to use. `chat_messages.check_chat` says which other contents are possible.
          add_generation_prompt: Whether the header of an answer follows. If False, and the template always writes that
            header (as the published template does), the header is removed. A header of another form is not removed.
          variables: Further variables for the template, for example {"tools": [...]}.

        Raises:
          UserError: If a message lacks its role or content, or if the template fails or refuses the messages.
        """
        if add_generation_prompt:
            return self._chat_text(self.fitted_chat(messages, True, variables), True, variables)
        text, back = self.marked_chat(messages, False, variables)
        return text.translate(back)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the ids of a chat; only the text that the template writes can become control tokens.

        A literal such as "<|eot_id|>" in a message is encoded as ordinary text. All other ids are those of the text
        from `render_chat`, encoded with special=True. Arguments and errors are those of `render_chat`. In addition,
        UserError is raised if the template may take a control token from a message.
        """
        text, back = self.marked_chat(messages, add_generation_prompt, variables)
        return self._encode_special(text, False, lambda part: part.translate(back))

    def encode_answer(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of a chat in two parts: the prompt for its last message, and the last message, the answer.

        The prompt is `encode_chat(messages[:-1])`, to which a model replies. The answer is what the model has to write
        then: what the template writes for the last message, including the token that ends it (<|eot_id|> in LLaDA's
        template). If the prompt opens a thought, the answer begins in that thought.

        Raises:
          UserError: As in `encode_chat`, and if it cannot be told what the model has to write. This is so if the
            template does not write the answer directly after the prompt, leaves its thought out, or marks another part
            of the text with {% generation %}.
        """
        chat = self.fitted_chat(messages, False, variables)
        before = self._chat_text(chat[:-1], True, variables)
        text, back = self.marked_chat(chat, False, variables)
        if text.translate(back).startswith(before):
            self._check_generation(chat, variables, len(before), text.translate(back))
            # Each mark stands for one character, so the prompt has the same length with and without marks.
            answer = text[len(before) :]
        elif (found := chat_messages.after_an_opened_thought(before, text, back, chat[-1])) is not None:
            answer = found
        else:
            opens = ", which opens a thought" if before.rstrip().endswith("think>") else ""
            if opens and "enable_thinking" in self._source(variables):
                opens += ' (a line may say "enable_thinking": false)'
            raise UserError(
                f"the chat template writes an answer differently from the prompt for it{opens}: use another template"
            )
        if chat_messages.dropped_thought(chat[-1], answer.translate(back)):
            raise UserError("the chat template leaves out the thought of an answer: use another template")
        if answer.rstrip().endswith(tuple(self._special)):  # a line end after it belongs to the next message
            answer = answer.rstrip()
        ids = self._encode_special(answer, True, lambda part: part.translate(back))
        return self.encode_chat(chat[:-1], variables=variables), ids

    def _check_generation(self, chat: list[dict[str, Any]], variables: Any, start: int, text: str) -> None:
        """Raises UserError if the template has {% generation %} and marks with it what is not the answer.

        Args:
          chat: The messages; the last one is the answer.
          variables: Further variables for the template.
          start: The number of characters before the answer.
          text: The text of the chat.
        """
        if not chat_template.GENERATION.search(self._source(variables)):
            return
        used = set(text)
        begin, end = (chr(i) for i in itertools.islice((i for i in range(0xE000, 0xF8FF) if chr(i) not in used), 2))
        bounds = dict(zip(chat_template.GENERATION_BOUNDS, (begin, end), strict=True))
        marked = self._chat_text(chat, False, {**(variables or {}), **bounds})
        spans = [
            (found.start() - 2 * i, found.end() - 2 * (i + 1))  # without the bounds, which are characters too
            for i, found in enumerate(re.finditer(f"{begin}[^{end}]*{end}", marked))
        ]
        letter = start + len(text[start:]) - len(text[start:].lstrip())  # where the answer has its first letter
        first = next((span for span in spans if span[1] > start), None)
        if first is None or first[0] > letter:
            raise UserError(
                "the chat template marks with {% generation %} another part of the text than what a model writes after "
                "the prompt: use another template"
            )

    def unread_in_chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Returns the keys of messages, and the variables, that the chat template passes over."""
        chat, source = self.fitted_chat(messages, False, variables), self._source(variables)
        return chat_messages.passed_over(
            lambda name: chat_template.names(source, name),
            lambda name: re.search(rf"\b{re.escape(name)}\b", source) is not None,
            lambda chat, variables: self._chat_text(chat, False, variables),
            chat,
            variables or {},
        )

    def unwritten_roles(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Returns the roles, other than user and assistant, of messages that the chat template leaves out."""
        if all(message["role"] in ("user", "assistant") for message in messages):  # by far the most
            return []
        chat = self.fitted_chat(messages, False, variables)
        return chat_messages.unwritten_roles(lambda chat: self._chat_text(chat, False, variables), chat)

    def fitted_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the messages in the first form that the template takes; see `chat_messages.fitted`."""
        chat_messages.check_chat(messages, variables)
        source = self._source(variables)
        messages = [chat_messages.with_thought(each, lambda key: chat_template.names(source, key)) for each in messages]
        if chat_template.takes_only_parts(source):
            messages = [chat_messages.as_parts(message) for message in messages]
        return chat_messages.fitted(messages, lambda chat: self._chat_text(chat, add_generation_prompt, variables))

    def marked_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, dict[int, str]]:
        """Returns a chat as text in which every literal of a control token was written by the template.

        In this text, some characters of the messages are replaced by marks. The second value is the table with which
        `str.translate` restores them. Arguments and errors are those of `encode_chat`.
        """
        messages = self.fitted_chat(messages, add_generation_prompt, variables)
        text, back = chat_template.render_marked(
            self._source(variables),
            lambda chat, given: self._chat_text(chat, add_generation_prompt, given),
            messages,
            [*self._special],
            variables or {},
        )
        # A header in a message would contain marks, so this header was written by the template.
        if not add_generation_prompt and text.endswith(self._header):
            if text.translate(back) == self._chat_text(messages, True, variables):
                text = text.removesuffix(self._header)
        return text, back

    def _source(self, variables: Mapping[str, Any] | None) -> str:
        """Returns the template for a chat; a folder may have one of its own for chats with tools."""
        if (variables or {}).get("tools") is not None and self._tool_template is not None:
            return self._tool_template
        return self.chat_template or self.default_chat_template

    def _chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        own = {} if self.chat_template is None else self._variables
        given = {**own, **(variables or {})}
        return chat_template.render(self._source(variables), given, messages, add_generation_prompt)
