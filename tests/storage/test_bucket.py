"""Tests the fixture `bucket` itself: what it injects is what a client sees."""

import time
import urllib.error
import urllib.request

import pytest
from bucket import rule

CONTENT = bytes(range(256)) * 40


def get(bucket, name: str = "a/file", timeout: float = 20.0) -> bytes:
    """Reads an object through the proxy, with a client that repeats nothing."""
    url = f"{bucket.environment['STORAGE_EMULATOR_HOST']}{bucket._object(name)}?alt=media"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=timeout) as answer:
        return answer.read()


def test_faults_and_counts(bucket):
    bucket.write("a/file", CONTENT)
    assert get(bucket) == CONTENT and bucket.names("a/") == ["a/file"]
    bucket.faults([rule("status", status=429, match="GET .*a/file", times=2)])
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError, match="429"):
            get(bucket)
    assert get(bucket) == CONTENT
    assert bucket.count() == 4 and bucket.injected() == 2 and bucket.count("POST") == 0
    for kind in ("reset", "lost", "cut"):
        bucket.faults([rule(kind)])
        with pytest.raises(Exception, match="reset|closed|peer|IncompleteRead"):
            get(bucket)
    bucket.faults([rule("flip")])
    assert [a ^ b for a, b in zip(get(bucket), CONTENT, strict=True) if a != b] == [1]
    bucket.faults([rule("hang")])
    with pytest.raises(TimeoutError):
        get(bucket, timeout=0.2)
    bucket.faults([rule("slow", rate_bytes=20_000)], latency=0.1)
    begin = time.monotonic()
    assert get(bucket) == CONTENT and time.monotonic() - begin > 0.5
    bucket.reachable(False)
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(bucket)
    bucket.reset()
    assert get(bucket) == CONTENT and bucket.count() == 1
