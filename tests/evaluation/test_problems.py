"""Tests the problems that benchmarks/tasks.py measures with: their answers by other means than those that made them."""

import gzip
import json
import runpy
import sys

import pytest
from paths import ROOT


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns a folder that benchmarks/problems.py wrote, and the script's functions."""
    folder = tmp_path_factory.mktemp("problems")
    script = str(ROOT / "benchmarks" / "problems.py")
    for name in ("one", "two"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, f"--output={folder / name}", "--count=400", "--held_out=30"])
            runpy.run_path(script, run_name="__main__")
    return folder, runpy.run_path(script)


def lines(file):
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as text:
        return [json.loads(line) for line in text]


def check_addition(prompt, response):
    first, second = (part.split() for part in prompt.removeprefix("add ").removesuffix(" =").split(" + "))
    carries, total = (part.split() for part in response.split(" = "))
    assert len(first) == len(second) == len(carries) == len(total) == 9 and carries[-1] == "0"
    assert int("".join(first)) + int("".join(second)) == int("".join(total))
    for column in range(8):  # as one adds on paper: the column to the right says what is carried
        below = int(first[column + 1]) + int(second[column + 1]) + int(carries[column + 1])
        assert int(carries[column]) == (below > 9)


def check_sorting(prompt, response):
    letters = prompt.removeprefix("sort ").removesuffix(" =").split()
    ranks, ordered = (part.split() for part in response.split(" = "))
    assert ordered == sorted(letters) and len(set(letters)) == 10
    assert [ordered[int(rank)] for rank in ranks] == letters


def test_the_answers_are_right(written):
    folder, script = written
    found = lines(folder / "one" / "held_out.jsonl") + lines(folder / "one" / "train.jsonl.gz")
    assert len(found) > 400
    for row in found:
        check = check_addition if row["prompt"].startswith("add") else check_sorting
        check(row["prompt"], row["response"])
        assert script["result"](row["response"]) == row["response"].split(" = ")[1]


def test_nothing_held_out_is_trained_on(written):
    folder, script = written
    held_out = lines(folder / "one" / "held_out.jsonl")
    assert [row["task"] for row in held_out] == ["add"] * 30 + ["sort"] * 30
    trained = {script["same"](row["prompt"]) for row in lines(folder / "one" / "train.jsonl.gz")}
    assert not trained & {script["same"](row["prompt"]) for row in held_out}
    assert script["same"]("add 1 2 + 3 4 =") == script["same"]("add 3 4 + 1 2 =") != script["same"]("add 1 4 + 3 2 =")
    assert script["same"]("sort a b c =") == script["same"]("sort c a b =")


def test_a_seed_gives_the_same_files(written):
    one, two = (sorted((written[0] / name).iterdir()) for name in ("one", "two"))
    assert [file.name for file in one] == ["chat_template.jinja", "held_out.jsonl", "text.jsonl", "train.jsonl.gz"]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
