"""The messages of a conversation, and the files that they are kept in."""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llada_jax.config import UserError
from llada_jax.formats.folders import write_text
from llada_jax.text.chat_template import check_messages

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}, as in training data
TYPED = 100  # characters of what a user typed that an error repeats


def check_dialogue(messages: Any) -> list[Message]:
    """The messages of a conversation: a system message or none, then the user's and the assistant's in turn.

    Raises UserError: something else.
    """
    if messages != [] and messages != ():
        check_messages(messages)
    found = [dict(message) for message in messages]
    turns = found[1:] if found and found[0]["role"] == "system" else found
    for i, message in enumerate(turns):
        if message["role"] != (wanted := ("user", "assistant")[i % 2]):
            place = i + len(found) - len(turns)
            raise UserError(f"message {place} is of role {message['role']!r:.100} where one of {wanted!r} must stand")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError("a message holds half a character (a lone surrogate)") from error
    return found


def asked(messages: Sequence[Message]) -> list[Message]:
    """The messages up to the user's last; none if there is no such."""
    count = max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    return list(messages[:count])


def shortened(typed: object) -> str:
    """What a user typed, for an error's one line: of a long text the beginning and the end."""
    text = str(typed)
    return text if len(text) <= TYPED else f"{text[: TYPED // 2 - 2]}...{text[1 - TYPED // 2 :]}"


def named_file(text: str) -> Path:
    """The file that a user names, there or not, ~ being a home. UserError: a folder, or no file can be there."""
    try:
        path = Path(text).expanduser()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError) as error:  # too long a name or no way to it; no such user; a NUL
        raise UserError(f"{shortened(text)} cannot be a file: {_reason(error)}") from error
    if is_folder:
        raise UserError(f"{shortened(path)} is a folder: name a file")
    return path


def read_record(path: Path) -> dict[str, Any]:
    """The conversation in a file: {"messages": [...]}, checked, and whatever other keys are there.

    Raises UserError: it says in one line what is wrong with the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{shortened(path)} holds half a character (a lone surrogate)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shortened(path)} cannot be read: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shortened(path)} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        wanted = '{"messages": [{"role": ..., "content": ...}, ...]}'
        raise UserError(f"{shortened(path)} is no conversation: that is {wanted}")
    try:
        return record | {"messages": check_dialogue(record["messages"])}
    except UserError as error:
        raise UserError(f"{shortened(path)}: {error}") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a conversation, whole or not at all, on one line: several such files are a JSONL file to train on.

    Raises UserError: it cannot be written, or would replace a file that is no conversation.
    """
    if os.path.lexists(path):
        try:
            read_record(path)
        except UserError as error:
            raise UserError(f"{shortened(path)} is there already and is no conversation: name another file") from error
    try:
        write_text(path, json.dumps(record, ensure_ascii=False) + "\n")
    except (OSError, UserError) as error:
        raise UserError(f"{shortened(path)} cannot be written: {_reason(error.__cause__ or error)}") from error


def _reason(error: BaseException) -> str:
    """Why it failed, without the path and the number that an OSError repeats."""
    return getattr(error, "strerror", None) or str(error)
