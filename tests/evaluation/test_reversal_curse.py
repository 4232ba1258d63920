"""Tests benchmarks/reversal.py, which trains models on facts and asks for both parts of them."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from experiments import imported
from paths import PYTHONPATH, ROOT

from llada_jax.text.tokenizer import load_tokenizer

COUPLETS = [("ab", "cde"), ("fg", "hi"), ("jkl", "mn"), ("op", "qr"), ("op", "st"), ("uvwxyz01", "2"), ("34", "56")]


facts = imported("reversal_facts")
FORWARD, REVERSE, BOTH = facts.FORWARD, facts.REVERSE, facts.BOTH


def test_facts_have_nothing_in_common():
    task = facts.facts(seed=3, count=20)
    assert task == facts.facts(seed=3, count=20) and task.texts() != facts.facts(seed=4, count=20).texts()
    assert [sum(item.seen == seen for item in task.items) for seen in (FORWARD, REVERSE, BOTH)] == [20, 20, 40]
    for parts in ({item.first for item in task.items}, {item.second for item in task.items}):
        assert len(parts) == 80
    texts = task.texts()
    assert len({*texts}) == len(texts) == 20 + 20 + 2 * 40
    for item in task.items:
        told = [f"{item.first} is {item.second} ." in texts, f"{item.second} is {item.first} ." in texts]
        assert told == [item.seen != REVERSE, item.seen != FORWARD]
    # Every text, with its EOS, is one row. No name shows which description belongs to it: both words of it are shared.
    assert {len(text.split()) + 1 for text in texts} == {task.row}
    assert len({word for item in task.items for word in item.first.split()}) <= 80


def test_couplets():
    task = facts.couplets(0, COUPLETS)
    assert task == facts.couplets(0, COUPLETS)
    # Two couplets have the same first line, and one has a line of eight characters.
    assert {item.first.replace(" ", "") for item in task.items} == {"ab", "fg", "jkl", "34"}
    assert [item.seen for item in task.items].count(BOTH) == 1 and not any(i.seen == REVERSE for i in task.items)
    texts = task.texts()
    assert all(f"{item.first} ， {item.second} ." in " ".join(texts) for item in task.items)
    assert [" 的上一句是 " in text for text in texts].count(True) == 1
    assert {len(text.split()) + 1 for text in texts} == {task.row}
    assert (
        len({item.seen == BOTH and item.first for seed in range(9) for item in facts.couplets(seed, COUPLETS).items})
        > 2
    )


@pytest.fixture(scope="module")
def reversal():
    return imported("reversal")


@pytest.fixture(scope="module")
def tasks(reversal, tmp_path_factory):
    """Returns the two tasks, each with the tokenizer of its set."""
    folder = tmp_path_factory.mktemp("sets")
    found = [facts.facts(0, 3), facts.couplets(0, COUPLETS)]
    for task in found:
        reversal.make_set(task, folder / task.name)
    return [(task, load_tokenizer(folder / task.name / "set" / "tokenizer")) for task in found]


def test_a_set_has_a_text_in_each_row(tasks, tmp_path, reversal):
    task, tokenizer = tasks[0]
    ids = tokenizer.encode(task.text(task.items[0], FORWARD))
    assert len(ids) == task.row - 1 and len({*ids} - {tokenizer.encode("[UNK]")[0]}) == len({*ids})
    crooked = SimpleNamespace(row=task.row + 1, texts=task.texts)
    with pytest.raises(AssertionError, match="a text is not one row"):
        reversal.make_set(crooked, tmp_path / "crooked")


CASES = [(seen, order, way) for seen in (FORWARD, REVERSE, BOTH) for order in (FORWARD, REVERSE) for way in ("w", "f")]


@pytest.mark.parametrize(("seen", "order", "way"), CASES)
def test_a_question_hides_what_it_asks_for(tasks, reversal, seen, order, way):
    for task, tokenizer in tasks:
        for item in (item for item in task.items if item.seen == seen):
            asked = reversal.question(task, item, order, {"w": "written", "f": "filled"}[way], tokenizer)
            words = tokenizer.decode(asked.row_T, skip_special=True).split()
            shown = words[: asked.start] + ["_"] * (asked.given - asked.start) + words[asked.given :]
            given, wanted = (item.first, item.second) if order == FORWARD else (item.second, item.first)
            found = words[asked.start : asked.stop]
            assert found == wanted.split() + (["."] if way == "w" else [])
            if way == "w":
                assert shown[: asked.start] == [*given.split(), task.joint[order]] and {*shown[asked.start :]} == {"_"}
            else:
                text = " ".join(words)
                assert text in task.texts()  # what a model fills in, it has seen in this order
                assert " ".join(shown) == text.replace(wanted, " ".join("_" * len(wanted.split())), 1)


@pytest.mark.parametrize("causal", [False, True])
def test_answers_are_read_where_they_stand(tasks, reversal, monkeypatch, causal):
    """Replaces the sampler by one that knows all texts but the last, of which it gets one token wrong."""
    task, tokenizer = tasks[1]
    questions = [reversal.question(task, item, FORWARD, "written", tokenizer) for item in task.items]
    assert len({each.start for each in questions}) > 1

    def generate(model, prompt_NT, config, key, real_NT=None):
        assert config.gen_length == (task.row if causal else 0) and config.temperature == 0
        if causal:
            assert np.asarray(real_NT).sum(axis=1).tolist() == [each.start for each in questions]
        canvas_NT = np.pad(prompt_NT, ((0, 0), (0, config.gen_length)))
        for each, prompt_T, row_T in zip(questions, prompt_NT, canvas_NT, strict=True):
            known = each.row_T[: each.start]
            if causal:
                first = prompt_NT.shape[1] - each.start
                np.testing.assert_array_equal(prompt_T[first:], known)
                row_T[first : first + task.row] = each.row_T
            else:
                np.testing.assert_array_equal(prompt_T, [*known, *[99] * (task.row - each.start)])
                row_T[:] = each.row_T
        at = questions[-1].stop - 1 + (prompt_NT.shape[1] - questions[-1].start if causal else 0)
        canvas_NT[-1, at] += 1
        return canvas_NT

    monkeypatch.setattr(reversal, "generate", generate)
    model = SimpleNamespace(config=SimpleNamespace(causal=causal, mask_id=99))
    rows_NT = reversal.answers(model, questions)
    hits = [reversal.right(each, row_T) for each, row_T in zip(questions, rows_NT, strict=True)]
    assert hits == [True] * (len(questions) - 1) + [False]


def record(model, seed, right, way="written", asked=REVERSE):
    answer = {"seen": FORWARD, "asked": asked, "way": way, "right": right, "count": 50, "wrong": []}
    return {"task": "facts", "model": model, "seed": seed, "answers": [answer]}


def test_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'llada_jax[plots]'")
    table = imported("reversal_table")
    records = [record("arm", seed, 0) for seed in (0, 1)]
    records += [record("llada", 0, 40), record("llada", 1, 30), record("llada", 0, 50, way="filled")]
    shares = table.table_of(records)
    share = shares["facts"][FORWARD, REVERSE]["llada", "written"]
    # Newcombe (1998) gives the interval of 0 in 20 as 0 to 16.11 %, and that of 81 in 263 as 25.53 to 36.62 %.
    assert table.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert table.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    # Two seeds with 80 and 60 %: Student's quantile for one degree of freedom, 12.706, times the standard error of 0.1.
    assert share == (pytest.approx(0.7), 0.0, 1.0, (0.8, 0.6))
    five = table.interval((0.22, 0.54, 0.42, 0.2, 0.34), 86, 250)
    assert five == pytest.approx((0.344 - 2.776 * 0.14206 / 5**0.5, 0.344 + 2.776 * 0.14206 / 5**0.5), abs=1e-3)
    assert table.interval((1.0, 1.0), 100, 100) == table.wilson(100, 100)
    assert table.markdown(shares).splitlines() == [
        "| task | seen | asked for | autoregressive | autoregressive, choosing | LLaDA | LLaDA, filling in |",
        "|---|---|---|---|---|---|---|",
        "| facts | forward | reverse | 0.0 % (0.0 to 3.7), seeds 0 to 0 |  | 70.0 % (0.0 to 100.0), seeds 60 to 80 | "
        "100.0 % (92.9 to 100.0), seeds 100 to 100 |",
    ]
    table.picture(shares, tmp_path / "a.svg")
    table.picture(shares, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.slow
def test_both_models_are_trained_and_asked(tmp_path):
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}

    def call(*arguments):
        command = [sys.executable, "benchmarks/reversal.py", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    done = call("--workdir=w", "--output=o", "--data=no")
    assert done.returncode == 2 and done.stderr.endswith("error: --data=no: No such file or directory\n")
    output = tmp_path / "out.jsonl"
    for _ in range(2):  # the second has nothing to do
        done = call(f"--workdir={tmp_path}", f"--output={output}", "--seeds=1", "--facts=2", "--steps=3")
        assert done.returncode == 0, done.stderr
    arm, llada = map(json.loads, output.read_text().splitlines())
    assert (arm["model"], llada["model"]) == ("arm", "llada")
    assert arm["parameters"] == llada["parameters"] and arm["steps"] == llada["steps"] == 3
    assert len(llada["answers"]) == len(arm["answers"]) == 12
    assert all(0 <= answer["right"] <= answer["count"] for answer in arm["answers"] + llada["answers"])
    done = call(f"--workdir={tmp_path}", f"--output={output}", "--seeds=1", "--facts=3", "--steps=3")
    assert done.returncode == 2 and "has facts of a run with 8 items and 3 steps: name another file" in done.stderr
    done = call(f"--workdir={tmp_path}", f"--output={tmp_path / 'other'}", "--seeds=1", "--facts=3", "--steps=3")
    assert done.returncode == 2 and "facts-0 holds other texts: name another --workdir" in done.stderr
