"""What messages may hold, and in which form a chat template takes them.

Data sets write the same message in several forms: a content as a text or as a list of parts, no content beside a tool
call, the arguments of a tool call as JSON or as an object. A template takes some of these forms. Others make it fail,
or write what no model should read, such as "None" or a Python dict.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llada_jax.config import UserError

Messages = Sequence[Mapping[str, Any]]

# Keys of a message that change what the model sees or learns. If a template passes over them, the chat is refused.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of the thought before an answer; a template has one
MEANINGFUL = (*THOUGHTS, "thought", "tool_calls", "function_call", "refusal")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PART_TYPES = ("text", "input_text", "output_text")
_DEEPEST = 50  # levels of nesting in a value of a message


def check_chat(messages: Any, variables: Mapping[str, Any] | None = None) -> None:
    """Checks that these are messages that a template may take.

    Each must have a "role" that is a string, and a "content" that is a string or a list of parts with text. The content
    may be null or absent if the message has tool calls or a thought.

    Args:
      messages: The messages.
      variables: The template's further variables, such as the tools.

    Raises:
      UserError: If they are not, or if a message or a variable contains a value that JSON cannot hold.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError('a chat is a list of messages, each of the form {"role": "user", "content": "..."}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f'message {i} of the chat must have the form {{"role": ..., "content": ...}}')
        if (kind := odd_kind(dict(message))) is not None:
            raise UserError(f"message {i} of the chat contains a {kind}: use only values that JSON can hold")
        content = message.get("content")
        if isinstance(content, list):
            _check_parts(content, i)
        elif content is None and any(message.get(key) for key in MEANINGFUL):
            content = ""
        for key, value in (("role", message.get("role")), ("content", content)):
            if not isinstance(value, str) and not (key == "content" and isinstance(value, list)):
                raise UserError(f'message {i} of the chat needs a "{key}" that is a string, not {value!r:.100}')
        for key in _MEDIA:
            if message.get(key):
                raise UserError(f'message {i} of the chat has the key "{key}", but only text can be read')
        calls = message.get("tool_calls")
        if calls and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
            raise UserError(f'message {i} of the chat needs "tool_calls" that are a list of objects')
    for name, value in (variables or {}).items():
        if (kind := odd_kind(value)) is not None:
            raise UserError(f'"{name}" of the chat contains a {kind}: use only values that JSON can hold')


def _check_parts(parts: list[Any], i: int) -> None:
    for part in parts:
        if not isinstance(part, Mapping):
            raise UserError(f'message {i} of the chat has a content with {part!r:.60}, not {{"type": "text", ...}}')
        if (kind := part.get("type", "text")) not in _PART_TYPES:
            raise UserError(f'message {i} of the chat has a part of the type {kind!r:.60}, but only "text" can be read')
        if not isinstance(part.get("text"), str):
            raise UserError(f'message {i} of the chat has a part whose "text" is no string')


def odd_kind(value: Any, depth: int = 0) -> str | None:
    """Returns the name of something in a value that JSON does not have, or None if there is nothing."""
    if depth > _DEEPEST:
        return f"value that is nested more than {_DEEPEST} levels deep"
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            return "key that is not a string"
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, (odd_kind(each, depth + 1) for each in value)), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "number that is not finite"
    return None if value is None or isinstance(value, str | int | float) else type(value).__name__


def as_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message whose content is a list of parts, for templates that take nothing else."""
    return {**message, "content": [{"type": "text", "text": text_of(message)}]}


def with_thought(message: Mapping[str, Any], names: Callable[[str], bool]) -> dict[str, Any]:
    """Returns a message whose thought has the name that the template reads, as well as its own.

    Args:
      message: The message.
      names: Whether the template names a key.
    """
    thought = next((message[key] for key in THOUGHTS if message.get(key) is not None), None)
    return {**({key: thought for key in THOUGHTS if names(key)} if thought is not None else {}), **message}


def text_of(message: Mapping[str, Any]) -> str:
    """Returns the text of a message's content; the texts of several parts follow one another without a separator."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def fitted(messages: Messages, render: Callable[[Messages], str]) -> list[dict[str, Any]]:
    """Returns the messages in the first form that the template takes.

    The forms are tried in this order: as they are; with a text in place of a list of parts; with an empty text in place
    of no content; with the arguments of tool calls as objects in place of JSON, or the other way round; with several of
    these changes.

    Args:
      messages: The messages, which `check_chat` has checked.
      render: The function that turns messages into text.

    Raises:
      UserError: If the template takes none of the forms. It is the error of the first form, if that fails.
    """
    if all(isinstance(each.get("content"), str) and not each.get("tool_calls") for each in messages):
        return [dict(message) for message in messages]
    first: UserError | None = None
    forms = list(_forms(messages))
    if len(forms) == 1:
        return forms[0]
    rendered = []
    for form in forms:
        try:
            text = render(form)
        except UserError as error:
            first = first or error
            continue
        if not _raw_in(text, form) and not _nothing_in(text, form, render):
            if _all_parts_in(text, form):
                return form
            rendered.append(form)
    if rendered:  # the template leaves a text out, whatever its form is
        return rendered[-1]
    raise first or UserError("the chat template cannot write a message without text, or the arguments of a tool call")


def _forms(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """Yields the messages as they are, and then in all other forms that differ from those before."""
    seen: list[list[dict[str, Any]]] = []
    for arguments, empty, joined in itertools.product((False, True), repeat=3):
        form = [_form(message, joined, empty, arguments) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def _form(message: Mapping[str, Any], joined: bool, empty: bool, arguments: bool) -> dict[str, Any]:
    result = dict(message)
    if joined and isinstance(result.get("content"), list):
        result["content"] = text_of(message)
    if empty and result.get("content") is None:
        result["content"] = ""
    if arguments and result.get("tool_calls"):
        result["tool_calls"] = [_other_arguments(call) for call in result["tool_calls"]]
    return result


def _other_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tool call whose arguments are an object if they were JSON, and the other way round."""
    if isinstance(inner := call.get("function"), Mapping):
        return {**call, "function": _other_arguments(inner)}
    arguments = call.get("arguments")
    if isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            return dict(call)
        return {**call, "arguments": found} if isinstance(found, dict) and odd_kind(found) is None else dict(call)
    return dict(call)


def _nothing_in(text: str, form: Messages, render: Callable[[Messages], str]) -> bool:
    """Returns whether a rendered text shows a missing content as "None" or "null"."""
    if all(message.get("content") is not None for message in form):
        return False
    try:
        other = render([_form(message, joined=False, empty=True, arguments=False) for message in form])
    except UserError:
        return False
    return any(text.count(word) > other.count(word) for word in ("None", "null"))


def _raw_in(text: str, form: Messages) -> bool:
    """Returns whether a rendered text shows a list of parts, a Python dict, or JSON as a string in JSON."""
    for content in (message.get("content") for message in form):
        if isinstance(content, list) and content:
            if str(content) in text or json.dumps(content, ensure_ascii=False) in text:
                return True
    for message in form:
        for call in message.get("tool_calls") or []:
            inner = call["function"] if isinstance(call.get("function"), Mapping) else call
            arguments = inner.get("arguments")
            if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
                return True
            as_python = str(arguments) if isinstance(arguments, Mapping) else ""
            if as_python in text and as_python not in ("", json.dumps(arguments, ensure_ascii=False)):
                return True
    return False


def _all_parts_in(text: str, form: Messages) -> bool:
    parts = [part for m in form if isinstance(m.get("content"), list) for part in m["content"]]
    return all(part["text"].strip() in text for part in parts)


def strings_of(value: Any) -> list[str]:
    """Returns all strings in a value, including keys."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, each in value.items() for text in (*strings_of(key), *strings_of(each))]
    return [text for each in value for text in strings_of(each)] if isinstance(value, list | tuple) else []


def passed_over(
    names: Callable[[str], bool],
    takes: Callable[[str], bool],
    render: Callable[[Messages, Mapping[str, Any]], str],
    messages: Messages,
    variables: Mapping[str, Any],
) -> list[str]:
    """Returns the keys of messages, and the variables, that the template does not read.

    Args:
      names: Whether the template names a key.
      takes: Whether the template names a variable.
      render: The function that turns messages and variables into text.
      messages: The messages in the form that the template takes.
      variables: The template's further variables.
    """
    keys = {key for message in messages for key, value in message.items() if value not in (None, "", [], {})}
    found = []
    for key in sorted(keys - {"role", "content"}):
        same = THOUGHTS if key in THOUGHTS else (key,)
        without = [{name: value for name, value in message.items() if name not in same} for message in messages]
        if not any(map(names, same)) and not _differ(lambda m: render(m, variables), messages, without):
            found.append(key)
    for key in variables:
        without = {name: value for name, value in variables.items() if name != key}
        written = key in ("tools", "documents")  # these must be written, and not only be named
        if not takes(key) or (written and not _differ(lambda v: render(messages, v), variables, without)):
            found.append(key)
    return found


def unwritten_roles(render: Callable[[Messages], str], messages: Messages) -> list[str]:
    """Returns the roles, other than user and assistant, of messages that the template leaves out.

    Many templates pass over messages of the system or of tools without an error. Each such message gets a mark at its
    end, so that a short text that also occurs elsewhere is not mistaken for it.

    Args:
      render: The function that turns messages into text.
      messages: The messages in the form that the template takes.
    """
    marks = {
        i: f"[written {i}]"
        for i, message in enumerate(messages)
        if message["role"] not in ("user", "assistant") and text_of(message).strip()
    }
    if not marks:
        return []
    try:
        text = render([_with_mark(message, marks.get(i)) for i, message in enumerate(messages)])
    except UserError:  # such a template reads the text
        return []
    return list(dict.fromkeys(messages[i]["role"] for i, mark in marks.items() if mark not in text))


def _with_mark(message: Mapping[str, Any], mark: str | None) -> Mapping[str, Any]:
    if mark is None:
        return message
    content = message["content"]
    longer = [*content, {"type": "text", "text": mark}] if isinstance(content, list) else f"{content} {mark}"
    return {**message, "content": longer}


def _differ(render: Callable[[Any], str], one: Any, other: Any) -> bool:
    """Returns whether two chats are rendered differently. A template that fails without something reads it."""
    text = render(one)
    try:
        return render(other) != text
    except UserError:
        return True


_OPENED = re.compile(r"<(\w+)>(\s*)\Z")


def after_an_opened_thought(prompt: str, text: str, back: Mapping[int, str], answer: Mapping[str, Any]) -> str | None:
    """Returns what a model writes after a prompt that opens a thought, if the template leaves the thought out later.

    Such a prompt ends in "<think>". The template writes only the text behind "</think>" of an answer, because a later
    prompt does not repeat thoughts. What the model writes is the thought of this answer, its end, and the text.

    Args:
      prompt: The prompt.
      text: The prompt's messages and the answer, as the template writes them, with marks (see `render_marked`).
      back: The table that turns marks back into characters.
      answer: The message of the answer.

    Returns:
      The text with marks, or None if it cannot be told from the message and the template.
    """
    opened = _OPENED.search(prompt)
    plain = text.translate(back)
    if not opened or not plain.startswith(stem := prompt[: opened.start()]):
        return None
    opening, closing, content = f"<{opened[1]}>", f"</{opened[1]}>", text_of(answer).lstrip()
    if content.count(closing) != 1:
        return None
    thought, final = content.removeprefix(opening).split(closing)
    if opening in thought:
        return None
    written = plain[len(stem) :]
    place = written.rfind(final.strip()) if final.strip() else -1
    before = written[: max(place, 0)].strip().removeprefix(opening).removesuffix(closing).strip()
    if place < 0 or before not in ("", thought.strip()):
        return None
    end = text[len(stem) + place + len(final.strip()) :]
    if not end.strip():
        return None
    marks = {ord(character): chr(mark) for mark, character in back.items()}
    thought = thought.lstrip() if opened[2] else thought
    return thought.translate(marks) + closing + final.rstrip().translate(marks) + end


def dropped_thought(answer: Mapping[str, Any], written: str) -> bool:
    """Returns whether an answer has a thought that the template does not write.

    Args:
      answer: The message of the answer.
      written: What the template writes for it.
    """
    content = text_of(answer)
    texts = [answer[key] for key in THOUGHTS if isinstance(answer.get(key), str)]
    texts += [text for _, text in re.findall(r"<(think|thinking|thought|reasoning)>(.*?)</\1>", content, re.DOTALL)]
    if "</think>" in content and "<think>" not in content:
        texts.append(content.split("</think>")[0])
    return any(text.strip() not in written for text in texts)
