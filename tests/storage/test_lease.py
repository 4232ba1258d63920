"""Tests that a folder of a bucket has one owner, which a dead owner ceases to be, and that a slow owner notices."""

import json
import subprocess
import time
import types

import pytest
from bucket import rule

from llada_jax.config import UserError
from llada_jax.storage import lease, objects, retries
from llada_jax.storage.lease import Lease, LeaseLost
from llada_jax.storage.retries import Policy, StorageFailed


@pytest.fixture
def path(bucket, monkeypatch) -> str:
    """Returns the address of a lease. Leases live for 1.2 seconds."""
    monkeypatch.setattr(retries, "POLICY", Policy(tries=5, first_wait=0.01, longest_wait=0.02))
    monkeypatch.setattr(lease, "SECONDS", 1.2)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    return f"{bucket.url}/run/lock"


def killed(owner: Lease) -> None:
    """Ends the renewals, as if the process had been killed or frozen."""
    owner._end.set()
    owner._thread.join()


def test_one_owner_at_a_time(path):
    said = []
    first = Lease(path, "--workdir=x", said.append)
    with pytest.raises(UserError, match="--workdir=x is in use by another process"):
        Lease(path, "--workdir=x", said.append)
    assert len(said) == 1 and said[0].startswith(f"--workdir=x was in use by {first.mark}: waiting for at most")
    assert lease.mark_of(path) == first.mark
    time.sleep(0.5)
    assert json.loads(objects.read(path))["renewals"] > 1
    first.confirm()
    first.release()
    assert lease.mark_of(path) is None
    begin = time.monotonic()
    Lease(path, "--workdir=x", said.append).release()
    assert time.monotonic() - begin < 1.0 and len(said) == 1


def test_a_storage_without_conditional_writes_is_refused(s3_bucket, monkeypatch):
    path = f"{s3_bucket.url}/run/lock"
    Lease(path, "--workdir=x", print).release()
    assert s3_bucket.names() == []
    write_if = objects.write_if
    monkeypatch.setattr(objects, "write_if", lambda path, content, generation: write_if(path, content, None))
    with pytest.raises(UserError, match="--workdir=x: this storage does not keep conditional writes"):
        Lease(path, "--workdir=x", print)
    assert s3_bucket.names() == []


def test_a_dead_owner_loses_its_lease_and_notices_if_it_was_only_slow(path, monkeypatch):
    slow = Lease(path, "--workdir=x", print)
    killed(slow)
    begin = time.monotonic()
    second = Lease(path, "--workdir=x", print)
    assert 0.7 < time.monotonic() - begin < 3
    slow.check()  # it does not know yet
    with pytest.raises(LeaseLost, match="--workdir=x was taken over by another process"):
        slow.confirm()
    with pytest.raises(LeaseLost):
        slow.check()
    slow.release()
    second.confirm()
    assert lease.mark_of(path) == second.mark
    killed(second)
    later = vars(time) | {"time": lambda: time.time() + 1.3}
    monkeypatch.setattr(lease, "time", types.SimpleNamespace(**later))
    begin = time.monotonic()
    Lease(path, "--workdir=x", print).release()  # the lease is older than SECONDS: no waiting
    assert time.monotonic() - begin < 0.7


def test_an_owner_that_was_killed_on_this_machine_is_not_waited_for(path, monkeypatch):
    """An owner elsewhere is, although no process here has its number."""
    monkeypatch.setattr(lease, "SECONDS", 0.4)
    process = subprocess.Popen(["sleep", "60"])
    with monkeypatch.context() as patch:
        patch.setattr(lease.os, "getpid", lambda: process.pid)
        owner = Lease(path, "--workdir=x", print)
        killed(owner)
    record = json.loads(objects.read(path))

    def is_waited_for() -> bool:
        said = []
        objects.write(path, json.dumps(record | {"time": time.time()}).encode())
        Lease(path, "--workdir=x", said.append).release()
        return bool(said)

    assert is_waited_for()  # it lives
    process.kill()
    process.wait()
    assert not is_waited_for()
    with monkeypatch.context() as patch:
        patch.setattr(lease.platform, "node", lambda: "another machine")
        assert is_waited_for()
    del record["processes"]  # as written before there was this field
    assert is_waited_for()


def test_one_of_several_processes_is_waited_for(path, monkeypatch):
    """The others may live on for a while."""
    monkeypatch.setattr(lease, "SECONDS", 0.4)
    process = subprocess.Popen(["true"])
    process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(lease.os, "getpid", lambda: process.pid)
        killed(Lease(path, "--workdir=x", print, alone=False))
    said = []
    Lease(path, "--workdir=x", said.append).release()
    assert said


def test_an_owner_that_ends_is_not_waited_for(path):
    first = Lease(path, "--workdir=x", print)
    Lease(path, "--workdir=x", lambda _: first.release()).release()


def test_failures_in_between_and_a_storage_that_is_away_for_a_while(path, bucket, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.1)
    owner = Lease(path, "--workdir=x", print)
    bucket.faults([rule("status", status=503, rate=0.3), rule("lost", rate=0.3)])
    time.sleep(0.5)
    owner.confirm()
    bucket.reachable(False)
    time.sleep(0.6)
    with pytest.raises(StorageFailed):
        owner.confirm()
    owner.check()  # a run goes on meanwhile
    bucket.reset()
    owner.confirm()  # nobody has taken it over
    assert lease.mark_of(path) == owner.mark
    owner.release()


def test_a_lock_that_is_no_lease_is_waited_for(path, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.4)
    objects.write(path, b"?")
    begin = time.monotonic()
    Lease(path, "--workdir=x", print).release()
    assert time.monotonic() - begin > 0.3
