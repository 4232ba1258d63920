"""Folders that appear under their name only when they are whole."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from llada_jax.config import UserError
from llada_jax.data.output import refuse_existing, temporary_folder


@contextlib.contextmanager
def whole_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A new folder that gets the name `directory` when the block ends, and is gone if it ends in an exception.

    What a killed process left beside it, under another name, is removed by the next one.

    Raises:
      UserError: there is something of that name (an empty folder is fine), or it cannot be written.
    """
    if not os.fspath(directory) or "://" in os.fspath(directory):
        raise UserError(f"output {os.fspath(directory)!r}: name a local folder to write")
    target = Path(os.path.abspath(directory))
    refuse_existing(target)
    try:
        with temporary_folder(target) as beside:
            folder = beside / target.name
            folder.mkdir()
            yield folder
            for inner, _, _ in os.walk(folder):
                _sync(inner)
            try:
                os.rename(folder, target)  # onto a folder only if that is empty
            except OSError:
                refuse_existing(target)
                raise
            _sync(target.parent)
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else " ".join(str(error).split())
        raise UserError(f"output {directory} cannot be written: {reason}") from error


def _sync(folder: str | os.PathLike) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
