"""Tests copies of folders of a bucket: made once, whole or not at all, and made anew if an object has changed."""

import pytest
from bucket import rule

from llada_jax.storage import copies, objects, retries
from llada_jax.storage.retries import Policy, StorageFailed


def test_a_copy_is_made_once_and_whole(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(retries, "POLICY", Policy(tries=2, first_wait=0.01))
    folder, said = f"{bucket.url}/m", []
    files = {"config.json": b"{}", "code/a.py": b"1", "x.safetensors": b"w", "empty": b"", "no": b"n"}
    objects.write_all(
        folder, {"config.json": b"{}", "code/a.py": b"1", "x.safetensors": b"w", "empty": b"", "no": b"n"}
    )

    def copy():
        return copies.local_copy(folder, lambda name: name != "no", said.append, ("checkpoints",))

    bucket.faults([rule("status", status=503, match="GET .*x.safetensors.* bytes=0-6")])  # not the look at its stamp
    with pytest.raises(StorageFailed):
        copy()
    bucket.reset()
    found = copy()
    files = {str(path.relative_to(found)) for path in found.rglob("*")}
    assert files == {"config.json", "code", "code/a.py", "x.safetensors", "empty", "checkpoints", ".complete"}
    assert (found / "x.safetensors").read_bytes() == b"w" and (found / "empty").read_bytes() == b""
    assert said == [f"copying {folder} to {found}"] * 2  # the first one was not finished
    bucket.reset()
    assert copy() == found and len(said) == 2
    objects.write(f"{folder}/x.safetensors", b"v")
    assert (copy() / "x.safetensors").read_bytes() == b"v" and len(said) == 3
