"""Tests which failures of a request are repeated, how often, and what is said at the end."""

import pytest

from llada_jax.config import UserError
from llada_jax.storage.retries import Policy, StorageFailed, call, passing, storage_to_blame


class Answered(Exception):
    """Stands for the exceptions of gcsfs, which carry the status code of the answer."""

    def __init__(self, code: int | str):
        super().__init__(f"answer {code}")
        self.code = code


def failing(times: int, error: Exception):
    """Returns a request that fails so many times and then returns how often it was sent."""
    sent = []

    def request() -> int:
        sent.append(1)
        if len(sent) <= times:
            raise error
        return len(sent)

    return request


@pytest.mark.parametrize(
    "error",
    [Answered(429), Answered("503"), Answered(408), TimeoutError(), ConnectionResetError(),
     ValueError("ABORTED: All 3 retry attempts failed: CURL error Could not connect to server")],
)  # fmt: skip
def test_a_passing_failure_is_repeated_with_growing_waits_until_the_request_succeeds(error):
    waits = []
    assert call("gs://b/x", failing(4, error), Policy(first_wait=1.0, longest_wait=4.0), waits.append) == 5
    assert [low <= wait <= 2 * low for low, wait in zip((0.5, 1, 2, 2), waits, strict=True)] == [True] * 4


def test_the_tries_are_bounded_and_end_in_one_line():
    waits = []
    with pytest.raises(StorageFailed, match="failed 3 times in 0 s, last with Answered: answer 503") as caught:
        call("gs://b/x", failing(100, Answered(503)), Policy(tries=3), waits.append)
    assert len(waits) == 2 and caught.value.filename == "gs://b/x" and not passing(caught.value)
    with pytest.raises(StorageFailed, match="failed 2 times"):  # no try begins after Policy.seconds
        call("gs://b/x", failing(9, Answered(503)), Policy(first_wait=2.0, longest_wait=9.0, seconds=2.0), waits.append)


@pytest.mark.parametrize("error", [Answered(404), FileNotFoundError("x"), ValueError("NOT_FOUND: x"), KeyError("x")])
def test_any_other_failure_is_raised_at_once(error):
    with pytest.raises(type(error)):
        call("gs://b/x", failing(1, error), sleep=lambda _: pytest.fail("it waited"))


@pytest.mark.parametrize("code, wanted", [(503, StorageFailed), (429, StorageFailed), (403, UserError), (400, OSError)])
def test_the_code_of_an_answer_that_s3fs_turns_into_an_oserror(code, wanted):
    cause = Exception("botocore")
    cause.response = {"ResponseMetadata": {"HTTPStatusCode": code}}
    error = OSError(5, "Please reduce your request rate.")
    error.__cause__ = cause
    with pytest.raises(wanted) as caught:
        call("s3://b/x", failing(9, error), Policy(tries=2), lambda _: None)
    assert not passing(caught.value) and (caught.value is error) == (wanted is OSError)


@pytest.mark.parametrize("code", [401, 403])
def test_no_access_is_the_users_mistake(code):
    with pytest.raises(UserError, match=f"gs://b/x: no access .answer {code}"):
        call("gs://b/x", failing(1, Answered(code)))


def test_whether_the_storage_or_the_content_is_to_blame():
    def caused(by: Exception) -> Exception:
        try:
            try:
                raise by
            except Exception as error:
                raise RuntimeError("Orbax") from error
        except RuntimeError as error:
            return error

    refused = ValueError("PERMISSION_DENIED: no [http_response_code='403'] [x]")
    lost = ValueError("ABORTED: All 32 retry attempts failed: x [http_response_code='503']")
    for error in (Answered(503), Answered(401), OSError("Forbidden: x"), TimeoutError(), refused, lost):
        assert storage_to_blame(error) and storage_to_blame(caused(error)), error
    assert storage_to_blame(ExceptionGroup("reads", [KeyError("x"), refused]))
    for error in (
        Answered(404),
        FileNotFoundError("x"),
        ValueError("OUT_OF_RANGE [http_response_code='416']"),
        KeyError("x"),
    ):
        assert not storage_to_blame(error) and not storage_to_blame(caused(error)), error
    with pytest.raises(UserError, match="no access"):
        call("gs://b/x", failing(1, refused))
