"""Tests whole evaluations: their file of results, their table, their errors, and continuing after an interruption."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading

import bench
import lm_eval
import published_folders
import pytest
import rounding
import safetensors.numpy as safetensors
import tiny
from paths import PYTHONPATH, SUPPORT

from llada_jax.config import ModelConfig, NonFinite, UserError
from llada_jax.evaluation import harness, run
from llada_jax.evaluation.results import identify
from llada_jax.evaluation.results import table as table_of
from llada_jax.evaluation.run import Evaluation
from llada_jax.formats.conversion import convert

TASKS = "choice,cloze,sums,reversal"
# The model of bench.write_model, whose scores of attention are of size 4; rows of up to 32 tokens, two samples of each.
SIZES = ModelConfig(layers=3, width=64, heads=4, kv_heads=2, feed_forward=176, vocab_size=512)
LOSS = rounding.of_nll(SIZES, 32, 2, score=4)
SETTINGS = ["--mc_samples=2", "--gen_length=4", "--block_length=4", "--temperature=0.5", "--limit=2"]
SETTINGS += ["--batch_size=1"]  # then all prompts have the same padded length, so little is compiled
FIGURES = {"choice", "cloze", "sums"} | {
    f"reversal_{way}{how}" for way in ("forward", "backward") for how in ("", "_infill")
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Makes a folder with a model, tasks and couplets."""
    folder = tmp_path_factory.mktemp("place")
    bench.write_model(folder / "model")
    bench.write_tasks(folder / "tasks")
    lines = ["one two", "two three", "three four", "four five", "five six"]
    couplets = [{"first": a, "second": b, "source": ""} for a, b in zip(lines, lines[1:], strict=False)]
    (folder / "couplets.json").write_text(json.dumps(couplets))
    return folder


def couplets(place):
    return json.loads((place / "couplets.json").read_text())


def job(place, output, tasks=TASKS, **settings):
    """Returns the evaluation that the flags of SETTINGS describe."""
    asked = {"mc_samples": 2, "gen_length": 4, "block_length": 4, "temperature": 0.5, "limit": 2.0, "batch_size": 1}
    data, include = str(place / "couplets.json"), (str(place / "tasks"),)
    folder, names = str(place / "model"), tuple(tasks.split(","))
    return Evaluation(folder, names, str(output), data=data, include_path=include, **(asked | settings))


def flags(place, output, tasks=TASKS):
    named = {"model": place / "model", "include_path": place / "tasks", "data": place / "couplets.json"}
    named |= {"output": output, "tasks": tasks}
    return [f"--{name}={value}" for name, value in named.items()] + SETTINGS


def read(path):
    """Reads the results without the entries that differ between runs."""
    results = json.loads(path.read_text())
    del results["date"], results["seconds"], results["evaluation"]
    return results


def assert_close(figures, wanted):
    """Asserts that figures are equal up to rounding, which depends on the batches and the order of sums.

    A perplexity is exp of a loss, so its relative error is the absolute error of the loss.
    """
    assert figures.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=LOSS * math.log(max(value, math.e)))
        assert figures[name] == value, name


@pytest.fixture(scope="module")
def whole(place):
    """Returns the file of results of an evaluation that was not interrupted."""
    output = place / "whole.json"
    assert run.run(job(place, output, log_samples=True, results_cache=str(place / "kept" / "cache"))) == 0
    return output


def test_results_and_table(place, whole):
    results = json.loads(whole.read_text())
    assert results["results"].keys() == FIGURES
    assert all(0 <= results["results"]["choice"][name] <= 1 for name in ("acc,none", "acc_stderr,none"))
    assert results["n-samples"]["choice"] == {"original": 9, "effective": 2}
    assert results["results"]["reversal_forward"]["sample_len"] == 2
    assert results["model"]["path"] == str(place / "model") and results["model"]["step"] is None
    assert results["evaluation"]["mc_samples"] == 2 and results["configs"]["sums"]["output_type"] == "generate_until"
    assert {"jax", "lm_eval", "llada_jax"} <= results["software"].keys() and results["date"]
    assert results["samples"].keys() == FIGURES and len(results["samples"]["sums"]) == 2
    for given, wanted, answer in results["samples"]["reversal_backward_infill"]:
        assert answer and given not in answer and {"first": wanted, "second": given, "source": ""} in couplets(place)
    table = table_of(results)
    assert re.search(r"^choice +0 +none +acc +[01]\.\d{4} +0\.\d{4}$", table, re.MULTILINE), table
    assert re.search(r"^reversal_backward_infill +0 +none +exact_match ", table, re.MULTILINE)
    assert not list(place.glob(".whole*"))


@pytest.mark.slow
def test_killed_and_continued(monkeypatch, place, whole, tmp_path):
    cache, output = tmp_path / "cache", tmp_path / "out.json"
    command = [sys.executable, str(SUPPORT / "interrupted.py"), "5"]
    command += [*flags(place, output), f"--results_cache={cache}"]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tiny.ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists() and killed.stdout == ""
    (file,) = tmp_path.glob("cache-*_rank0.db")
    with sqlite3.connect(file) as database:
        assert database.execute("select count(*) from unnamed").fetchone() == (5,)

    asked = []
    in_portions = harness.LLaDA._in_portions

    def counted(self, kind, given, *rest):
        asked.append((kind, len(given)))
        return in_portions(self, kind, given, *rest)

    monkeypatch.setattr(harness.LLaDA, "_in_portions", counted)
    again = job(place, output, results_cache=str(cache), log_samples=True)
    assert run.run(again) == 0
    assert asked == [("loglikelihood", 8 - 5), ("generate_until", 2)]
    ours, theirs = read(output), read(whole)
    assert [sample["resps"] for sample in ours["samples"]["sums"]] == [s["resps"] for s in theirs["samples"]["sums"]]
    for task, figures in theirs["results"].items():
        assert_close(ours["results"][task], figures)
    for name in theirs.keys() - {"results", "samples"}:
        assert ours[name] == theirs[name], name

    asked.clear()
    run.run(job(place, tmp_path / "other.json", "cloze", results_cache=str(cache), mc_samples=3))
    assert asked == [("loglikelihood", 2)], "results are not reused with other settings"


@pytest.mark.slow
def test_two_processes(place, whole, tmp_path):
    spec = importlib.util.spec_from_file_location("local", tiny.ROOT / "launch" / "local.py")
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    # Process 0 has some results already. Process 1 must get them, or the processes would not make the same calls.
    (made,) = place.glob("kept/cache-*_rank0.db")
    shutil.copy(made, tmp_path)
    with sqlite3.connect(tmp_path / made.name) as database:
        database.execute("delete from unnamed where rowid % 2")
    lines, output = [], tmp_path / "out.json"
    command = [sys.executable, "-m", "llada_jax.evaluate", *flags(place, output, "choice"), "--fsdp=2"]
    command.append(f"--results_cache={tmp_path}/cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        patch.setattr(local, "print", lambda *line, **_: lines.append(*line), raising=False)
        started = local.Job(local.parse(["--processes=2", "--devices=4", "--patience=60", "--", *command]))
        hanging = threading.Timer(200, started.send, (signal.SIGKILL,))
        hanging.start()
        started.wait(threading.Event())
        hanging.cancel()
    said = "".join(lines)
    assert [process.returncode for process in started.processes] == [0, 0], said
    ours, theirs = read(output), read(whole)
    assert ours["model"]["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [made.name, "out.json"]
    assert ours["results"].keys() == {"choice"}
    assert_close(ours["results"]["choice"], theirs["results"]["choice"])
    with sqlite3.connect(tmp_path / made.name) as database:
        assert database.execute("select count(*) from unnamed").fetchone() == (
            8,
        )  # 6 of choice, and the 2 that are left of the other tasks' 4
    spoken = [line for line in said.splitlines() if line.startswith("[1]") and re.search(r"choice|it/s|\d%", line)]
    assert spoken == []


@pytest.mark.parametrize("form", ["orbax", "published"])
def test_another_model_at_the_same_place(place, tmp_path, form):
    """Tests that a model at the same path, step (0 in a converted folder) and settings does not reuse results."""
    source, folder, results = tmp_path / "source", tmp_path / "m", []
    shutil.copytree(place / "model", source)
    for factor in (1, 2):
        if factor == 2:
            (file,) = source.glob("*.safetensors")
            tensors = {name: value * factor for name, value in safetensors.load_file(file).items()}
            safetensors.save_file(tensors, file, {"format": "pt"})
            shutil.rmtree(folder)
        shutil.copytree(source, folder) if form != "orbax" else convert(source, folder, "orbax")
        output = tmp_path / f"{factor}.json"
        settings = {"results_cache": str(tmp_path / "cache"), "limit": 1.0}
        assert run.run(dataclasses.replace(job(place, output, "cloze", **settings), model=str(folder))) == 0
        results.append(json.loads(output.read_text()))
    first, second = (result["results"]["cloze"]["perplexity,none"] for result in results)
    assert first != second
    assert len(list(tmp_path.glob("cache-*"))) == 2


def test_what_tells_models_apart(place, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(place / "model", folder)
    asked, identity = job(place, tmp_path / "o"), identify(folder) | {"dtype": "float32", "tokenizer": "a"}
    name = run._fingerprint(asked, identity)
    assert identify(folder).items() <= identity.items()
    assert name == run._fingerprint(dataclasses.replace(asked, limit=9.0, dtype="float32"), identity)
    for other in ({"dtype": "bfloat16"}, {"tokenizer": "b"}):
        assert run._fingerprint(asked, identity | other) != name
    for setting in ({"mc_samples": 3}, {"cfg_scale": 0.5}, {"gen_length": 5}, {"steps": 2}, {"temperature": 0.7},
                    {"remasking": "random"}, {"logits_eos_inf": True}, {"max_length": 9}, {"seed": 1}):  # fmt: skip
        assert run._fingerprint(dataclasses.replace(asked, **setting), identity) != name
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert identify(folder)["config"] != identity["config"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "__version__", "0")
        assert run._fingerprint(asked, identity) != name


def test_other_ends_are_another_model(monkeypatch, place, tmp_path):
    """generation_config.json decides where a completion ends, so kept completions of other ends are not reused."""
    folder, used = shutil.copytree(place / "model", tmp_path / "m"), []
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **given: used.append(given["use_cache"]))
    for ends in ([2, 7], [2, 9]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        asked = dataclasses.replace(
            job(place, tmp_path / "o", "sums", results_cache=str(tmp_path / "cache")), model=str(folder)
        )
        run.run(asked)
    assert 9 in json.loads((tmp_path / "o").read_text())["model"]["ends"]
    assert used[0] != used[1]


def test_what_other_processes_leave_alone(monkeypatch, capsys, place, tmp_path):
    asked = {}
    monkeypatch.setenv("TQDM_DISABLE", "0")  # the evaluation changes it, and monkeypatch restores it afterwards
    monkeypatch.setattr(run.distributed, "index", lambda: 1)
    monkeypatch.setattr(lm_eval, "simple_evaluate", asked.update)
    assert run.run(job(place, tmp_path / "out.json", "choice", results_cache=str(tmp_path / "cache"))) == 0
    assert not asked["use_cache"].startswith(str(tmp_path)) and list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "") and os.environ["TQDM_DISABLE"] == "1"


def test_a_model_whose_output_is_not_finite(place, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    published_folders.spoil(folder)
    for tasks in ("cloze", "sums", "reversal"):
        cache = tmp_path / "cache" / tasks
        asked = dataclasses.replace(
            job(place, tmp_path / "out.json", tasks, results_cache=str(cache)), model=str(folder)
        )
        with pytest.raises(NonFinite, match="the model's output is not finite"):
            run.run(asked)
        for kept in cache.parent.glob("*.db"):
            with sqlite3.connect(kept) as database:
                assert database.execute("select count(*) from unnamed").fetchone() == (0,)
    assert not (tmp_path / "out.json").exists()


def test_a_figure_that_is_not_finite_is_null_and_told(monkeypatch, capsys, place, tmp_path):
    results = {"results": {"choice": {"alias": "choice", "mcc,none": math.nan, "acc,none": 1.0}}, "n-shot": {}}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: results)
    assert run.run(job(place, tmp_path / "out.json", "choice")) == 0
    text = (tmp_path / "out.json").read_text()
    assert "NaN" not in text and json.loads(text)["results"]["choice"]["mcc,none"] is None
    out, err = capsys.readouterr()
    assert re.search(r"choice +none +mcc +nan", out)
    assert "out.json: numbers that are not finite are written as null (1): results/choice/mcc,none\n" in err


def test_a_perplexity_that_no_float_can_hold(monkeypatch, place, tmp_path):
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: math.exp(1000))
    with pytest.raises(NonFinite, match="^--tasks=choice: a metric, most likely a perplexity, is too large"):
        run.run(job(place, tmp_path / "out.json", "choice"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": "chioce"}, "--tasks=chioce: there is no such task in .*tasks or lm_eval; did you mean choice"),
        ({"tasks": "reversal", "data": None}, "--tasks=reversal needs --data=FILE.json"),
        ({"tasks": "reversal", "data": "none.json"}, "--data=none.json: No such file"),
        ({"tasks": "gone"}, r"--tasks=gone: .*gone.jsonl.* \(relative paths in data_files are resolved against /"),
        ({"tasks": "columns"}, "--tasks=columns: .*nothing"),
        ({"tasks": "remote"}, "--tasks=remote: its data is not on this machine and cannot be downloaded"),
        ({"tasks": "module"}, "--tasks=module: No module named 'nowhere'.*pip install \"lm-eval.module.\""),
        ({"tasks": "metric"}, "--tasks=metric: the metric acc names an aggregation that lm_eval does not have"),
        ({"tasks": "code"}, "allow it with --confirm_run_unsafe_code"),
        ({"tasks": ""}, "nothing to evaluate"),
        ({"output": "none/out.json"}, "--output=none/out.json: there is no folder"),
        ({"output": "x" * 300}, "--output=x+ cannot be written: File name too long"),
        ({"results_cache": "file/cache"}, "--results_cache=file/cache cannot be written: File exists"),
        ({"results_cache": "gs://bucket/cache"}, "--results_cache=gs://bucket/cache: name a file on this machine"),
        ({"limit": 1.5}, "--limit=1.5"),
        *(({"limit": number}, f"--limit={number}") for number in (math.nan, math.inf)),
        ({"output": "."}, "--output=. is a folder"),
        ({"tasks": "choice,long"}, "--tasks=long: gen_length=300 leaves no room for a prompt"),
        ({"tasks": "sums", "gen_length": 300}, "--tasks=sums: gen_length=300 leaves no room for a prompt"),
        ({"tasks": "stops"}, r"--tasks=stops: generation_kwargs: until=\[5\] must be a text"),
        ({"tasks": "unknown"}, "--tasks=unknown: there is no metric rouge99 in lm_eval"),
        ({"tasks": "uncomputed"}, "--tasks=uncomputed: lm_eval does not compute bleu for output_type multiple_choice"),
        ({"tasks": "package"}, "--tasks=package: its metrics cannot be computed: No module named 'nowhere_at_all'"),
        ({"steps": 0}, "steps=0"),
        ({"mc_samples": 0}, "--mc_samples=0"),
        ({"include_path": ("none",)}, "--include_path=none is not a folder"),
        ({"include_path": ("broken",)}, "wrong.yaml is not YAML"),
        ({"model": "none"}, "--model=none is not a folder"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(monkeypatch, place, tmp_path, settings, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.loading, "load", lambda *_: pytest.fail("the model is loaded"))
    folder = bench.write_tasks(tmp_path / "tasks")
    base = json.loads((folder / "choice.yaml").read_text())
    metrics = {"metric_list": [{"metric": "acc", "aggregation": "middle", "higher_is_better": True}]}
    sums = {"metric": "rouge99", "aggregation": "mean", "higher_is_better": True}
    generates = json.loads((folder / "sums.yaml").read_text())
    for name, changes in (
        ("long", {"generation_kwargs": {"max_gen_toks": 300}}),
        ("stops", {"generation_kwargs": {"until": [5]}}),
        ("unknown", {"metric_list": [sums]}),
    ):
        (folder / f"{name}.yaml").write_text(json.dumps(generates | {"task": name} | changes))
    (folder / "late.py").write_text("def results(doc, results):\n    import nowhere_at_all\n")
    late = (folder / "sums.yaml").read_text().replace('"task": "sums"', '"task": "package"')
    (folder / "package.yaml").write_text(late[:-1] + ', "process_results": !function late.results}')
    for name, changes in (
        ("uncomputed", {"metric_list": [sums | {"metric": "bleu", "aggregation": "bleu"}]}),
        ("gone", {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}),
        ("columns", {"doc_to_choice": "{{nothing[0]}}"}),
        ("remote", {"dataset_path": "someone/something", "dataset_kwargs": {}}),
        ("metric", metrics),
        ("code", {"unsafe_code": True}),
    ):
        (folder / f"{name}.yaml").write_text(json.dumps(base | {"task": name} | changes))
    (folder / "needs.py").write_text("import nowhere")
    (folder / "module.yaml").write_text("task: module\ndataset_path: json\ndoc_to_text: !function needs.text\n")
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wrong.yaml").write_text("task: [a\nb: c")
    settings = {"tasks": "choice", "output": "out.json", "include_path": (str(folder),)} | settings
    arguments = {"model": str(place / "model"), "data": None} | settings
    arguments["tasks"] = tuple(filter(None, arguments["tasks"].split(",")))
    if "chioce" in arguments["tasks"]:  # do not read the thousands of tasks of lm_eval
        from lm_eval.tasks import TaskManager

        build = TaskManager.__init__
        monkeypatch.setattr(TaskManager, "__init__", lambda self, **k: build(self, **k | {"include_defaults": False}))
    with pytest.raises(UserError, match=words):
        run.run(Evaluation(**arguments))
    assert not (tmp_path / "out.json").exists()


def test_without_lm_eval(monkeypatch, place, tmp_path):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "llada_jax\[eval\]"'):
        run.check(job(place, tmp_path / "out.json"))
    run.check(job(place, tmp_path / "out.json", "reversal"))
