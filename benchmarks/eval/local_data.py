"""Tasks of lm_eval that read their data from files on this machine and so need no network.

Prompts, answer filters and metrics are those of the installed lm_eval: arc_easy_local, lambada_local and gsm8k_local
measure the same as arc_easy, lambada_openai and gsm8k on the same documents. Only the few-shot examples in front of a
question differ: they come from the test set, because there is no other file, but never include the question itself.

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
    """A task of lm_eval that reads its documents from a file."""

    stock: str  # file of the original task in lm_eval
    data: str  # file with the documents, in the folder LLADA_EVAL_DATA

    def __init__(self, config: dict[str, Any]):
        stock = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / self.stock).read_text(encoding="utf-8"))
        own = {"task": config["task"], "custom_dataset": self.dataset_on_file, "tag": None}
        splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
        super().__init__(config=stock | own | splits)

    def dataset_on_file(self, **_) -> dict[str, datasets.Dataset]:
        """Returns the documents, with the same fields as the documents of the original task."""
        return {"test": datasets.Dataset.from_list([self.document(record) for record in _records(self.data)])}

    def document(self, record: dict[str, Any]) -> dict[str, Any]:
        """Converts a record of the file to a document."""
        return record


class ArcEasy(_Stock):
    """arc_easy, from a JSON list of {"instruction", "answer"}; the text of the instruction contains the choices."""

    stock, data = "arc/arc_easy.yaml", "arc_easy_test.json"

    def document(self, record: dict[str, Any]) -> dict[str, Any]:
        """Converts a record to a document whose choices have the labels 1, 2, ..."""
        found = _INSTRUCTION.fullmatch(record["instruction"])
        if found is None:
            raise ValueError(
                f'{self.data}: an instruction must look like "question: ... Answer1: ... Answer format: ...", not '
                f"{record['instruction']!r}"
            )
        texts = [choice.strip() for choice in re.split(r"Answer\d: ", found[2])[1:]]
        labels = [str(i + 1) for i in range(len(texts))]
        answer = record["answer"].removeprefix("answer")
        return {"question": found[1], "choices": {"text": texts, "label": labels}, "answerKey": answer}


class Lambada(_Stock):
    """lambada_openai, from a file with one JSON object {"text"} per line."""

    stock, data = "lambada/lambada_openai.yaml", "lambada_test.jsonl"


class Gsm8k(_Stock):
    """gsm8k, from a file with one JSON object {"question", "answer"} per line."""

    stock, data = "gsm8k/gsm8k.yaml", "gsm8k_test.jsonl"


def text(**_) -> dict[str, datasets.Dataset]:
    """Returns the texts of the file that LLADA_EVAL_TEXT names, which has one JSON object {"text"} per line."""
    if "LLADA_EVAL_TEXT" not in os.environ:
        raise ValueError('set LLADA_EVAL_TEXT to a .jsonl file with one object {"text"} per line')
    return {"test": datasets.Dataset.from_list(_lines(Path(os.environ["LLADA_EVAL_TEXT"]).expanduser()))}


def _records(name: str) -> list[dict[str, Any]]:
    if "LLADA_EVAL_DATA" not in os.environ:
        raise ValueError(f"set LLADA_EVAL_DATA to the folder that contains {name}")
    path = Path(os.environ["LLADA_EVAL_DATA"]).expanduser() / name
    return _lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    # Do not use splitlines, because it also splits at other characters, which texts may contain.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
