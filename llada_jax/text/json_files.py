"""Reads texts and JSON that people bring: files of a model's folder, prompts, couplets, histories.

A byte order mark at the beginning of a file is no content. Whatever is wrong with a file is said in one line.
"""

import codecs
import json
from typing import Any

from llada_jax.config import UserError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SURROGATE = "half a character (a lone surrogate)"


def read_text(content: bytes, name: str, kind: str = "text") -> str:
    """Returns the text of a file in UTF-8, without a byte order mark.

    Args:
      content: The content of the file.
      name: The name of the file in error messages.
      kind: What the file should be, for error messages.

    Raises:
      UserError: If the file is not UTF-8. The message names the file and the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith(_UTF_16):
            raise UserError(f"{name} is UTF-16: save it as UTF-8") from error
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} is not {kind} in UTF-8: line {line}: {error.reason}") from error


def parse(text: str, name: str, finite: bool = False) -> Any:
    """Returns the value of a JSON text.

    Args:
      text: The JSON, without a byte order mark.
      name: What the text is, for error messages: a file, or a file and a line.
      finite: Whether to refuse NaN and infinite numbers, which Python reads and writes but JSON does not have.

    Raises:
      UserError: If the text is not JSON, is nested too deeply, or contains a lone surrogate.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=not finite).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} contains {SURROGATE}: remove it") from error
    except RecursionError as error:
        raise UserError(f"{name} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    return value


def read_object(content: bytes, name: str) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises UserError, which names the file, if the file holds anything else."""
    value = parse(read_text(content, name, "JSON"), name)
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object")
    return value


def check_unicode(text: str, name: str) -> None:
    """Checks that a text is Unicode that UTF-8 can express.

    Python keeps bytes of the command line that are not UTF-8 as lone surrogates, which no tokenizer takes.

    Args:
      text: The text.
      name: What the text is, for the error message.

    Raises:
      UserError: If the text contains a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text: it contains {SURROGATE} or a byte of another encoding at character "
            f"{error.start + 1}"
        ) from error


def short(value: Any) -> str:
    """Returns a value of a JSON file as JSON for an error message, cut to 100 characters."""
    text = json.dumps(value)
    return text if len(text) < 100 else f"{text[:97]}..."
