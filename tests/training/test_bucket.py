"""Tests runs whose workdir lies in a bucket: they are the runs of a local workdir, whatever happens in between."""

import json
import os
import random
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from bucket import rule
from paths import SUPPORT
from runs import assert_same_run, terminate, when_done

import llada_jax
from llada_jax.cli import entry_point
from llada_jax.config import CheckpointConfig, UserError
from llada_jax.evaluation.results import identify
from llada_jax.formats import workdir
from llada_jax.formats.conversion import convert
from llada_jax.model.transformer import split
from llada_jax.storage import lease, objects, retries
from llada_jax.storage.lease import Lease
from llada_jax.storage.retries import Policy
from llada_jax.training import home
from llada_jax.training.checkpoint import Checkpoints

KILLS = int(os.environ.get("LLADA_JAX_TEST_KILLS", "3"))
FAULTS = [
    rule("status", status=503, rate=0.03),
    rule("status", status=429, rate=0.03),
    rule("reset", rate=0.02),
    # The emulator forgets a resumable upload as soon as it is complete; Cloud Storage repeats its answer.
    rule("lost", match="^(?!.*uploadType=resumable)", rate=0.02),
]


@pytest.fixture
def place(bucket, monkeypatch, tmp_path) -> str:
    """Returns the address of a workdir. Failed requests are repeated soon, and leases live for a few seconds."""
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "POLICY", Policy(first_wait=0.02, longest_wait=0.1))
    monkeypatch.setattr(lease, "SECONDS", 6.0)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 1.0)
    return f"{bucket.url}/runs/one"


def download(bucket, folder: Path, prefix: str = "runs/one/") -> Path:
    """Copies what is in the bucket to this machine, where it is a workdir like any other."""
    for name in bucket.names(prefix):
        path = folder / name.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.read(name))
    return folder


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
    assert_same_run(download(bucket, tmp_path / "got"), reference)
    assert workdir.steps_in(place) == [5, 7, 10, 15, 20] and "runs/one/lock" not in bucket.names()
    assert len(bucket.read("runs/one/starts.jsonl").splitlines()) == 2
    assert not [name for name in bucket.names() if ".tmp" in name or name.startswith("runs/one/data/")]


def test_what_is_unfinished_or_damaged_is_not_taken_for_whole(run, copy, reference, place, bucket, tmp_path, capfd):
    bucket.upload(copy(15), "runs/one")
    bucket.delete("runs/one/checkpoints/10/commit_success.txt")
    (data,) = [name for name in bucket.names("runs/one/checkpoints/15/state/d/")]
    bucket.write(data, bytes(len(bucket.read(data))))
    assert workdir.steps_in(place) == [5, 15]
    assert run(place) == entry_point.FINISHED
    said = capfd.readouterr().err
    assert "checkpoint 15 is damaged" in said and f"resuming {place} at step 5" in said
    assert_same_run(download(bucket, tmp_path / "got"), reference)
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
    with pytest.raises(UserError, match="s3://b/x: models and runs can lie in gs:// only"):
        run("s3://b/x")


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
    assert_same_run(download(bucket, tmp_path / "there", "runs/two/"), tmp_path / "here")
    assert run(f"{bucket.url}/runs/three", init_from=published, steps=1) == entry_point.FINISHED
    kept = {name.rpartition("/")[2] for name in bucket.names("runs/three/published/")}
    assert {"config.json", "tokenizer.model"} <= kept and "model.safetensors" not in kept


def test_text_is_prepared_into_the_workdir(corpus, run, place, bucket):
    settings = {"data__path": "", "data__input": corpus, "steps": 2}
    assert run(place, **settings) == entry_point.FINISHED
    assert "runs/one/data/manifest.json" in bucket.names()
    assert not list(home.working_copy(objects.place(place)).glob("data*"))
    before = bucket.names("runs/one/data/")
    assert run(place, **settings | {"steps": 4}) == entry_point.FINISHED
    assert bucket.names("runs/one/data/") == before


@pytest.mark.slow
def test_killed_at_random_while_the_storage_fails_the_run_is_the_same(outside, place, bucket, tmp_path):
    flags = [str(SUPPORT / "in_bucket.py"), *tiny.command(place, f"data.path={outside[0] / 'data'}")]
    bucket.faults(FAULTS)
    moments = []
    for _ in range(KILLS):
        process = tiny.start(flags)
        moments.append((random.choice(["parameters", "compiling", "step  3/20"]), random.uniform(0.0, 3.0)))
        for line in process.stderr:
            if moments[-1][0] in line:
                break
        time.sleep(moments[-1][1])
        process.kill()
        process.communicate()
    process = tiny.start(flags)
    errors = process.communicate()[1]
    assert process.returncode == 0, (moments, errors)
    assert bucket.injected() > 20
    assert_same_run(download(bucket, tmp_path / "got"), outside[0])
    assert workdir.steps_in(place) == [15, 20] and "runs/one/lock" not in bucket.names()
    print(moments, bucket.injected(), len(bucket.state()["requests"]))
