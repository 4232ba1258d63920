"""Turns a line of chat data into messages, and honours, counts or refuses whatever else the line says.

A line is either a list of messages or one question with one answer:

  {"messages": [{"role": "user" | "assistant" | "system" | ..., "content": "..."}, ...]}
  {"conversations": [{"from": "human" | "gpt" | "system" | ..., "value": "..."}, ...]}
  {"prompt": "...", "response": "..."}                       "prompt" may also be called instruction, question or query,
                                                             "response" output, answer or completion

A list is under the key messages, conversations or conversation, and its messages may have either form; a list of texts,
there or, on a line without question and answer, under "data", is what user and assistant say in turn. To a question
belong "context", which comes before it, "input", which comes after it (or is the question, if there is no other), and
"history", a list of earlier questions with their answers. Empty lines separate the parts of a question. Question and
answer may also be lists of messages; of the question's, none is learned.

To both belong the instructions under "system", and the variables of the chat template: "tools", "documents",
"enable_thinking" and those in "chat_template_kwargs". A mark on a message or a line says whether its answers are
learned (see marks.py). Preference data, several answers and media are refused. All keys that are left are
listed once at the end of the preparation.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llada_jax.config import UserError
from llada_jax.data.prepare import marks
from llada_jax.data.prepare.json_lines import BOM, repeated_key, shown
from llada_jax.data.prepare.left_out import BadItem
from llada_jax.data.prepare.text import valid
from llada_jax.text.chat_messages import check_chat, text_of

ASSISTANT = "assistant"
_LISTS = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "instruction", "question", "query")
_ANSWERS = ("response", "output", "answer", "completion")
_SYSTEM = ("system", "system_prompt", "system_message")
# A line with messages and one of these pairs has two conversations.
_PAIRS = (("prompt", "response"), ("instruction", "output"), ("question", "answer"))
_ROLES = {
    "system": "system",
    "human": "user", "user": "user", "prompter": "user",
    "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT,
    "bot": ASSISTANT, "model": ASSISTANT, "function_call": ASSISTANT,
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
_ASKERS = {name for name, role in _ROLES.items() if role in ("system", "user")}  # who are never learned
# Keys that change what is learned or seen and that are not supported, with the reason.
_NOT_READ = {
    **dict.fromkeys(
        ("chosen", "rejected", "chosen_response", "rejected_response", "preferred", "dispreferred"),
        "this is preference data, but only one answer can be learned: write that answer alone",
    ),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"), "only text can be learned: leave such lines out"
    ),
    "functions": 'functions in this form are not supported: write them as "tools"',
    "train_detail": "parts of a message cannot be marked: mark the whole message",
}
# The same, for lines that are not a list of messages.
_NOT_READ_BESIDE_A_QUESTION = {
    **dict.fromkeys(
        ("responses", "outputs", "answers", "completions", "candidates"),
        "only one answer can be learned: write one line for each answer",
    ),
    **dict.fromkeys(("choices", "options"), "choices are not part of the question: write them into its text"),
    **dict.fromkeys(
        ("reasoning", "reasoning_content", "thinking", "thought", "thoughts"),
        'it belongs to the answer: write the line as "messages" in the form that the chat template reads',
    ),
}
_VARIABLES = ("tools", "documents", "enable_thinking")


class Read(NamedTuple):
    """What a line says."""

    messages: list[dict[str, Any]]
    masked: frozenset[int]  # positions of the answers that are marked as not to be learned
    variables: dict[str, Any]  # further variables of the chat template
    unread: list[str]  # what has no effect, each in words for a list


def read_line(record: Any, where: str, group_key: str | None = None) -> Read:
    """Returns what a line says.

    Args:
      record: The value of the line.
      where: The file and the line, with which an error message begins.
      group_key: A key that the caller reads.

    Raises:
      BadItem: If the line has none of the known shapes, or several of them, if it says something that cannot be
        honoured, or if its conversation has no answer.
    """
    if not isinstance(record, dict):
        raise BadItem(f"{where}: a conversation must be a JSON object, but this is {shown(record)}", "no JSON object")
    if (key := repeated_key(record)) is not None:
        raise BadItem(f'{where}: the key "{key}" occurs twice', "a key occurs twice")
    try:
        line = _Line(record)
        messages = line.conversation()
        masked = line.unmark(messages)
        variables = line.variables()
        check_chat(messages, variables)
        unread = line.unread(group_key)
    except BadItem as error:
        raise BadItem(f"{where}: {error}", error.kind) from None
    except UserError as error:
        raise BadItem(f"{where}: {error}", "messages of no known form") from None
    valid(json.dumps([messages, variables], ensure_ascii=False), where)
    if not any(message["role"] == ASSISTANT for message in messages[1:]):
        raise BadItem(
            f"{where}: the conversation has no answer, because no message of the assistant follows another message",
            "no answer",
        )
    return Read(messages, masked, variables, unread)


class _Line:
    """One line, which remembers the keys that were read."""

    def __init__(self, record: dict[str, Any]):
        # A value of nothing says nothing; only the key of an answer must be there.
        self._record = {key: value for key, value in record.items() if value not in (None, "", [], {})}
        self._all = record
        self._read: set[str] = set()
        self._told: list[str] = []

    def conversation(self) -> list[dict[str, Any]]:
        """Returns the messages, as the data marks them."""
        self._refuse(_NOT_READ)
        if self._all.get("label") is False or self._all.get("kto_tag") is False:
            raise BadItem("the answer is labelled as a bad one: leave the line out", "preference data")
        lists, prompts, answers = (self._present(keys) for keys in (_LISTS, _PROMPTS, _ANSWERS))
        if not prompts and answers and "input" in self._record:
            prompts = ["input"]
        if not lists and not prompts and not answers and _is_texts(self._record.get("data")):
            lists = ["data"]
        if not self._record.keys() & {*_LISTS, *lists} and prompts and answers:
            lists = []
        pairs = [pair for pair in _PAIRS if set(pair) <= set(self._record)]
        if len(lists) > 1 or (lists and pairs) or (not lists and (len(prompts) > 1 or len(answers) > 1)):
            problem = "several"
        elif not lists and not (prompts and answers):
            problem = "none"
        elif lists:
            return self._of_a_list(lists[0])
        else:
            return self._of_a_question(prompts[0], answers[0])
        known = ", ".join(["messages", *(" + ".join(pair) for pair in _PAIRS), "conversations"])
        keys = ", ".join(self._all)[:200] or "none"
        raise BadItem(f"the line has {problem} of the shapes {known}; its keys are {keys}", f"{problem} of the shapes")

    def _present(self, keys: Sequence[str]) -> list[str]:
        """Returns those of the keys that the line has a value for, or, if there are none, those that it has at all."""
        return [key for key in keys if key in self._record] or [key for key in keys if key in self._all]

    def _of_a_list(self, key: str) -> list[dict[str, Any]]:
        self._read.add(key)
        messages = self._messages(self._all[key])
        check_chat(messages)
        texts = [text_of(message) for message in messages]
        for other in ("history", "context", "input", "instruction"):
            value = self._record.get(other)
            if value is not None and not (isinstance(value, str) and any(value.strip() in text for text in texts)):
                raise BadItem(f'"{other}" beside "{key}" cannot be honoured: write it into the messages', "unread text")
        return self._after_system(messages, key)

    def _of_a_question(self, prompt: str, answer: str) -> list[dict[str, Any]]:
        self._refuse(_NOT_READ_BESIDE_A_QUESTION)
        if _is_messages(self._all[prompt]):
            asked = self._asked(prompt)
        else:
            self._text(prompt)
            keys = dict.fromkeys(("context", prompt, "input"))
            parts = [text for key in keys if (text := self._text(key, key != prompt))]
            asked = [*self._system(), *self._history(), {"role": "user", "content": "\n\n".join(parts)}]
        if not _is_messages(self._all[answer]):
            return [*asked, {"role": ASSISTANT, "content": self._text(answer)}]
        self._read.add(answer)
        answered = self._messages(self._all[answer])
        roles = [message.get("role") for message in answered]
        if roles[0] != ASSISTANT:
            raise BadItem(
                f'the list under "{answer}" begins with a message of the role {shown(roles[0])}: an answer begins with '
                "one of the assistant",
                "an answer by another speaker",
            )
        if len(roles) > 1 and set(roles) == {ASSISTANT}:
            raise BadItem(
                f'"{answer}" has several answers: {_NOT_READ_BESIDE_A_QUESTION["answers"]}', "several answers"
            )
        return asked + answered

    def _asked(self, key: str) -> list[dict[str, Any]]:
        """Returns a question that is a list of messages."""
        self._read.add(key)
        if beside := [other for other in ("context", "input", "history") if other in self._record and other != key]:
            raise BadItem(
                f'"{beside[0]}" beside a list under "{key}" cannot be honoured: write it there', "unread text"
            )
        messages = [_not_learned(message) for message in self._messages(self._all[key])]
        if messages[-1].get("role") == ASSISTANT:
            raise BadItem(
                f'the list under "{key}" ends with a message of the assistant: the beginning of an answer belongs to '
                "the answer",
                "a question by the assistant",
            )
        return self._after_system(messages, key)

    def _after_system(self, messages: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
        """Returns the messages after the system message that the line has beside them."""
        system = self._system()
        if system and messages and messages[0].get("role") == "system":
            if messages[0].get("content") != system[0]["content"]:
                raise BadItem(f'the line has a system message under "{key}" and another one beside it', "two systems")
            return messages
        return system + messages

    def _system(self) -> list[dict[str, Any]]:
        found = [key for key in _SYSTEM if key in self._record]
        if len(found) > 1:
            raise BadItem(f"the line has several system messages: {', '.join(found)}", "two systems")
        return [{"role": "system", "content": self._text(found[0])}] if found else []

    def _history(self) -> list[dict[str, Any]]:
        self._read.add("history")
        turns, messages = self._record.get("history", []), []
        for turn in turns if isinstance(turns, list) else [None]:
            if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
                messages += [{"role": "user", "content": turn[0]}, {"role": ASSISTANT, "content": turn[1]}]
            elif isinstance(turn, Mapping):
                messages += self._messages([turn])
            else:
                raise BadItem(
                    f'"history" must be a list of questions with answers, [["...", "..."], ...], but has {shown(turn)}',
                    "history of no known form",
                )
        return messages

    def _text(self, key: str, optional: bool = False) -> str:
        self._read.add(key)
        value = self._all.get(key)
        if optional and value is None:
            return ""
        if not isinstance(value, str):
            raise BadItem(f'"{key}" must be a text, but it is {shown(value)}', f'"{key}" is not a text')
        return value.lstrip(BOM)

    def _messages(self, found: Any) -> Any:
        """Returns messages of either form as messages with a role and a content; `check_chat` finds what is none."""
        if not isinstance(found, list):
            return found
        if _is_texts(found):
            if all(_names_a_speaker(text) for text in found[:2]):
                raise BadItem(
                    f"the texts of a list name their speakers, as in {shown(found[0])}: write them as messages",
                    "texts that name their speakers",
                )
            return [{"role": ("user", ASSISTANT)[i % 2], "content": text.lstrip(BOM)} for i, text in enumerate(found)]
        return [self._message(each) if isinstance(each, dict) else each for each in found]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("rejected") or message.get("chosen"):
            raise BadItem(f"a message has several versions: {_NOT_READ['chosen']}", "preference data")
        if "role" in message or "from" not in message:
            role, content = message.get("role"), message.get("content")
            # A role that is written otherwise than templates know it would be passed over, or not be learned.
            if isinstance(role, str) and (usual := _ROLES.get(role.lower())) not in (None, "tool"):
                message = message | {"role": usual}
            return message | {"content": content.lstrip(BOM)} if isinstance(content, str) else dict(message)
        role, value = message["from"], message.get("value", message.get("content"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            known = ", ".join(_ROLES)
            raise BadItem(f'a message is from {shown(role)}, but "from" must be one of {known}', "unknown speaker")
        rest = {key: each for key, each in message.items() if key not in ("from", "value", "content")}
        if role.lower() == "function_call":
            return {"role": ASSISTANT, "content": "", "tool_calls": _calls(value), **rest}
        value = value.lstrip(BOM) if isinstance(value, str) else value
        return {"role": _ROLES[role.lower()], "content": value, **rest}

    def unmark(self, messages: list[dict[str, Any]]) -> frozenset[int]:
        """Removes the marks from messages, and returns the positions of the answers that are not to be learned."""
        whole, read = marks.of_a_line(self._all, _ASKERS)
        self._read |= read
        masked = set()
        for i, message in enumerate(messages):
            if message.get("train_detail"):
                raise BadItem(f"message {i}: train_detail: {_NOT_READ['train_detail']}", "unread keys")
            learned = marks.of_a_message(message, f"message {i}")
            if message.get("role") == ASSISTANT:
                if learned is False or (whole is False and learned is None):
                    masked.add(i)
            elif learned:
                self._told.append(f"marks to learn a message of the role {message.get('role')!s:.20}")
        return frozenset(masked)

    def variables(self) -> dict[str, Any]:
        """Returns the further variables of the chat template."""
        found = self._record.get("chat_template_kwargs", {})
        if not isinstance(found, dict):
            raise BadItem(f'"chat_template_kwargs" must be an object, not {shown(found)}', "odd template variables")
        found = {key: value for key, value in found.items() if value not in (None, "", [], {})}
        found |= {key: self._all[key] for key in _VARIABLES if key in self._record}
        self._read |= {"chat_template_kwargs", *_VARIABLES}
        for key in ("tools", "documents"):
            value = found.get(key)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except (ValueError, RecursionError):
                    pass
                found[key] = value
            if value in ([], None):
                found.pop(key, None)
            elif not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
                raise BadItem(f'"{key}" must be a list of objects, not {shown(value)}', f'"{key}" of no known form')
        return found

    def unread(self, group_key: str | None) -> list[str]:
        """Returns the keys that have no effect, and the marks that have none."""
        return [*self._told, *(key for key in self._record if key not in self._read and key != group_key)]

    def _refuse(self, reasons: Mapping[str, str]) -> None:
        for key, reason in reasons.items():
            if key in self._record:
                kind = "preference data" if "preference" in reason else f'"{key}" is not supported'
                raise BadItem(f'the line has the key "{key}": {reason}', kind)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(each, str) for each in value)


def _names_a_speaker(text: str) -> bool:
    return ":" in text and text.split(":")[0].strip("#*<[|( ").lower() in _ROLES


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _not_learned(message: dict[str, Any]) -> dict[str, Any]:
    """Marks an answer that is part of a question, unless it has marks of its own."""
    marked = message.get("role") != ASSISTANT or any(message.get(key) is not None for key in marks.MARKS)
    return message if marked else message | {"train": False}


def _calls(value: Any) -> list[dict[str, Any]]:
    """Returns the tool calls in the text of a message from "function_call"."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadItem(f'a message from "function_call" must be a call as JSON, but is {shown(value)}', "odd tool call")
    return [{"type": "function", "function": call} for call in calls]
