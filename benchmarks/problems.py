"""Writes problems whose answers can be checked: python benchmarks/problems.py --output=DIR

The problems are additions and sortings, each with a line of working before "=" and the result behind it:

    add 0 4 7 3 2 9 0 5 1 + 0 5 2 6 7 3 8 1 2 =    1 1 1 1 1 0 0 0 0 = 1 0 0 0 0 2 8 6 3
    sort g c x a m k b z q e =                     4 2 8 0 6 5 1 9 7 3 = a b c e g k m q x z

The working of an addition is the carry into each column, as one writes it above the numbers. In half of the columns the
digits add up to 9, so that a carry often goes through several of them. The working of a sorting is the rank of each
letter, from 0. From a column's digits to its carry and to its sum it is equally far everywhere, so little need be
learned about positions. Digits and letters are separated by spaces, so that a trained tokenizer, whose pieces do not
cross spaces, makes most of them one token.

The folder gets train.jsonl.gz and held_out.jsonl, in the form that `llada_jax.prepare --chat` reads, and text.jsonl
with a part of the training problems, on which `llada_jax.prepare` trains the tokenizer. chat_template.jinja writes a
problem and its answer with nothing between them: put it into the folder of the tokenizer. No held-out problem occurs in
train.jsonl.gz, nor one that only has the same numbers in another order. The same seed gives the same files.
"""

import argparse
import gzip
import json
import random
import string
from collections.abc import Callable, Iterable

from llada_jax.cli.paths import expanded_path

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}{{ message['content'] }}"
    "{% endfor %}"
)


def addition(rng: random.Random, digits: int = 8) -> tuple[str, str]:
    """Returns an addition of two numbers of `digits` digits, with a 0 before them, and its answer."""
    columns = [
        (x, 9 - x if rng.random() < 0.5 else rng.randrange(10)) for x in (rng.randrange(10) for _ in range(digits))
    ]
    a, b = (sum(digit * 10**place for place, digit in enumerate(each)) for each in zip(*columns, strict=True))
    # The sum of what is right of a column shows the carry into it.
    carries = [(a % 10**place + b % 10**place) // 10**place for place in range(digits, -1, -1)]
    first, second, total = (_spaced(f"{number:0{digits + 1}}") for number in (a, b, a + b))
    return f"add {first} + {second} =", f"{_spaced(map(str, carries))} = {total}"


def sorting(rng: random.Random, count: int = 10) -> tuple[str, str]:
    """Returns `count` different letters to be sorted, and their order with the rank of each."""
    letters = rng.sample(string.ascii_lowercase, count)
    ordered = sorted(letters)
    ranks = (str(ordered.index(letter)) for letter in letters)
    return f"sort {_spaced(letters)} =", f"{_spaced(ranks)} = {_spaced(ordered)}"


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"add": addition, "sort": sorting}


def _spaced(signs: Iterable[str]) -> str:
    return " ".join(signs)


def result(answer: str) -> str:
    """Returns what an answer says behind its working: the part behind the first "="."""
    return answer.partition("=")[2].strip()


def same(prompt: str) -> str:
    """Returns a text that is the same for problems that have the same numbers, or letters, in any order."""
    task, _, rest = prompt.removesuffix(" =").partition(" ")
    return f"{task} {sorted(rest.split(' + ' if task == 'add' else ' '))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=expanded_path, required=True)
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
