"""The standard streams of a command: what cannot be printed neither ends in a traceback nor is lost without a word."""

import contextlib
import os
import sys
from typing import TextIO

from llada_jax.config import UserError


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
    """Brings what was printed to its reader. Returns the error if that is impossible, or None.

    After an error, further output is dropped: Python would complain of it when it closes stdout.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        drop(sys.stdout)
        return error
    return None


def drop(stream: TextIO) -> None:
    """Drops what a stream still holds and what is written to it from now on, because nobody can read it."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in for a stream has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
