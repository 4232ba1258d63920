"""Reads ranges of bytes of objects in gs:// and s3://, many at a time, with a bound on the requests in flight.

TensorStore sends the requests. Its threads wait for the answers, so one thread of Python can have many requests in
flight. A request that fails for a passing reason is tried again as `retries.py` says.
"""

import concurrent.futures
import errno
import functools
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from llada_jax.config import UserError
from llada_jax.storage import addresses, retries

IN_FLIGHT = 16  # requests per process and kind of storage
SCHEMES = tuple(addresses.DRIVERS)
TIMEOUT = 30.0  # seconds after which a request for a range is given up and sent again
LONG_TIMEOUT = 120.0  # the same for whole objects and lists
_REFUSED = (401, 403)


class Range(NamedTuple):
    """The bytes of an object from offset `start` to offset `stop`."""

    name: str  # the name of the object in its folder
    start: int
    stop: int


class TooShort(ValueError):
    """Raised if an object ends before a range does."""


class _Failed(Exception):
    """A request that failed for a reason that may pass; `retries.status` and `retries.passing` look at its code."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


def supported(path: str) -> bool:
    """Returns whether `Folder` can read objects of this folder."""
    return addresses.parse(path).kind in SCHEMES


class Folder:
    """The objects whose addresses begin with one prefix."""

    def __init__(self, url: str):
        """Opens a folder; no request is sent.

        Args:
          url: The address, for example gs://BUCKET/FOLDER.

        Raises:
          UserError: If the address names no bucket, or is not in gs:// or s3://.
        """
        self.url = url.rstrip("/")
        scheme, bucket, prefix = addresses.parse(self.url)
        if scheme not in SCHEMES:
            raise UserError(f"{url}: parts of objects can be read in {' and '.join(SCHEMES)} only")
        if not bucket:
            raise UserError(f"{url}: there is no bucket in this address: write {scheme}://BUCKET/FOLDER")
        self._prefix = f"{prefix}/" if prefix else ""
        self._store = _store(scheme, bucket)

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, parts: Sequence[Range]) -> list[bytes]:
        """Returns the bytes of several ranges. Their requests are sent at once, at most IN_FLIGHT at a time.

        Raises:
          FileNotFoundError: If an object is missing.
          TooShort: If an object ends before its range does.
          UserError: If the storage refuses access.
          StorageFailed: If a request still fails at its last try.
        """
        futures = [self._request(part) for part in parts]
        try:
            return [self._answer(part, future) for part, future in zip(parts, futures, strict=True)]
        finally:
            for future in futures:  # those that are left when one has failed
                future.cancel()

    def whole(self, name: str) -> bytes:
        """Returns the content of an object that fits into memory. The errors are those of `read`."""
        address = self.address(name)

        def result() -> bytes:
            answer = _waited(self._store.read(self._prefix + name), address, LONG_TIMEOUT)
            if answer.state == "missing":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address)
            return answer.value

        return retries.call(address, result, retries.POLICY)

    def names(self) -> set[str]:
        """Returns the names of all objects in this folder and in the folders inside it, relative to this folder.

        Raises:
          UserError: If the storage refuses access.
          StorageFailed: If a request still fails at its last try.
        """
        end = self._prefix[:-1] + chr(ord("/") + 1) if self._prefix else ""
        import tensorstore as ts

        inside = ts.KvStore.KeyRange(self._prefix, end)
        keys = retries.call(self.url, lambda: _waited(self._store.list(inside), self.url, LONG_TIMEOUT), retries.POLICY)
        return {key.decode().removeprefix(self._prefix) for key in keys}

    def _request(self, part: Range) -> Any:
        return self._store.read(self._prefix + part.name, byte_range=slice(part.start, part.stop))

    def _answer(self, part: Range, first: Any) -> bytes:
        address, futures = self.address(part.name), [first]

        def result() -> bytes:
            answer = _waited(futures.pop() if futures else self._request(part), address, TIMEOUT)
            if answer.state == "missing":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address)
            if len(answer.value) != part.stop - part.start:
                raise TooShort(f"{address} ends before byte {part.stop:,}")
            return answer.value

        return retries.call(address, result, retries.POLICY)


def _waited(future: Any, address: str, timeout: float) -> Any:
    """Waits for an answer. Raises what `retries` knows, whatever TensorStore raises."""
    try:
        return future.result(timeout=timeout)
    except (TimeoutError, concurrent.futures.TimeoutError):
        future.cancel()
        raise TimeoutError(f"no answer within {timeout:g} s") from None
    except ValueError as error:  # TensorStore has no other exception
        text = str(error)
        code = int(found[1]) if (found := re.search(r"http_response_code='(\d+)'", text)) else 0
        if code in _REFUSED or text.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            raise _Failed(_short(text), code or _REFUSED[-1]) from error
        if text.startswith("OUT_OF_RANGE") or code == 416:
            raise TooShort(f"{address} is shorter than it was") from error
        if code == 404:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address) from error
        if code:
            raise _Failed(_short(text), code) from error
        if text.startswith(("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")) or "CURL" in text:
            raise ConnectionError(_short(text)) from error
        raise


def _short(text: str) -> str:
    """Returns what an error of TensorStore says, without its count of tries and its details."""
    text = re.sub(r"^[A-Z_]+: (All \d+ retry attempts failed: )?", "", " ".join(text.split()))
    return re.sub(r" \[\w+=.*", "", text)


@functools.cache
def _store(scheme: str, bucket: str) -> Any:
    """Returns TensorStore's view of a bucket. Those of one kind share the bound on requests in flight."""
    return addresses.opened(scheme, bucket, _context(addresses.DRIVERS[scheme]))


@functools.cache
def _context(kind: str) -> Any:
    import tensorstore as ts

    return ts.Context(
        {
            f"{kind}_request_concurrency": {"limit": IN_FLIGHT},
            # The least that TensorStore takes; `retries` decides about further tries.
            f"{kind}_request_retries": {"max_retries": 1, "initial_delay": "50ms", "max_delay": "50ms"},
        }
    )
