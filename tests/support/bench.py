"""Shared by the tests of evaluations: a tiny model with a tokenizer, and small tasks with their data on disk."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

from paths import PARITY

# These are set before datasets is imported, so that it uses no network and leaves no files in the home folder.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="llada_jax_hf_")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from llada_jax.text.train_tokenizer import train_tokenizer

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
WORDS = "one two three four five six seven eight nine ten".split()


def write_model(folder: Path) -> Path:
    """Writes a published folder with random weights of three layers and a tokenizer of 400 tokens."""
    shutil.copytree(PARITY / "gqa", folder)
    train_tokenizer([Path(__file__).read_text(), " ".join(WORDS)], 400, folder)
    return folder


DATA = {
    "choice": [
        {"question": f"After {a} comes", "choices": (wrong[:at] + [b] + wrong[at:]), "gold": at}
        for a, b, at in zip(WORDS, WORDS[1:], (0, 1, 2) * 3, strict=False)
        for wrong in [["nothing at all", a]]
    ],
    "cloze": [{"text": f"{a} and then {b}"} for a, b in zip(WORDS, WORDS[1:], strict=False)],
    "sums": [{"question": f"What is {i} + {i}?", "answer": f"It is easy. #### {2 * i}"} for i in range(9)],
    "pages": [
        {"page": f"{a} is a number, {b} is another. " * n}
        for a, b, n in zip(WORDS, WORDS[1:], range(1, 9), strict=False)
    ],
}
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "fewshot_split": "test",
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "sums": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "fewshot_split": "test",
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": "#### (-?[0-9]+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
}


def write_tasks(folder: Path) -> Path:
    """Writes a folder for --include_path, with a YAML file (JSON is YAML) and a data file for each task."""
    folder.mkdir(exist_ok=True)
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in DATA[name]))
        settings = {"task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
        settings |= {"dataset_kwargs": {"data_files": {"test": str(data)}}, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(settings))
    return folder
