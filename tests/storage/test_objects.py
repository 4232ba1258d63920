"""Tests objects in a bucket: whole, conditional, listed, deleted; with failures in between."""

import os
import re
import threading
import time

import pytest
from bucket import hurry, rule
from etils.epath import backend

from llada_jax.config import UserError
from llada_jax.storage import objects, retries
from llada_jax.storage.retries import Policy, StorageFailed


@pytest.fixture(params=["gs", "s3"])
def bucket(request):
    """Returns an empty bucket in gs://, and then one in s3://."""
    return request.getfixturevalue({"gs": "bucket", "s3": "s3_bucket"}[request.param])


@pytest.fixture
def folder(bucket, monkeypatch) -> str:
    """Returns the address of an empty folder. Failed requests are repeated at once."""
    pytest.importorskip("gcsfs")
    monkeypatch.setattr(retries, "POLICY", Policy(first_wait=0.01, longest_wait=0.02))
    objects.check(bucket.url, "")
    return f"{bucket.url}/runs/one"


def test_whole_objects(folder, tmp_path):
    (tmp_path / "file").write_bytes(b"22")
    objects.write_all(folder, {"b": b"1", "d/e": tmp_path / "file", "d/empty": b""})
    objects.write(f"{folder}0/x", b"of another folder")
    objects.write(f"{folder}-2/x", b"of another folder")
    assert objects.names(folder) == ["b", "d/e", "d/empty"] and objects.names(f"{folder}/d") == ["e", "empty"]
    assert [objects.read(f"{folder}/{name}") for name in ("b", "d/e", "d/empty")] == [b"1", b"22", b""]
    assert objects.exists(f"{folder}/d/empty") and not objects.exists(f"{folder}/d")
    with pytest.raises(FileNotFoundError):
        objects.read(f"{folder}/c")
    objects.delete_all(folder)
    assert objects.names(folder) == [] and objects.read(f"{folder}0/x") and objects.read(f"{folder}-2/x")


def asked(bucket, match: str) -> list[str]:
    """Returns the requests so far that a regular expression is found in."""
    return [what for what, _, _ in bucket.state()["requests"] if re.search(match, what)]


def test_what_makes_a_folder_whole_comes_last_and_goes_first(folder, bucket, tmp_path):
    for name in ("a", "b/manifest", "c", "d/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    objects.upload(tmp_path, folder, last="b/manifest")
    assert objects.names(folder) == ["a", "b/manifest", "c", "d/e"] and objects.read(f"{folder}/d/e") == b"d/e"
    written = asked(bucket, "^(POST|PUT) ")
    assert len(written) == 4 and "b/manifest" in written[-1]
    bucket.reset()
    objects.move_all(folder, f"{folder}-aside", first="b/manifest")
    assert objects.names(folder) == [] and objects.names(f"{folder}-aside") == ["a", "c", "d/e"]
    assert "b/manifest" in asked(bucket, "^(DELETE|POST|PUT) ")[0]


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 2500])
def test_a_large_object_is_copied_in_pieces(folder, tmp_path, monkeypatch, size):
    monkeypatch.setattr(objects, "_PIECE", 1000)
    content = os.urandom(size)
    objects.write(f"{folder}/x", content)
    objects.copy_to(f"{folder}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content


def test_conditional_writes(folder):
    content, absent = objects.read_with_generation(f"{folder}/x")
    first = objects.write_if(f"{folder}/x", b"1", absent)
    assert content is None and first and objects.write_if(f"{folder}/x", b"2", absent) is None
    second = objects.write_if(f"{folder}/x", b"3", first)
    assert second and objects.write_if(f"{folder}/x", b"4", first) is None
    assert objects.read_with_generation(f"{folder}/x") == (b"3", second)
    objects.delete(f"{folder}/x", first)
    assert objects.exists(f"{folder}/x")
    objects.delete(f"{folder}/x", second)
    assert objects.read_with_generation(f"{folder}/x")[0] is None
    assert objects.write_if(f"{folder}/x", b"5", second) is None and not objects.exists(f"{folder}/x")


def test_one_of_many_conditional_writers_wins(folder, bucket):
    _, absent = objects.read_with_generation(f"{folder}/x")
    bucket.faults([rule("status", status=503, rate=0.2), rule("lost", rate=0.2)])
    won = []
    writers = [
        threading.Thread(target=lambda i=i: objects.write_if(f"{folder}/x", b"%d" % i, absent) and won.append(i))
        for i in range(8)
    ]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert len(won) == 1 and objects.read(f"{folder}/x") == b"%d" % won[0]


@pytest.mark.parametrize(
    "fault", [rule("status", status=429, rate=0.4), rule("reset", rate=0.4), rule("lost", rate=0.4)]
)
def test_failures_in_between_do_no_harm(folder, bucket, fault):
    bucket.faults([fault])
    files = {f"d/{i}": os.urandom(i) for i in range(20)}
    objects.write_all(folder, files)
    assert objects.names(folder) == sorted(files)
    assert {name: objects.read(f"{folder}/{name}") for name in files} == files
    objects.delete_all(folder)
    assert objects.names(folder) == [] and bucket.injected() > 10


@pytest.fixture
def impatient(monkeypatch):
    """Lets gcsfs and s3fs wait for only half a second."""
    fsspec = pytest.importorskip("fsspec")
    caches = (objects._prepare.cache_clear, backend._FileSystemSpecBackend._get_filesystem.cache_clear)
    with monkeypatch.context() as patch:
        patch.setattr(objects, "_IDLE_SECONDS", 0.5)
        for name in ("CONNECT_TIMEOUT_SECONDS", "LOW_SPEED_TIME_SECONDS"):
            patch.setenv(f"TENSORSTORE_CURL_{name}", "60")
        hurry(patch)
        patch.setattr(fsspec.config, "conf", {})
        [forget() for forget in caches]
        yield
    [forget() for forget in caches]


def test_requests_for_small_files_that_get_no_answer_are_sent_again(impatient, folder, bucket):
    """Those of gcsfs and s3fs, through which Orbax reads and writes them."""
    path = objects.place(folder) / "x"
    for ask in (lambda: path.write_text("abc"), path.read_text, path.exists, lambda: list(path.parent.iterdir())):
        bucket.reset()
        bucket.faults([rule("hang", times=1, seconds=60)])
        begin = time.monotonic()
        assert ask() and bucket.injected("hang") == 1 and time.monotonic() - begin < 20


def test_what_does_not_pass_is_told_in_one_line(folder, bucket, monkeypatch):
    missing = f"{bucket.url[:5]}no-such/x"
    with pytest.raises(UserError, match=rf"{missing}: there is no such bucket \(NOT_FOUND"):
        objects.write(missing, b"1")
    with pytest.raises(UserError, match=f"{missing}: there is no such bucket"):
        objects.require_bucket(missing)
    objects.require_bucket(folder)
    monkeypatch.setattr(retries, "POLICY", Policy(tries=2, first_wait=0.01))
    bucket.faults([rule("status", status=503)])
    with pytest.raises(StorageFailed, match="failed 2 times in .* last with ValueError: .*503"):
        objects.read(f"{folder}/x")
    bucket.faults([rule("status", status=403)])
    with pytest.raises(UserError, match="runs/one/x: no access"):
        objects.read(f"{folder}/x")
    bucket.reachable(False)
    with pytest.raises(StorageFailed, match="failed 2 times"):
        objects.read(f"{folder}/x")


def test_addresses(monkeypatch):
    assert [objects.is_bucket(path) for path in ("gs://b/x", "runs/one")] == [True, False]
    assert str(objects.place("gs://b/x/") / "y") == "gs://b/x/y" and str(objects.place("x/") / "y") == "x/y"
    for path, message in {
        "az://b/x": "--model=az://b/x: models and runs can lie in gs:// and s3:// only",
        "gs://": "name a bucket",
        "gs:///x": "name a bucket",
    }.items():
        with pytest.raises(UserError, match=message):
            objects.check(path, "--model=")
    monkeypatch.setattr(objects.importlib.util, "find_spec", lambda _: None)
    for path, package in {"gs://b/x": "gcsfs: .*llada_jax.gcs", "s3://b/x": "s3fs: .*llada_jax.s3"}.items():
        with pytest.raises(UserError, match=f"needs the package {package}"):
            objects.check(path, "--model=")
    objects.check("runs/one", "--model=")
