"""Reads and writes files of prompts and completions: JSONL with one object with a "prompt" per line."""

import json
from pathlib import Path
from typing import Any

from llada_jax.cli.outputs import write_text
from llada_jax.config import UserError
from llada_jax.text.json_files import parse, read_text


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSONL file, each of which has a "prompt".

    Raises:
      UserError: If the file cannot be read, or if a line is not an object with a "prompt", or is one that could not be
        written again. The message names the line.
    """
    try:
        lines = read_text(path.read_bytes(), f"--prompts={path}").split("\n")
    except OSError as error:
        raise UserError(f"--prompts={path}: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = parse(line, f"{path}:{number}", finite=True)
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{path}:{number} must be an object with a text "prompt"')
        records.append(record)
    return records


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes objects as the lines of a JSONL file, whole or not at all."""
    write_text(path, "".join(map(_line, records)))


def _line(record: dict[str, Any]) -> str:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape of JSON can represent
        line = json.dumps(record, allow_nan=False) + "\n"
    return line
