"""Repeats a request to object storage that failed for a passing reason, a bounded number of times.

All requests of this package go through the one policy of this module, with waits that double and vary at random, so
that many hosts do not come back at the same moment. A request that still fails raises `StorageFailed`, whose message is
one clear line. It is an OSError with the code EIO, so a program ends with it as with a disk that fails.
"""

import dataclasses
import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from llada_jax.config import UserError

T = TypeVar("T")

_REFUSALS = (401, 403)
# The status codes with which a server asks for another try; every code from 500 on counts as well. 409 is the answer of
# S3 if two conditional writes meet.
_PASSING_CODES = (408, 409, 429)
# The names of exception classes (their own, or of a class that they inherit from) that tell of a broken connection.
# They belong to aiohttp, requests, urllib3 and botocore, which need not be installed.
_PASSING_NAMES = frozenset(
    ("ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError", "ChunkedEncodingError",
     "ContentDecodingError", "ProxyError", "ProtocolError", "HTTPClientError", "IncompleteRead", "ChecksumError")
)  # fmt: skip
# Words in errors of TensorStore.
_PASSING_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CURL error", "retry attempts failed")


class StorageFailed(OSError):
    """Raised if a request to object storage still failed at its last try."""

    def __init__(self, path: str, reason: str):
        super().__init__(errno.EIO, reason, path)


@dataclasses.dataclass(frozen=True)
class Policy:
    """How often a request is tried, and how long is waited in between."""

    tries: int = 10
    first_wait: float = 0.5  # seconds before the second try; each further wait is twice as long
    longest_wait: float = 20.0  # seconds
    seconds: float = 300.0  # after this time since the first try there is no further one

    def wait(self, failed: int) -> float:
        """Returns the seconds to wait after `failed` tries: at random between a half and all of what has doubled."""
        return min(self.longest_wait, self.first_wait * 2.0 ** (failed - 1)) * random.uniform(0.5, 1.0)


POLICY = Policy()


def passing(error: BaseException) -> bool:
    """Returns whether an exception tells of a failure that may pass: a busy server, a timeout, a broken connection.

    The exception may come from gcsfs, s3fs, aiohttp, requests or TensorStore.
    """
    if (code := status(error)) is not None and code >= 400:
        return code in _PASSING_CODES or code >= 500
    if isinstance(error, StorageFailed):
        return False
    if isinstance(error, TimeoutError | ConnectionError):  # asyncio.TimeoutError and socket.timeout are TimeoutError
        return True
    if any(kind.__name__ in _PASSING_NAMES for kind in type(error).__mro__):
        return True
    return isinstance(error, ValueError) and any(word in str(error) for word in _PASSING_WORDS)


def storage_to_blame(error: BaseException | None) -> bool:
    """Returns whether a library failed to read because of the storage, and not because of what the objects hold.

    The causes of the exception count as well.
    """
    while error is not None:
        refused = status(error) in _REFUSALS
        if refused or passing(error) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
            return True
        if isinstance(error, BaseExceptionGroup) and any(map(storage_to_blame, error.exceptions)):
            return True
        error = error.__cause__ or error.__context__
    return False


def status(error: BaseException) -> int | None:
    """Returns the status code of the server's answer that an exception carries, or None if it carries none.

    s3fs turns what botocore raises into an OSError, whose cause carries the code.
    """
    found = getattr(error, "code", None) or getattr(error, "status", None)  # gcsfs; aiohttp
    if found is None and isinstance(error, ValueError):  # TensorStore
        found = str(error).partition("http_response_code='")[2][:3] or None
    carrier = error.__cause__ if isinstance(error, OSError) and not isinstance(error, StorageFailed) else None
    response = getattr(error, "response", None) or getattr(carrier, "response", None)
    if found is None and isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    try:
        return int(found)
    except (TypeError, ValueError):
        return None


def call(
    path: str, request: Callable[[], T], policy: Policy = POLICY, sleep: Callable[[float], object] = time.sleep
) -> T:
    """Calls `request` until it returns, and returns what it returned.

    Args:
      path: The address of the object, for the message.
      request: A function that sends the request. It may be called several times, so a request that has taken effect
        although its answer was lost must do no harm when it is sent again.
      policy: How often and how long it is tried.
      sleep: A function that waits for so many seconds. Whoever may be told to stop passes one that then raises.

    Raises:
      StorageFailed: If the request failed for a passing reason each time.
      UserError: If the server refuses access (401, 403).
      Exception: Whatever `request` raises for another reason, at once.
    """
    begin = time.monotonic()
    for failed in range(1, policy.tries + 1):
        try:
            return request()
        except Exception as error:
            if status(error) in _REFUSALS:
                raise UserError(f"{path}: no access ({' '.join(str(error).split())[:200]})") from error
            if not passing(error):
                raise
            wait = policy.wait(failed)
            gone = time.monotonic() - begin
            if failed == policy.tries or gone + wait > policy.seconds:
                what = " ".join(str(error).split())[:200]
                raise StorageFailed(
                    path, f"the storage failed {failed} times in {gone:.0f} s, last with {type(error).__name__}: {what}"
                ) from error
        sleep(wait)
    raise AssertionError("a policy has at least one try")
