"""Reads a prepared set with the real gcsfs, from a server on this machine that answers like Cloud Storage."""

import http.server
import json
import os
import threading
import urllib.parse
from pathlib import Path

import pytest
import tiny
from etils.epath import backend

from llada_jax.config import UserError
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.data.read.remote import local_copy


class Storage(http.server.BaseHTTPRequestHandler):
    """Answers what gcsfs asks of the JSON API: the description, the content and the list of objects."""

    root: Path  # of all buckets
    broken = ""  # the name of an object that the server refuses

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        _, _, rest = url.path.partition("/b/")
        bucket, _, name = rest.partition("/o")
        name = urllib.parse.unquote(name.lstrip("/"))
        if name and name == self.broken:
            return self._answer(403, b'{"error": {"code": 403, "message": "no access"}}')
        folder = self.root / bucket
        if not name:
            found = [self._about(bucket, path) for path in sorted(folder.rglob("*")) if path.is_file()]
            prefix = query.get("prefix", "")
            found = [item for item in found if item["name"].startswith(prefix)]
            prefixes = set()
            if delimiter := query.get("delimiter"):
                deeper = [item for item in found if delimiter in item["name"][len(prefix) :]]
                prefixes = {prefix + item["name"][len(prefix) :].split(delimiter)[0] + delimiter for item in deeper}
                found = [item for item in found if item not in deeper]
            return self._answer(200, json.dumps({"items": found, "prefixes": sorted(prefixes)}).encode())
        if not (folder / name).is_file():
            return self._answer(404, b'{"error": {"code": 404, "message": "not found"}}')
        if query.get("alt") != "media" and "/download/" not in url.path:
            return self._answer(200, json.dumps(self._about(bucket, folder / name)).encode())
        content, status = (folder / name).read_bytes(), 200
        if "bytes=" in (wanted := self.headers.get("Range", "")):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            content, status = content[int(start) : int(end or len(content)) + 1], 206
        self._answer(status, content)

    def _about(self, bucket: str, path: Path) -> dict[str, str]:
        name, time = str(path.relative_to(self.root / bucket)), "2025-01-01T00:00:00.000Z"
        return {"kind": "storage#object", "name": name, "bucket": bucket, "size": str(path.stat().st_size),
                "generation": "1", "updated": time, "timeCreated": time}  # fmt: skip

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Returns the folder that stands behind gs://bucket."""
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install 'llada_jax[gcs]'")
    Storage.root, Storage.broken = tmp_path / "buckets", ""
    (Storage.root / "bucket").mkdir(parents=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # do not ask the network for credentials
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    forget = backend._FileSystemSpecBackend._get_filesystem.cache_clear
    forget(), gcsfs.GCSFileSystem.clear_instance_cache()
    yield Storage.root / "bucket"
    forget(), gcsfs.GCSFileSystem.clear_instance_cache()
    server.shutdown()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_is_copied_with_gcsfs(bucket, tmp_path):
    corpus = tiny.write_corpus(tmp_path / "corpus.jsonl", 300)
    prepare([corpus], bucket / "set", train_tokenizer=320, sequence_length=32, workers=1, shard_rows=50, progress=False)
    folder = local_copy("gs://bucket/set", str(tmp_path / "cache"), lambda line: None)
    assert files(Path(folder)) == files(bucket / "set") and len(files(Path(folder))) > 3
    with pytest.raises(UserError, match="gs://bucket/none is not a prepared set, because it has no manifest.json"):
        local_copy("gs://bucket/none", str(tmp_path / "cache"))
    Storage.broken = "set/train-00000.arrayrecord"
    os.rename(folder, f"{folder}.before")
    with pytest.raises(UserError, match="train-00000.arrayrecord cannot be read: .*Forbidden") as error:
        local_copy("gs://bucket/set", str(tmp_path / "cache"), lambda line: None)
    assert "\n" not in str(error.value)
