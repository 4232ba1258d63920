"""Writes problems whose answers can be checked: python benchmarks/problems.py --output=DIR

The problems are additions and sortings, each with a line of working before "=" and the result behind it:

    add 0 4 7 3 + 6 8 5 9 =                  3 9 1 2 7 5 1 3 4 8 1 3 0 6 0 7 = 0 7 3 3 2
    sort 4 7 , 1 2 , 8 5 , 0 3 , 6 1 =       3 2 5 1 4 = 0 3 , 1 2 , 4 7 , 6 1 , 8 5

The working of an addition goes through the columns from the right: both digits, and their sum with the carry from
before, in two digits. The working of a sorting is the rank of each number. Digits are separated by spaces, so that a
trained tokenizer, whose pieces do not cross spaces, makes each of them one token.

The folder gets train.jsonl.gz and held_out.jsonl, in the form that `llada_jax.prepare --chat` reads, and text.jsonl
with a part of the training problems, on which `llada_jax.prepare` trains the tokenizer. chat_template.jinja writes a
problem and its answer with nothing between them: put it into the folder of the tokenizer. No held-out problem occurs in
train.jsonl.gz, nor one that only has the same numbers in another order. The same seed gives the same files.
"""

import argparse
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

from llada_jax.cli.paths import expanded

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}{{ message['content'] }}"
    "{% endfor %}"
)


def addition(rng: random.Random, digits: int = 4) -> tuple[str, str]:
    """Returns an addition of two numbers of `digits` digits, the first of which may be 0, and its answer."""
    a, b = (rng.randrange(10**digits) for _ in range(2))
    columns, carry = [], 0
    for place in range(digits):
        x, y = (number // 10**place % 10 for number in (a, b))
        columns.append(f"{x}{y}{x + y + carry:02}")
        carry = (x + y + carry) // 10
    prompt = f"add {_spaced(f'{a:0{digits}}')} + {_spaced(f'{b:0{digits}}')} ="
    return prompt, f"{_spaced(''.join(columns))} = {_spaced(f'{a + b:0{digits + 1}}')}"


def sorting(rng: random.Random, count: int = 5) -> tuple[str, str]:
    """Returns `count` different numbers of two digits to be sorted, and their order with the rank of each."""
    numbers = rng.sample(range(100), count)
    ordered = sorted(numbers)
    ranks = "".join(str(ordered.index(number) + 1) for number in numbers)
    return f"sort {_list(numbers)} =", f"{_spaced(ranks)} = {_list(ordered)}"


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"add": addition, "sort": sorting}


def _spaced(digits: str) -> str:
    return " ".join(digits)


def _list(numbers: list[int]) -> str:
    return " , ".join(_spaced(f"{number:02}") for number in numbers)


def result(answer: str) -> str:
    """Returns what an answer says behind its working: the part behind the first "="."""
    return answer.partition("=")[2].strip()


def same(prompt: str) -> str:
    """Returns a text that is the same for problems that have the same numbers in any order."""
    task, _, rest = prompt.removesuffix(" =").partition(" ")
    return f"{task} {sorted(rest.split(' + ' if task == 'add' else ' , '))}"


def _path(text: str) -> Path:
    return Path(expanded(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=_path, required=True)
    for name, value in {"count": 120_000, "held_out": 500, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)

    tests: dict[str, tuple[str, str, str]] = {}
    for task, make in TASKS.items():
        while sum(each[0] == task for each in tests.values()) < args.held_out:
            prompt, answer = make(rng)
            tests.setdefault(same(prompt), (task, prompt, answer))
    with open(args.output / "held_out.jsonl", "w", encoding="utf-8") as file:
        for task, prompt, answer in tests.values():
            file.write(json.dumps({"prompt": prompt, "response": answer, "task": task}) + "\n")

    with (
        gzip.GzipFile(args.output / "train.jsonl.gz", "wb", compresslevel=4, mtime=0) as train,
        open(args.output / "text.jsonl", "w", encoding="utf-8") as text,
    ):
        for i in range(args.count):
            prompt, answer = TASKS[list(TASKS)[i % len(TASKS)]](rng)
            if same(prompt) in tests:
                continue
            train.write((json.dumps({"prompt": prompt, "response": answer}) + "\n").encode())
            if i < 4000:
                text.write(json.dumps({"text": f"{prompt} {answer}"}) + "\n")
    (args.output / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    main()
