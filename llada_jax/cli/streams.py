"""The standard streams of a command: what cannot be printed neither ends in a traceback nor is lost without a word."""

import contextlib
import io
import os
import sys
from typing import TextIO

from llada_jax.config import UserError


class _Stdout(io.TextIOWrapper):
    """A stdout that remembers why it could not be written: the exception that print raises does not say where."""

    failed: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failed = error
            raise


def prepare() -> None:
    """Prepares stdout and stderr for texts of any kind. `entry_point.run` calls this before anything else.

    Characters that the encoding of a stream lacks are written as escapes, such as \\u2192. Where a standard stream is
    closed, its file descriptor is given to os.devnull: the next file that is opened would get it otherwise, and would
    then receive what libraries print. A closed stdout stays None, so that `require_stdout` sees it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _occupy(number)
    if sys.stderr is None:
        # print(..., file=None) would write to stdout.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if type(sys.stdout) is io.TextIOWrapper and sys.stdout is sys.__stdout__:
        same = {name: getattr(sys.stdout, name) for name in ("encoding", "line_buffering", "write_through")}
        sys.stdout = sys.__stdout__ = _Stdout(sys.stdout.detach(), **same)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stand-in for a stream
            stream.reconfigure(errors="backslashreplace")


def _occupy(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def require_stdout(remedy: str) -> None:
    """Raises UserError if stdout is closed. Call this before the work whose result is printed there.

    Args:
      remedy: What the user can do, for the message.
    """
    if sys.stdout is None:
        raise UserError(f"stdout is closed, so the result would be lost: {remedy}")


def failed_stdout() -> OSError | None:
    """Brings what was printed to its reader. Returns the error if that is or was impossible, or None.

    After an error, further output is dropped: Python would complain of it when it closes stdout.
    """
    failed = getattr(sys.stdout, "failed", None)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        failed = failed or error
    if failed is not None:
        drop(sys.stdout)
    return failed


def drop(stream: TextIO) -> None:
    """Drops what a stream still holds and what is written to it from now on, because nobody can read it."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in for a stream has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
