"""Tests that a run in a bucket is the run of a local workdir although it is killed many times, at random moments.

    LLADA_JAX_TEST_KILLS=20 pytest -s -m slow tests/training/test_kills.py -k s3

The storage fails in between. It prints the moments of the kills and what was injected. Without the variable it is
skipped, because each kill takes about 20 seconds: test_bucket.py kills runs at the two moments that matter most.
"""

import collections
import os
import random
import time

import pytest
import tiny
from bucket import rule
from paths import SUPPORT
from runs import assert_same_run, wait_for

from llada_jax.formats import workdir

from .test_bucket import FAULTS

KILLS = int(os.environ.get("LLADA_JAX_TEST_KILLS", "0"))
STEPS = 20 + 10 * KILLS  # more than the killed starts can do
STALLS = [rule("hang", rate=0.05, times=1), rule("slow", rate=0.1, times=5, rate_bytes=20_000)]
# A line that a start prints, and the most seconds that it lives on; "saving": a checkpoint is on its way.
MOMENTS = [("parameters", 3.0), ("compiling", 6.0), (f"/{STEPS}", 12.0), ("saving", 0.3), ("saving", 6.0)]


@pytest.fixture(params=["gs", "s3"])
def bucket(request):
    """Returns an empty bucket in gs://, and then one in s3://, for the fixture `place`, too."""
    return request.getfixturevalue({"gs": "bucket", "s3": "s3_bucket"}[request.param])


@pytest.mark.slow
@pytest.mark.skipif(not KILLS, reason="LLADA_JAX_TEST_KILLS does not say how many kills are wanted")
def test_killed_many_times(prepared, place, bucket, tmp_path):
    settings = (f"data.path={prepared}", f"steps={STEPS}")
    local = tiny.start(["-m", "llada_jax.train", *tiny.command(tmp_path / "local", *settings)])
    errors = local.communicate()[1]
    assert local.returncode == 0, errors
    flags = [str(SUPPORT / "in_bucket.py"), *tiny.command(place, *settings)]
    seen, unfinished_after = collections.Counter(), 0

    def start():
        bucket.reset()
        bucket.faults([*STALLS, *FAULTS], seed=random.getrandbits(32))
        return tiny.start(flags)

    def count() -> None:
        seen.update(kind or "passed" for _, _, kind in bucket.state()["requests"])

    def unfinished() -> list[str]:
        """Returns the steps of the checkpoints that are not complete."""
        there = {name.split("/")[3] for name in bucket.names("runs/one/checkpoints/")}
        return sorted(there - {str(step) for step in workdir.steps_in(place)})

    for number in range(KILLS):
        process = start()
        moment, longest = random.choice(MOMENTS)
        if moment == "saving":
            while not bucket.count(r"^P(OS|U)T .*runs/one/checkpoints/\d+/state"):
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
        said = "" if moment == "saving" else wait_for(process, moment)
        seconds = random.uniform(0, longest)
        time.sleep(seconds)
        process.kill()
        said += process.communicate()[1]
        assert process.returncode == -9 and "Traceback" not in said, said
        count()
        bucket.reset()
        unfinished_after += bool(unfinished())
        kept = f"complete {workdir.steps_in(place)}, unfinished {unfinished()}"
        print(f"kill {number + 1}: {moment} + {seconds:.2f} s, {kept}", flush=True)
    process = start()
    errors = process.communicate()[1]
    assert process.returncode == 0 and "Traceback" not in errors, errors
    count()
    bucket.reset()
    assert_same_run(bucket.download("runs/one", tmp_path / "got"), tmp_path / "local")
    assert len(workdir.steps_in(place)) == 2 and not unfinished() and "runs/one/lock" not in bucket.names()
    print(f"{KILLS} kills, {unfinished_after} of which left an unfinished checkpoint; requests: {dict(seen)}")
