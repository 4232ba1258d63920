"""The output folder: it appears under its name only when everything in it is complete."""

import contextlib
import fcntl
import glob
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from llada_jax.config import UserError
from llada_jax.data.manifest import MANIFEST_FILE, Manifest

_LOCK_FILE = ".lock"


def refuse_existing(target: Path) -> None:
    """Raises UserError unless `target` is free: absent, or an empty folder."""
    if (target / MANIFEST_FILE).exists():
        raise UserError(f"output {target} is already a prepared set: remove it or name another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output {target} exists and is not an empty folder: name another one")


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is gone afterwards unless it was renamed; SIGTERM ends in an exception.

    It is locked as long as its process lives: what killed processes left behind is removed here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.preparing-"
    for old in target.parent.glob(glob.escape(prefix) + "*"):
        with contextlib.suppress(OSError), (old / _LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with (folder / _LOCK_FILE).open("wb") as lock, _sigterm_raises():
            with contextlib.suppress(OSError):  # a file system without locks: leftovers stay
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.chmod(0o755)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM becomes SystemExit(143), unless the program has plans of its own for it."""
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


def publish(folder: Path, target: Path, manifest: Manifest) -> None:
    """Writes the manifest, then gives the folder its name; both are on the disk before this returns."""
    with (folder / MANIFEST_FILE).open("w") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    (folder / _LOCK_FILE).unlink()
    _sync(folder)
    try:
        os.rename(folder, target)  # onto a folder only if that is empty
    except OSError as error:
        refuse_existing(target)
        raise error
    _sync(target.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
