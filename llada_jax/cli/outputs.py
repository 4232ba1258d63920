"""Files and folders that a command writes: each appears whole under its name, or not at all.

A file or folder is written under a temporary name beside its target, brought to the disk, and renamed at the end. A
failure or a signal therefore leaves nothing half-written behind.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from llada_jax.cli import paths, streams
from llada_jax.config import UserError

LOCK_FILE = ".lock"  # in a temporary folder, locked while the process that writes it lives


def check_file(path: str | os.PathLike, flag: str = "output") -> Path:
    """Checks that a file can be written, before the work whose result it will hold.

    Args:
      path: The path as the user gave it. A leading ~ stands for a home folder.
      flag: The name of the flag, for error messages.

    Returns:
      The path.

    Raises:
      UserError: If the path is remote or names a folder, if its folder is missing or cannot be written to, or if it is
        a name of stdout, such as /dev/stdout, and stdout is closed.
    """
    found = Path(paths.expanded(path))
    if "://" in os.fspath(path):
        raise UserError(f"--{flag}={path}: name a file on this machine or on a mounted file system")
    number = _descriptor(found)
    if number == 1:
        streams.require_stdout(f"name another file than --{flag}={path}")
    try:
        if number is not None:
            if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "it is open for reading")
            return found
        if found.is_dir() or not found.name:
            raise UserError(f"--{flag}={path} is a folder; pass the name of a file")
        if not found.absolute().parent.is_dir():
            raise UserError(f"--{flag}={path}: there is no folder {found.absolute().parent}; create it first")
        if _is_special(found):
            return found
        with tempfile.NamedTemporaryFile(dir=found.absolute().parent, prefix=f".{found.name}."):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"--{flag}={path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return found


def _is_special(path: Path) -> bool:
    """Returns whether a path names a device or a pipe, such as /dev/null, which must not be replaced by a file."""
    return path.exists() and not path.is_file()


def _descriptor(path: Path) -> int | None:
    """Returns the number of the open file that a path such as /dev/stdout or /dev/fd/3 names, or None.

    Such a path may lead to a file, for example with `> FILE`. A rename would then replace the name in /dev itself.
    """
    name = os.path.abspath(path)
    folder, _, last = name.rpartition("/")
    if folder in ("/dev/fd", "/proc/self/fd") and last.isdecimal():
        return int(last)
    return {"/dev/stdout": 1, "/dev/stderr": 2}.get(name)


def write_text(path: Path, text: str, flag: str = "output") -> None:
    """Writes a text file (UTF-8) as `write_bytes` does."""
    write_bytes(path, text.encode(), flag)


def write_bytes(path: Path, content: bytes, flag: str = "output") -> None:
    """Writes a file, whole or not at all. A device, a pipe or a stream is written to, not replaced.

    Args:
      path: The file, as `check_file` has returned it.
      content: The content.
      flag: The name of the flag that names the file, for error messages.

    Raises:
      UserError: If the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if (number := _descriptor(path)) is not None:
            if number == 1 and sys.stdout is not None:
                sys.stdout.flush()  # what was printed before comes first
            with open(os.dup(number), "wb") as stream:
                stream.write(content)
            return
        if _is_special(path):
            path.write_bytes(content)
            return
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"--{flag}={path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def check_folder(directory: str | os.PathLike) -> Path:
    """Returns the path of an output folder after checking that the folder can be created there.

    Args:
      directory: The path as the user gave it. If it is a symbolic link, its target is returned.

    Raises:
      UserError: If the path is empty or remote, if it names a file or a folder that is not empty, or if its parent
        cannot be written to.
    """
    if not os.fspath(directory) or "://" in os.fspath(directory):
        raise UserError(f"output {os.fspath(directory)!r}: name a local folder to write")
    target = Path(os.path.realpath(paths.expanded(directory)))  # a folder cannot be renamed onto a link
    refuse_existing(target)
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output {directory} cannot be written: {parent} is not a folder that you can write to")
    return target


def refuse_existing(target: Path) -> None:
    """Raises UserError unless `target` does not exist yet or is an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output {target} exists and is not an empty folder: name another folder")


@contextlib.contextmanager
def whole_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """Yields a new folder that is renamed to `directory` when the block ends, and removed if the block raises.

    A process that is killed leaves a folder with another name behind; the next call for the same target removes it.

    Raises:
      UserError: As `check_folder`, or if the folder cannot be written.
    """
    target = check_folder(directory)
    with write_errors(directory), temporary_folder(target) as beside:
        folder = beside / target.name
        folder.mkdir()
        yield folder
        for inner, _, _ in os.walk(folder):
            sync(inner)
        publish(folder, target)


def publish(folder: Path, target: Path) -> None:
    """Renames a finished folder to `target`, which must be absent or empty, and brings the new name to the disk.

    Raises:
      UserError: If another process has created something under that name meanwhile.
      OSError: If the folder cannot be renamed for another reason.
    """
    try:
        os.rename(folder, target)  # this replaces a folder only if the folder is empty
    except OSError:
        refuse_existing(target)
        raise
    sync(target.parent)


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target` that is removed when the block ends, unless the block has renamed it.

    SIGTERM raises SystemExit(143) inside the block, so that the folder is removed then too. The folder is locked while
    its process lives; folders that killed processes left behind are recognised by that and removed here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.preparing-"
    for old in target.parent.glob(glob.escape(prefix) + "*"):
        with contextlib.suppress(OSError), (old / LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with (folder / LOCK_FILE).open("wb") as lock, _sigterm_raises():
            with contextlib.suppress(OSError):  # without file locks, folders of killed processes stay
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.chmod(0o755)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit(143), unless the program already handles SIGTERM itself."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def write_errors(output: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError of the block into a UserError that names the output."""
    try:
        yield
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else " ".join(str(error).split())
        raise UserError(f"output {output} cannot be written: {reason}") from error


def sync(folder: str | os.PathLike) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
