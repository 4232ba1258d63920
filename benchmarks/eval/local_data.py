"""Data of the tasks in this folder, from files on this machine.

LLADA_EVAL_DATA=FOLDER python -m llada_jax.evaluate --model=DIR --include_path=benchmarks/eval \\
    --tasks=arc_easy_local,lambada_local,gsm8k_local --output=FILE

LLADA_EVAL_TEXT=FILE.jsonl python -m llada_jax.evaluate --model=DIR --include_path=benchmarks/eval \\
    --tasks=text_local --output=FILE
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import datasets

_INSTRUCTION = re.compile(
    r".*?question: (?P<question>.*?)\n\n(?P<answers>Answer1: .*?)\n\nAnswer format: .*", re.DOTALL
)


def arc_easy(**_) -> dict[str, datasets.Dataset]:
    """arc_easy_test.json: a list of {"instruction", "answer"}, the choices within the instruction's text.

    Gives question, choices (texts), gold (index).
    """
    records = json.loads(_file("arc_easy_test.json").read_text(encoding="utf-8"))
    return {"test": datasets.Dataset.from_list([_parsed(record) for record in records])}


def lambada(**_) -> dict[str, datasets.Dataset]:
    """lambada_test.jsonl: lines {"text"}."""
    return {"test": datasets.Dataset.from_list(_lines(_file("lambada_test.jsonl")))}


def gsm8k(**_) -> dict[str, datasets.Dataset]:
    """gsm8k_test.jsonl: lines {"question", "answer"}."""
    return {"test": datasets.Dataset.from_list(_lines(_file("gsm8k_test.jsonl")))}


def text(**_) -> dict[str, datasets.Dataset]:
    """The file that LLADA_EVAL_TEXT names: lines {"text"}."""
    if "LLADA_EVAL_TEXT" not in os.environ:
        raise ValueError('set LLADA_EVAL_TEXT to a .jsonl file with lines {"text"}')
    return {"test": datasets.Dataset.from_list(_lines(Path(os.environ["LLADA_EVAL_TEXT"])))}


def _file(name: str) -> Path:
    if "LLADA_EVAL_DATA" not in os.environ:
        raise ValueError(f"set LLADA_EVAL_DATA to the folder that has {name}")
    return Path(os.environ["LLADA_EVAL_DATA"]) / name


def _lines(path: Path) -> list[dict[str, Any]]:
    # Not splitlines: texts may hold other characters that it takes for the end of a line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _parsed(record: dict[str, str]) -> dict[str, Any]:
    found = _INSTRUCTION.fullmatch(record["instruction"])
    if found is None:
        raise ValueError(f"not as expected: {record['instruction']!r}")
    choices = [choice.strip() for choice in re.split(r"Answer\d: ", found[2])[1:]]
    return {"question": found[1], "choices": choices, "gold": int(record["answer"].removeprefix("answer")) - 1}
