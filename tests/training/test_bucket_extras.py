"""Tests what a run in a bucket does beside training: low-rank adapters, a profile, and Weights & Biases."""

import importlib.machinery
import shutil
import sys
import types
from pathlib import Path

import pytest
from runs import assert_same_run, terminate, when_done

import llada_jax
from llada_jax.cli import entry_point
from llada_jax.formats import workdir
from llada_jax.formats.conversion import convert
from llada_jax.storage import objects
from llada_jax.training import home

from .test_bucket import FAULTS, same

ADAPTED = {"model__lora__rank": 4, "steps": 10, "validation__every": 5, "checkpoint__keep": 5}


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_adapters_of_a_model_in_a_bucket_are_those_of_local_folders(run, reference, place, bucket, tmp_path):
    assert run(tmp_path / "local", init_from=str(reference), **ADAPTED) == entry_point.FINISHED
    bucket.upload(reference, "source")
    bucket.write("runs/one/frozen/checkpoints/0/left", b"by a start that was killed before its first checkpoint")
    bucket.faults(FAULTS)
    adapting = {"init_from": f"{bucket.url}/source", **ADAPTED}
    with when_done(7, terminate):
        assert run(place, **adapting) == entry_point.PREEMPTED
    for name in bucket.names("source/"):
        bucket.delete(name)  # the workdir is complete without its source
    assert run(place, **adapting) == entry_point.FINISHED
    assert bucket.injected() > 5 and "runs/one/frozen/checkpoints/0/left" not in bucket.names()
    bucket.reset()
    assert_same_run(bucket.download("runs/one", tmp_path / "got"), tmp_path / "local")
    assert same(llada_jax.load(place)[0], llada_jax.load(tmp_path / "local")[0])
    for source, output in ((tmp_path / "local", tmp_path / "merged"), (place, f"{bucket.url}/merged")):
        convert(source, output, "huggingface")
    assert published(bucket.download("merged", tmp_path / "there")) == published(tmp_path / "merged")
    shutil.rmtree(tmp_path / "cache")
    assert run(f"{bucket.url}/runs/two", init_from=f"{bucket.url}/merged", **ADAPTED | {"steps": 1}) == 0
    assert workdir.steps_in(f"{bucket.url}/runs/two/frozen") == [0]


class Run:
    """Does what an offline run of wandb does in a folder: files that grow, others that are removed, and links."""

    def __init__(self, *, project: str, id: str | None, resume: str, dir: str, config: dict):
        assert (project, resume) == ("trial", "allow") and config["steps"] == 10
        self.id, self.given, self.logged = id or "abc", id, []
        root = Path(dir) / "wandb"
        self.folder = root / f"offline-run-{len(list(root.glob('offline-run-*')))}-{self.id}-{bool(id)}"
        self.folder.mkdir(parents=True)
        (root / "latest-run").unlink(missing_ok=True)
        (root / "latest-run").symlink_to(self.folder.name)
        (root / "debug.log").unlink(missing_ok=True)
        (root / "debug.log").symlink_to(self.folder / "run.wandb")

    def log(self, values: dict, step: int) -> None:
        self.logged.append(step)
        with (self.folder / "run.wandb").open("a") as file:
            file.write(f"{step}\n")

    def finish(self) -> None:
        with (self.folder / "run.wandb").open("a") as file:
            file.write("end\n")


def test_wandb_and_a_profile(run, place, bucket, monkeypatch):
    """Both reach the bucket, and a resumed run goes on with its run of wandb."""
    runs = []

    def init(**settings):
        runs.append(Run(**settings))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init, module.Settings, module.__spec__ = (
        init,
        lambda **_: None,
        importlib.machinery.ModuleSpec("wandb", None),
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", module)
    settings = {"logging__wandb_project": "trial", "steps": 10, "profile__first_step": 3, "profile__steps": 2}
    with when_done(7, terminate):
        assert run(place, **settings) == entry_point.PREEMPTED
    shutil.rmtree(home.working_copy(objects.place(place)))  # the next start is on another machine
    assert run(place, **settings) == entry_point.FINISHED
    assert [each.given for each in runs] == [None, "abc"] and bucket.read("runs/one/wandb_id") == b"abc"
    names = bucket.names("runs/one/wandb/")
    assert names == [f"runs/one/wandb/offline-run-0-abc-{known}/run.wandb" for known in (False, True)]
    steps = [bucket.read(name).decode().split() for name in names]
    assert steps == [[*map(str, each.logged), "end"] for each in runs] and runs[1].logged[0] > 7
    (trace,) = [name for name in bucket.names("runs/one/profile/") if name.endswith(".xplane.pb")]
    assert len(bucket.read(trace)) > 1000


def test_a_file_that_another_program_removes_is_no_failure(place, bucket, monkeypatch):
    there = home.BucketHome(objects.place(place), "--workdir", pytest.fail)
    write_all, asked = objects.write_all, []
    for name in ("metrics.jsonl", "passing"):
        (there.folder / name).write_text(name)

    def removed_meanwhile(folder, files) -> set[str]:
        asked.append(sorted(files))
        (there.folder / "passing").unlink(missing_ok=True)
        return write_all(folder, files)

    monkeypatch.setattr(objects, "write_all", removed_meanwhile)
    there.upload()
    assert asked == [["metrics.jsonl", "passing"]]  # what is still there is not sent again
    there.close()
    assert bucket.names() == ["runs/one/metrics.jsonl"]
