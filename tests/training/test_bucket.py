"""Tests runs whose workdir lies in a bucket: they are the runs of a local workdir, whatever happens in between."""

import importlib.util
import io
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from bucket import rule
from paths import SUPPORT
from runs import assert_same_run, terminate, wait_for, when_done

import llada_jax
from llada_jax.cli import entry_point
from llada_jax.config import CheckpointConfig, UserError
from llada_jax.devices import mesh as meshes
from llada_jax.evaluation.results import identify
from llada_jax.formats import workdir
from llada_jax.formats.conversion import convert
from llada_jax.model.transformer import split
from llada_jax.storage import lease, objects, retries
from llada_jax.storage.lease import Lease, LeaseLost
from llada_jax.storage.retries import Policy, StorageFailed
from llada_jax.training import home
from llada_jax.training.checkpoint import Checkpoints

FAULTS = [
    rule("status", status=503, rate=0.03),
    rule("status", status=429, rate=0.03),
    rule("reset", rate=0.02),
    # The emulator forgets a resumable upload as soon as it is complete; Cloud Storage repeats its answer.
    rule("lost", match="^(?!.*uploadType=resumable)", rate=0.02),
]

STALLS = [rule("hang", rate=0.05, times=3), rule("slow", rate=0.1, times=10, rate_bytes=20_000)]


def records(bucket) -> list[int]:
    return [json.loads(line)["step"] for line in bucket.read("runs/one/metrics.jsonl").splitlines()]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_of_a_local_workdir(run, reference, place, bucket, tmp_path):
    bucket.faults(FAULTS)
    with when_done(7, terminate):
        assert run(place, checkpoint__keep=5) == entry_point.PREEMPTED
    assert workdir.steps_in(place) == [5, 7]
    assert run(place, checkpoint__keep=5) == entry_point.FINISHED
    assert bucket.injected() > 10
    assert_same_run(bucket.download("runs/one", tmp_path / "got"), reference)
    assert workdir.steps_in(place) == [5, 7, 10, 15, 20] and "runs/one/lock" not in bucket.names()
    assert len(bucket.read("runs/one/starts.jsonl").splitlines()) == 2
    assert not [name for name in bucket.names() if ".tmp" in name or name.startswith("runs/one/data/")]


def test_what_is_unfinished_or_damaged_is_not_taken_for_whole(run, copy, reference, place, bucket, tmp_path, capfd):
    bucket.upload(copy(15), "runs/one")
    bucket.delete("runs/one/lock")  # that of the local run would be waited for
    bucket.delete("runs/one/checkpoints/10/commit_success.txt")
    (data,) = [name for name in bucket.names("runs/one/checkpoints/15/state/d/")]
    bucket.write(data, bytes(len(bucket.read(data))))
    assert workdir.steps_in(place) == [5, 15]
    assert run(place) == entry_point.FINISHED
    said = capfd.readouterr().err
    assert "checkpoint 15 is damaged" in said and f"resuming {place} at step 5" in said
    assert_same_run(bucket.download("runs/one", tmp_path / "got"), reference)
    assert workdir.steps_in(place) == [15, 20]  # config.checkpoint.keep=2
    assert (
        bucket.read(data.replace("checkpoints/15", "damaged/15"))
        and "damaged/15/commit_success.txt" not in bucket.names()
    )
    assert records(bucket) == [3, 6, 7, 9, 12, 14, 15, 18, 20]


def test_what_is_unfinished_is_gone_before_the_checkpoints_are_listed(copy, place, bucket):
    bucket.upload(copy(5), "runs/one")
    bucket.delete("runs/one/checkpoints/5/commit_success.txt")
    checkpoints = Checkpoints(place, CheckpointConfig())
    assert bucket.names("runs/one/checkpoints/") == [] and checkpoints.steps() == []
    checkpoints.close()


def test_a_storage_that_fails_is_not_a_damaged_checkpoint(copy, place, bucket):
    bucket.upload(copy(10), "runs/one")
    checkpoints, (config, _) = Checkpoints(place, CheckpointConfig()), workdir.read_config(place)
    bucket.faults([rule("status", status=403, match="GET .*checkpoints/10/state/")])  # others are repeated for minutes
    with pytest.raises(StorageFailed, match="Forbidden"):
        checkpoints.restore(config, meshes.one_device_mesh(), print)
    bucket.reset()
    checkpoints.close()
    assert workdir.steps_in(place) == [5, 10] and not bucket.names("runs/one/damaged")


def test_the_working_copy_is_that_of_the_bucket(place, bucket):
    path, there = objects.place(place), {"runs/one/samples.txt", "runs/one/lock"}
    left = home.working_copy(path) / "metrics.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text("of a run that was here before")
    bucket.write("runs/one/samples.txt", b"text")
    workdir_home = home.BucketHome(path, "--workdir", print)
    assert not left.exists() and (left.parent / "samples.txt").read_text() == "text"
    for name in ("starts.jsonl", "config.tmp", "data/rows", "tensorboard/events"):
        (left.parent / name).parent.mkdir(exist_ok=True)
        (left.parent / name).write_text("new")
    bucket.reset()
    workdir_home.upload()
    assert set(bucket.names()) == there | {"runs/one/starts.jsonl", "runs/one/tensorboard/events"}
    assert bucket.count("POST .*samples.txt") == 0  # it has not changed
    (left.parent / "starts.jsonl").unlink()
    workdir_home.upload()
    assert set(bucket.names()) == there | {"runs/one/tensorboard/events"}
    bucket.write("runs/one/lock", b"of another owner")
    (left.parent / "samples.txt").write_text("more text")
    workdir_home.lease._renew()
    with pytest.raises(LeaseLost):
        workdir_home.upload()
    workdir_home.close()
    assert bucket.read("runs/one/samples.txt") == b"text" and bucket.read("runs/one/lock") == b"of another owner"


def test_one_owner_and_an_owner_that_has_lost_its_lease_stops(run, place, bucket, capfd):
    other = Lease(f"{place}/lock", "--workdir", print)
    with pytest.raises(UserError, match=f"--workdir={place} is in use by another process"):
        run(place)
    other.release()
    assert bucket.names() == []

    def taken_over() -> None:
        assert records(bucket) == [3, 6, 7, 9]  # they reach as far as checkpoint 10
        bucket.write("runs/one/lock", b'{"owner": "another", "time": 9e9}')
        time.sleep(2.5)

    with when_done(12, taken_over):
        assert run(place) == entry_point.FAILURE
    assert f"stopped: --workdir={place} was taken over by another process" in capfd.readouterr().err
    assert lease.mark_of(f"{place}/lock") == "another"
    assert workdir.steps_in(place) == [5, 10] and records(bucket) == [3, 6, 7, 9]


def test_a_storage_that_stays_away_ends_the_run_in_one_line(run, place, bucket, monkeypatch, capfd):
    monkeypatch.setattr(retries, "POLICY", Policy(tries=3, first_wait=0.01))

    def away() -> None:
        while workdir.steps_in(place) != [5, 10]:  # otherwise Orbax would repeat the requests of this save for minutes
            time.sleep(0.1)
        bucket.faults([rule("status", status=503)])

    with when_done(12, away):
        assert run(place) == entry_point.FAILURE
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stopped: gs://") and "the storage failed 3 times in" in said
    bucket.reset()
    with pytest.raises(UserError, match="az://b/x: models and runs can lie in gs:// and s3:// only"):
        run("az://b/x")


def same(model, other) -> bool:
    ours, theirs = jax.tree.leaves(split(model)[1]), jax.tree.leaves(split(other)[1])
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(ours, theirs, strict=True))


def test_models_in_a_bucket(run, reference, place, bucket, tmp_path, capfd):
    bucket.upload(reference, "runs/one")
    wanted, tokenizer = llada_jax.load(reference)
    found = llada_jax.load(place)
    assert same(found[0], wanted) and found[1].sha256 == tokenizer.sha256
    assert same(llada_jax.load(place, step=10)[0], llada_jax.load(reference, step=10)[0])
    published, again = f"{bucket.url}/published", f"{bucket.url}/weights"
    convert(place, published, "huggingface")
    convert(reference, tmp_path / "published", "huggingface")
    assert {name.removeprefix("published/"): bucket.read(name) for name in bucket.names("published/")} == {
        path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()
    }
    convert(published, again, "orbax")
    for path in (published, again):
        model, ids = llada_jax.load(path)
        assert same(model, wanted) and ids.sha256 == tokenizer.sha256
        with pytest.raises(UserError, match="exists: name another folder"):
            convert(place, path, "orbax")
    bucket.delete("weights/checkpoints/0/commit_success.txt")
    with pytest.raises(UserError, match="no checkpoint yet"):
        llada_jax.load(again)
    assert identify(place)["step"] == 20 and identify(published) == identify(published)
    with pytest.raises(UserError, match=f"model {bucket.url}/nothing has no model"):
        llada_jax.load(f"{bucket.url}/nothing")
    capfd.readouterr()
    branch = {"init_step": 15, "steps": 17, "optimizer__schedule": ((0, 0.1), (17, 0.1))}
    assert run(tmp_path / "here", init_from=str(reference), **branch) == entry_point.FINISHED
    assert run(f"{bucket.url}/runs/two", init_from=place, **branch) == entry_point.FINISHED
    assert f"branching from {place} at step 15" in capfd.readouterr().err
    assert_same_run(bucket.download("runs/two", tmp_path / "there"), tmp_path / "here")
    assert run(f"{bucket.url}/runs/three", init_from=published, steps=1) == entry_point.FINISHED
    kept = {name.rpartition("/")[2] for name in bucket.names("runs/three/published/")}
    assert {"config.json", "tokenizer.model"} <= kept and "model.safetensors" not in kept


def test_commands(reference, place, bucket, command, monkeypatch, tmp_path):
    """The commands do with what lies in a bucket what they do with the same folder on this machine."""
    bucket.upload(reference, "runs/one")
    made = [(place, tmp_path / "published"), (tmp_path / "published", f"{bucket.url}/published")]
    made += [(f"{bucket.url}/published", tmp_path / "weights"), (tmp_path / "weights", f"{bucket.url}/weights")]
    for (source, output), form in zip(made, ("huggingface", "huggingface", "orbax", "orbax"), strict=True):
        code, _, said = command("convert", f"--input={source}", f"--output={output}", f"--format={form}")
        assert code == 0 and f"{output} is written" in said, said
    couplets = tmp_path / "couplets.json"
    couplets.write_text(json.dumps([{"first": "the fox sang", "second": "a tree walked"}]))
    short = ("--steps=2", "--gen_length=4", "--block_length=4", "--temperature=0.5")

    def output(model: str | Path, name: str, *flags: str) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the child\n")))
        code, printed, said = command(name, f"--model={model}", *short, *flags)
        assert code == 0 and printed, said
        return printed

    tasks = ("--tasks=reversal", f"--data={couplets}", f"--output={tmp_path / 'results.json'}")
    for name, *flags in (("sample", "--prompt=the fox"), ("chat", "--json"), ("evaluate", *tasks)):
        assert output(place, name, *flags) == output(reference, name, *flags)
        if name == "sample":
            assert output(f"{bucket.url}/published", name, *flags) == output(reference, name, *flags)
    assert same(llada_jax.load(f"{bucket.url}/weights")[0], llada_jax.load(reference)[0])
    code, page, said = command("report", f"--workdir={place}", f"--output={tmp_path / 'report.html'}")
    assert code == 0 and page == command("report", f"--workdir={reference}")[1].replace(str(reference), place), said
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    "name, flag, others",
    [
        ("sample", "model", ["--prompt=x"]),
        ("chat", "model", []),
        ("evaluate", "model", ["--tasks=reversal", "--data=none.json", "--output=out.json"]),
        ("convert", "input", ["--output=out", "--format=orbax"]),
        ("convert", "output", ["--input=in", "--format=orbax"]),
        ("report", "workdir", []),
    ],
)
def test_a_wrong_address_is_one_line(command, bucket, place, monkeypatch, tmp_path, name, flag, others):
    monkeypatch.chdir(tmp_path)

    def told(address: str) -> str:
        code, printed, said = command(name, f"--{flag}={address}", *others)
        assert code == 2 and not printed and said.count("\n") == 1 and said.startswith("error: "), said
        return said

    assert "gs://no-such-bucket/run: there is no such bucket" in told("gs://no-such-bucket/run")
    assert "az://b/run: models and runs can lie in gs:// and s3:// only" in told("az://b/run")
    if flag != "output":
        assert f"{place} " in told(place)  # nothing is there
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else find(name, *rest))
    assert f"{place} needs the package gcsfs: pip install" in told(place)
    assert not list(tmp_path.glob("*/")) or list(tmp_path.glob("*/")) == [tmp_path / "cache"]


def test_text_is_prepared_into_the_workdir(corpus, run, place, bucket):
    settings = {"data__path": "", "data__input": corpus, "steps": 2}
    assert run(place, **settings) == entry_point.FINISHED
    assert "runs/one/data/manifest.json" in bucket.names()
    assert not list(home.working_copy(objects.place(place)).glob("data*"))
    before = bucket.names("runs/one/data/")
    assert run(place, **settings | {"steps": 4}) == entry_point.FINISHED
    assert bucket.names("runs/one/data/") == before


@pytest.mark.slow
def test_killed_while_it_saves_the_run_is_the_same(outside, place, bucket, tmp_path):
    """A process dies while an array of a checkpoint is sent, another one before the mark that completes it."""
    flags = [str(SUPPORT / "in_bucket.py"), *tiny.command(place, f"data.path={outside[0] / 'data'}")]
    half = "runs/one/checkpoints/10/"

    def start(*held: dict):
        bucket.faults([*held, *FAULTS])
        return tiny.start(flags)

    def kill(process) -> None:
        process.kill()
        process.communicate()

    for moment in (rf"P(OS|U)T .*{half}state/ocdbt.process_0/d/", rf"P(OS|U)T .*{half}commit_success.txt"):
        process = start(rule("hang", match=moment))
        if f"{half}commit_success" in moment:
            assert "resuming" in wait_for(process, f"resuming {place} at step 5")
            assert bucket.names(half) == []  # what the last start left has been removed
        while not bucket.injected("hang"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        kill(process)
        assert workdir.steps_in(place) == [5]
        if f"{half}commit_success" in moment:  # at the other one, the array may be the first of the objects
            assert bucket.names(half)
        bucket.reset()
    process = start(*STALLS)
    errors = process.communicate()[1]
    assert process.returncode == 0 and f"resuming {place} at step 5" in errors, errors
    assert bucket.injected() > 5 and bucket.injected("hang") and bucket.injected("slow")
    assert_same_run(bucket.download("runs/one", tmp_path / "got"), outside[0])
    assert workdir.steps_in(place) == [15, 20] and "runs/one/lock" not in bucket.names()
