"""Tells errors of the machine, such as too many open files or a failing disk, from files that are damaged.

Libraries that read files often report both in the same way, or do not say what went wrong at all.
"""

import errno
import os

from llada_jax.config import UserError

# What can go wrong although the files are as they should be.
MACHINE = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES,
    errno.EPERM, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EBUSY,
)  # fmt: skip
_CHUNK = 1 << 20  # bytes


def machine_error(error: BaseException, file: str | os.PathLike = "") -> OSError | None:
    """Returns the error of the machine that caused an exception, or None.

    Args:
      error: The exception. Its causes count as well. If a library tells the reason only in its text, the text counts.
      file: The file that was read, for an exception that does not name one.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen if seen.errno in MACHINE else None
        text = str(seen)
        for code in MACHINE:
            if os.strerror(code) in text:
                return OSError(code, os.strerror(code), os.fspath(file) or None)
        seen = seen.__cause__ or seen.__context__
    return None


def check_readable(file: str | os.PathLike) -> None:
    """Reads a whole file, after a library has failed to read it without saying why.

    Raises:
      OSError: If the machine is to blame.
      UserError: If the file is missing.
    """
    try:
        with open(file, "rb") as content:
            while content.read(_CHUNK):
                pass
    except FileNotFoundError:
        raise UserError(f"{file} is missing: copy the whole folder, or prepare the set again") from None


def reason(error: OSError) -> str:
    """Returns what went wrong and, if that is known, what to do about it, without the file."""
    text = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{text}; allow this program more open files (ulimit -n)"
    return "no space left on the disk" if error.errno == errno.ENOSPC else text
