"""Tasks of lm_eval with their data from files on this machine, for want of a network.

Prompts, answer filters and metrics are those of the installed lm_eval: arc_easy_local, lambada_local and gsm8k_local
measure what arc_easy, lambada_openai and gsm8k do on the same documents. Only the examples in front of a question are
others: they come from the test set (never the question itself), as there is no other file.

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
import lm_eval.tasks
import yaml
from lm_eval.api.task import ConfigurableTask

_INSTRUCTION = re.compile(
    r".*?question: (?P<question>.*?)\n\n(?P<answers>Answer1: .*?)\n\nAnswer format: .*", re.DOTALL
)


class _Stock(ConfigurableTask):
    """A task of lm_eval with other data."""

    stock: str  # its file in lm_eval
    data: str  # the file with its documents, in LLADA_EVAL_DATA

    def __init__(self, config: dict[str, Any]):
        stock = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / self.stock).read_text(encoding="utf-8"))
        own = {"task": config["task"], "custom_dataset": self.dataset_on_file, "tag": None}
        splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
        super().__init__(config=stock | own | splits)

    def dataset_on_file(self, **_) -> dict[str, datasets.Dataset]:
        """The documents, in the fields that the stock task's own have."""
        return {"test": datasets.Dataset.from_list([self.document(record) for record in _records(self.data)])}

    def document(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record of the file as a document."""
        return record


class ArcEasy(_Stock):
    """A list of {"instruction", "answer"}, the choices within the instruction's text."""

    stock, data = "arc/arc_easy.yaml", "arc_easy_test.json"

    def document(self, record: dict[str, Any]) -> dict[str, Any]:
        """Choices with the labels 1, 2, ..."""
        found = _INSTRUCTION.fullmatch(record["instruction"])
        if found is None:
            raise ValueError(f"not as expected: {record['instruction']!r}")
        texts = [choice.strip() for choice in re.split(r"Answer\d: ", found[2])[1:]]
        labels = [str(i + 1) for i in range(len(texts))]
        answer = record["answer"].removeprefix("answer")
        return {"question": found[1], "choices": {"text": texts, "label": labels}, "answerKey": answer}


class Lambada(_Stock):
    """Lines {"text"}."""

    stock, data = "lambada/lambada_openai.yaml", "lambada_test.jsonl"


class Gsm8k(_Stock):
    """Lines {"question", "answer"}."""

    stock, data = "gsm8k/gsm8k.yaml", "gsm8k_test.jsonl"


def text(**_) -> dict[str, datasets.Dataset]:
    """The file that LLADA_EVAL_TEXT names: lines {"text"}."""
    if "LLADA_EVAL_TEXT" not in os.environ:
        raise ValueError('set LLADA_EVAL_TEXT to a .jsonl file with lines {"text"}')
    return {"test": datasets.Dataset.from_list(_lines(Path(os.environ["LLADA_EVAL_TEXT"])))}


def _records(name: str) -> list[dict[str, Any]]:
    if "LLADA_EVAL_DATA" not in os.environ:
        raise ValueError(f"set LLADA_EVAL_DATA to the folder that has {name}")
    path = Path(os.environ["LLADA_EVAL_DATA"]) / name
    return _lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    # Not splitlines: texts may hold other characters that it takes for the end of a line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
