"""Tests that a run in s3:// is the run of a local workdir, with SIGTERM, failing requests and damage in between."""

import pytest
from runs import assert_same_run, terminate, when_done

import llada_jax
from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.formats import orbax_s3, workdir
from llada_jax.formats.conversion import convert

from .test_bucket import FAULTS, same
from .test_bucket import test_killed_while_it_saves_the_run_is_the_same as test_killed_in_s3  # noqa: F401


@pytest.fixture
def bucket(s3_bucket):
    """Returns an empty bucket in s3://, for the fixture `place`, too."""
    return s3_bucket


def test_a_run_in_s3_is_the_run_of_a_local_workdir(run, prepared, reference, place, bucket, tmp_path, capfd):
    bucket.upload(prepared, "set")
    settings = {
        "data__path": f"{bucket.url}/set",
        "data__cache": str(tmp_path / "rows"),
        "checkpoint__keep": 1,
        "checkpoint__permanent_every": 10,
    }
    bucket.faults(FAULTS)
    with when_done(12, terminate):
        assert run(place, **settings) == entry_point.PREEMPTED
    assert workdir.steps_in(place) == [10, 12]
    bucket.reset()
    # One file, and perhaps one more that was written although the answer was lost.
    for data in bucket.names("runs/one/checkpoints/12/state/d/"):
        bucket.write(data, bytes(len(bucket.read(data))))
    bucket.write("runs/one/checkpoints/15/state/manifest.ocdbt", b"by a start that was killed while it saved")
    bucket.faults(FAULTS)
    assert run(place, **settings) == entry_point.FINISHED
    said = capfd.readouterr().err
    assert "checkpoint 12 is damaged" in said and f"resuming {place} at step 10" in said
    assert "rows are read in place" in said and not list((tmp_path / "rows").rglob("*.arrayrecord"))
    assert bucket.injected() > 10
    bucket.reset()
    assert_same_run(bucket.download("runs/one", tmp_path / "got"), reference)
    assert workdir.steps_in(place) == [10, 20] and "runs/one/lock" not in bucket.names()
    assert bucket.names("runs/one/damaged/12/") and not bucket.count("GET .*_CHECKPOINT_METADATA.tmp")
    assert same(llada_jax.load(place)[0], llada_jax.load(reference)[0])
    convert(place, f"{bucket.url}/published", "huggingface")
    assert same(llada_jax.load(f"{bucket.url}/published")[0], llada_jax.load(reference)[0])


def test_an_orbax_without_the_functions_that_are_replaced_is_one_line(run, place, monkeypatch):
    monkeypatch.setattr(orbax_s3, "_teach", lambda: False)
    with pytest.raises(UserError, match="^s3://.*: checkpoints cannot be in s3:// with Orbax .*: install Orbax"):
        run(place)
