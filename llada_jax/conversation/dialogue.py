"""The messages of a conversation, and the files in which conversations are saved."""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llada_jax.cli.outputs import write_text
from llada_jax.config import UserError
from llada_jax.text.chat_template import check_messages

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}, as in training data
TYPED = 100  # an error message repeats at most this many characters of what a user typed


def check_dialogue(messages: Any) -> list[Message]:
    """Returns a copy of the messages of a conversation after checking them.

    A conversation may begin with one system message. After it, the user and the assistant take turns, and the user
    begins. An empty list is a conversation too.

    Raises:
      UserError: If the messages are not a conversation of this form.
    """
    if messages != [] and messages != ():
        check_messages(messages)
    found = [dict(message) for message in messages]
    turns = found[1:] if found and found[0]["role"] == "system" else found
    for i, message in enumerate(turns):
        if message["role"] != (wanted := ("user", "assistant")[i % 2]):
            place = i + len(found) - len(turns)
            raise UserError(f"message {place} has the role {message['role']!r:.100}, but must have the role {wanted!r}")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError("a message contains half a character (a lone surrogate): remove it") from error
    return found


def asked(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages up to and including the user's last one, or an empty list if the user has written none."""
    count = max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    return list(messages[:count])


def shortened(typed: object) -> str:
    """Returns what a user typed in a form for a one-line error: a long text is cut to its beginning and its end."""
    text = str(typed)
    return text if len(text) <= TYPED else f"{text[: TYPED // 2 - 2]}...{text[1 - TYPED // 2 :]}"


def named_file(text: str) -> Path:
    """Returns the path of a file that a user names. The file need not exist, and ~ stands for a home folder.

    Raises:
      UserError: If the path is a folder, or if no file can exist there.
    """
    try:
        path = Path(text).expanduser()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError) as error:  # e.g. the name is too long, or ~ names no user
        raise UserError(f"{shortened(text)} cannot be a file: {_reason(error)}") from error
    if is_folder:
        raise UserError(f"{shortened(path)} is a folder: name a file")
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Reads a conversation from a file and checks it.

    Returns:
      The object in the file: {"messages": [...]} with any other keys that the file has.

    Raises:
      UserError: If the file cannot be read or is not a conversation. The message is one line and names the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{shortened(path)} contains half a character (a lone surrogate): remove it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shortened(path)} cannot be read: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shortened(path)} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        wanted = '{"messages": [{"role": ..., "content": ...}, ...]}'
        raise UserError(f"{shortened(path)} is not a conversation, which has the form {wanted}")
    try:
        return record | {"messages": check_dialogue(record["messages"])}
    except UserError as error:
        raise UserError(f"{shortened(path)}: {error}") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a conversation to a file, completely or not at all.

    The conversation takes one line, so several of these files put together are a JSONL file to train on.

    Raises:
      UserError: If the file cannot be written, or if it exists and is not a conversation.
    """
    if os.path.lexists(path):
        try:
            read_record(path)
        except UserError as error:
            raise UserError(f"{shortened(path)} exists and is not a conversation: name another file") from error
    try:
        write_text(path, json.dumps(record, ensure_ascii=False) + "\n")
    except (OSError, UserError) as error:
        raise UserError(f"{shortened(path)} cannot be written: {_reason(error.__cause__ or error)}") from error


def _reason(error: BaseException) -> str:
    """Returns the reason of an error, without the path and the error number that an OSError adds."""
    return getattr(error, "strerror", None) or str(error)
