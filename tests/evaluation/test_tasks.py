"""Tests how the tasks of an evaluation are found, also those on local files."""

import json

import bench
import pytest
from lm_eval.tasks import TaskManager
from paths import ROOT

from llada_jax.config import UserError
from llada_jax.evaluation import tasks


def test_tasks_on_local_files(monkeypatch, tmp_path):
    arc = "Please choose the correct answer to the question: Why?\n\nAnswer1: So. Answer2: Because it is.\n\n"
    arc = [{"instruction": arc + "Answer format: answer1/answer2", "answer": "answer2"}]
    (tmp_path / "arc_easy_test.json").write_text(json.dumps(arc))
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "a b\\u2028c d"}\n')
    problems = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(7)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    names, folder = [f"{name}_local" for name in ("arc_easy", "lambada", "gsm8k", "text")], ROOT / "benchmarks"
    with pytest.raises(UserError, match="--tasks=arc_easy_local: ValueError: set LLADA_EVAL_DATA"):
        tasks.load(names, [str(folder / "eval")])
    monkeypatch.setenv("LLADA_EVAL_DATA", str(tmp_path))
    monkeypatch.setenv("LLADA_EVAL_TEXT", str(tmp_path / "lambada_test.jsonl"))
    _, (choice, cloze, sums, text) = tasks.load(names, [str(folder / "eval")])
    assert [i.args for i in choice.instances] == [
        ("Question: Why?\nAnswer:", " So."),
        ("Question: Why?\nAnswer:", " Because it is."),
    ]
    assert choice.doc_to_target(choice.dataset["test"][0]) == 1 and choice.config.task == "arc_easy_local"
    assert cloze.instances[0].args == ("a b\u2028c", " d") and text.instances[0].args == ("a b\u2028c d",)
    *examples, question = sums.instances[0].args[0].split("\n\n")
    assert len(examples) == 5 and question == "Question: 0 + 1?\nAnswer:" and question not in " ".join(examples)
    assert [entry.name for entry in sums._filters] == ["strict-match", "flexible-extract"]
    _, (sums,) = tasks.load(["gsm8k_local"], [str(folder / "eval")], num_fewshot=2)
    assert sums.instances[0].args[0].count("Question:") == 3
    with pytest.raises(UserError, match="--tasks=gsm8k_local: ValueError: Sample larger than population"):
        tasks.load(["gsm8k_local"], [str(folder / "eval")], num_fewshot=9)


def test_groups_and_patterns(tmp_path):
    folder = bench.write_tasks(tmp_path / "tasks")
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": ["choice", "cloze"]}))
    with pytest.MonkeyPatch.context() as patch:
        build = TaskManager.__init__
        patch.setattr(TaskManager, "__init__", lambda self, **k: build(self, **k | {"include_defaults": False}))
        _, (group,) = tasks.load(["both"], [str(folder)])
        assert group.name == "both"
        _, found = tasks.load(["c*"], [str(folder)])
        assert [task.config.task for task in found] == ["choice", "cloze"]
        with pytest.raises(UserError, match="Duplicate task"):
            tasks.load(["both", "cloze"], [str(folder)])
