"""Tests that `prepare --runner` writes the bytes of the local way, whole or not at all; Beam is in this process."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from llada_jax.config import UserError
from llada_jax.data.prepare import fleet_work, runners
from llada_jax.data.prepare.filters import Filters
from llada_jax.data.prepare.prepare_text import prepare

from .conftest import story, write_jsonl
from .test_prepare import content

pytest.importorskip("apache_beam", reason="apache-beam is not installed")
from apache_beam.portability.python_urns import SUBPROCESS_SDK  # noqa: E402

from llada_jax.data.prepare.fleet import _shortened, prepare_on_fleet  # noqa: E402

SETTINGS = {
    "sequence_length": 64, "validation_fraction": 0.2, "shard_rows": 60, "on_error": "skip", "progress": False,
}  # fmt: skip


def filters(corpus: list[str]) -> Filters:
    """Returns filters of three kinds; the evaluation set is a file beside the corpus."""
    return Filters("exact", ("gopher_repetition",), (), (str(Path(corpus[1]).with_name("test.json")),))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Returns two inputs of several files: repeated, bad, blank and empty texts, and a .txt file of several pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "test.json").write_text(json.dumps([story(7)]))
    repeated = [story(i) for i in range(40)]
    write_jsonl(folder / "a0.jsonl.gz", [*repeated[:20], " ", "", "same " * 90])
    (folder / "a1.txt").write_text("")
    write_jsonl(folder / "a2.jsonl", [*repeated[:30:3], *repeated[20:]])
    with (folder / "a2.jsonl").open("a") as file:
        file.write("no JSON\n")
    long = "".join(story(i, words=300) for i in range(1000, 1100))
    (folder / "b.txt").write_text(long[:60000] + "\n" * 40000 + long[60000:], newline="")
    return [str(folder / "a*"), str(folder / "b.txt")]


@pytest.fixture(scope="module")
def local(corpus, tokenizer_folder, tmp_path_factory) -> Path:
    """Returns the set that the local way makes of the corpus."""
    output = tmp_path_factory.mktemp("local") / "set"
    manifest = prepare(corpus, output, tokenizer=tokenizer_folder, workers=1, filters=filters(corpus), **SETTINGS)
    assert len(manifest.train.shards) > 2 and manifest.validation.rows and manifest.left_out
    assert {reason for source in manifest.filtered.sources for reason in source.removed} == {
        "evaluation set",
        "exact duplicate",
        "gopher_repetition: one frequent n-gram",
    }
    return output


def fleet(inputs, output, tokenizer, **options):
    return prepare_on_fleet(inputs, str(output), tokenizer=tokenizer, **{"workers": 1, **SETTINGS, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"workers": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"runner_options": "--direct_num_workers=2 --direct_running_mode=multi_processing"}, marks=pytest.mark.slow
        ),
    ],
)
def test_same_bytes_as_the_local_way(local, corpus, tokenizer_folder, tmp_path, options):
    fleet(corpus, tmp_path / "set", tokenizer_folder, filters=filters(corpus), **options)
    assert content(tmp_path / "set") == content(local)
    assert os.listdir(tmp_path) == ["set"]


def test_an_interrupted_preparation_goes_on(local, corpus, tokenizer_folder, tmp_path, monkeypatch):
    """A worker fails while it writes a shard: there is no set, and the same command does only what is left."""
    output, moved = tmp_path / "set", []

    def move(file, path):
        if len(moved) == 2:  # a shard and the index of its rows
            raise OSError("the worker lost its disk")
        moved.append(path)
        move_really(file, path)

    move_really = fleet_work.storage.move
    with monkeypatch.context() as patch:
        patch.setattr(fleet_work.storage, "move", move)
        with pytest.raises(UserError, match="the worker lost its disk .*: the same command goes on"):
            fleet(corpus, output, tokenizer_folder, filters=filters(corpus))
    assert os.listdir(tmp_path) == ["set.unfinished"] and len(moved) == 2
    with pytest.raises(UserError, match="set.unfinished is the unfinished work of a preparation with other inputs"):
        fleet(corpus, output, tokenizer_folder)
    written = os.stat(moved[0]).st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(fleet_work, "write_tokens", lambda *_: pytest.fail("a file is tokenised once more"))
        patch.setattr(fleet_work, "judge_documents", lambda *_: pytest.fail("a file is judged once more"))
        fleet(corpus, output, tokenizer_folder, filters=filters(corpus))
    assert content(output) == content(local)
    assert os.stat(output / Path(moved[0]).name).st_mtime_ns == written
    with pytest.raises(UserError, match="is already a prepared set"):
        fleet(corpus, output, tokenizer_folder)


def test_object_storage(local, corpus, tokenizer_folder, tmp_path, monkeypatch):
    """From a bucket into a bucket; the manifest comes last, and nothing unfinished stays."""
    fsspec = pytest.importorskip("fsspec")
    bucket = fsspec.filesystem("memory")
    bucket.put(f"{Path(corpus[0]).parent}/", "/bucket/text/", recursive=True)
    inputs = ["memory://bucket/text/a*", "memory://bucket/text/b.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(fleet_work, "SplitWriter", lambda *_: pytest.fail("the worker died"))
        with pytest.raises((RuntimeError, pytest.fail.Exception)):
            fleet(inputs, "memory://bucket/set", tokenizer_folder, filters=filters(corpus))
    assert not bucket.exists("/bucket/set/manifest.json")
    manifest = fleet(inputs, "memory://bucket/set", tokenizer_folder, filters=filters(corpus))
    assert not bucket.exists("/bucket/set.unfinished")
    bucket.get("/bucket/set/", str(tmp_path / "set"), recursive=True)
    expected, found = content(local), content(tmp_path / "set")
    assert expected.pop("manifest.json") != found.pop("manifest.json")  # the names of the inputs differ
    assert found == expected and [source.input for source in manifest.sources] == inputs
    with pytest.raises(UserError, match="is already a prepared set"):
        fleet(inputs, "memory://bucket/set", tokenizer_folder)


def test_mistakes(corpus, tokenizer_folder, tmp_path):
    """A bad document ends the preparation with the words of the local way; others are told before anything is done."""
    with pytest.raises(UserError) as local:
        prepare(corpus, tmp_path / "set", tokenizer=tokenizer_folder, **{**SETTINGS, "on_error": "stop", "workers": 1})
    for options, words in (
        ({"on_error": "stop"}, str(local.value)),
        ({"runner": "dataflow"}, "give input and output on gs://"),
        ({"runner": "slurm"}, "choose one of direct, dataflow"),
    ):
        with pytest.raises(UserError) as caught:
            fleet(corpus, tmp_path / "set", tokenizer_folder, filters=filters(corpus), **options)
        assert words in str(caught.value)
    # What is done goes on if bad documents may be left out, but not the other way round.
    manifest = fleet(corpus, tmp_path / "set", tokenizer_folder, filters=filters(corpus))
    assert manifest.left_out[0].count == 1
    with pytest.raises(UserError, match="means the files of this machine"):
        fleet(["stdlib"], tmp_path / "set", tokenizer_folder, runner="spark")


@pytest.mark.parametrize(
    "runner, options, expected",
    [
        (
            "dataflow",
            "--project=P --region=R --temp_location=gs://bucket/tmp --sdk_container_image=I --max_num_workers=1000",
            {"project": "P", "region": "R", "temp_location": "gs://bucket/tmp", "sdk_container_image": "I",
             "max_num_workers": 1000},
        ),
        (
            "flink",
            "--flink_master=host:8081 --parallelism=8 --environment_type=PROCESS "
            "--environment_config='{\"command\": 1}'",
            {"flink_master": "host:8081", "parallelism": 8, "environment_type": "PROCESS",
             "environment_config": '{"command": 1}'},
        ),
        (
            "spark",
            "--spark_master_url=spark://host:7077 --job_endpoint=host:8099 --option_of_the_job_server=1",
            {"spark_master_url": "spark://host:7077", "job_endpoint": "host:8099"},
        ),
        ("direct", "--direct_num_workers=2", {"direct_num_workers": 2}),
    ],
)  # fmt: skip
def test_options_are_those_of_beam(runner, options, expected):
    found = runners.options(runner, options).get_all_options(drop_default=True)
    assert {name: found[name] for name in expected} == expected
    assert found.get("runner") == (None if runner == "direct" else f"{runner.title()}Runner")
    if runner in ("flink", "spark"):  # that of Dataflow asks the cloud
        assert type(runners.pipeline(runner, options).runner).__name__ == f"{runner.title()}Runner"


@pytest.mark.parametrize(
    "runner, options, message",
    [
        ("dataflow", "--max_num_worker=1000", "Beam has no option --max_num_worker"),
        ("direct", "--direct_num_worker=2", "Beam has no option --direct_num_worker"),
        ("direct", "--direct_num_workers=two", "argument --direct_num_workers: invalid int value: 'two'"),
        ("flink", "--flink_master='", "No closing quotation"),
        ("flink", "--runner=DirectRunner", "the runner is chosen by the flag --runner alone"),
    ],
)
def test_wrong_options_are_one_line(corpus, tokenizer_folder, tmp_path, runner, options, message):
    places = [f"memory://none/{i}" for i in range(2)] if runner == "dataflow" else [corpus[0], tmp_path / "set"]
    with pytest.raises(UserError, match=f"^runner_options: {message}"):
        fleet([places[0]], places[1], tokenizer_folder, runner=runner, runner_options=options)
    assert not (tmp_path / "set.unfinished").exists()


def test_a_fleet_that_cannot_be_reached_is_one_line(corpus, tokenizer_folder, tmp_path):
    options = "--job_endpoint=127.0.0.1:1 --job_server_timeout=1"
    with pytest.raises(UserError, match="^spark failed: .*the same command goes on with it$") as caught:
        fleet(corpus, tmp_path / "set", tokenizer_folder, runner="spark", runner_options=options)
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()


def test_of_a_long_error_the_beginning_and_the_end_are_kept():
    assert _shortened("a\n  b") == "a b"
    text = _shortened("Traceback\n" + "x" * 9000 + "\nOSError: no such disk")
    assert text.startswith("Traceback x") and text.endswith("x OSError: no such disk") and len(text) == 1005


@pytest.mark.slow
def test_through_the_interface_of_job_servers_with_workers_that_are_other_processes(
    local, corpus, tokenizer_folder, tmp_path
):
    """Beam's own job server in Python stands for that of Flink, which is a program in Java."""
    worker = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"
    options = f"--job_endpoint=embed --environment_type={SUBPROCESS_SDK} --environment_config='{worker}'"
    fleet(corpus, tmp_path / "set", tokenizer_folder, filters=filters(corpus), runner="flink", runner_options=options)
    assert content(tmp_path / "set") == content(local)


def test_unfinished_files_are_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), fleet_work.storage.whole(str(tmp_path / "folder" / "file")) as file:
        file.write(b"half")
        file.write(b"%d" % (1 // 0))
    assert os.listdir(tmp_path / "folder") == []
    fleet_work.storage.save(str(tmp_path / "value"), {1: 2})
    assert pickle.loads((tmp_path / "value").read_bytes()) == fleet_work.storage.load(str(tmp_path / "value"))
    assert fleet_work.storage.load(str(tmp_path / "none")) is None
