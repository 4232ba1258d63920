"""The output folder: it appears under its name only when everything in it is complete."""

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
import time
from collections.abc import Iterator
from pathlib import Path

from llada_jax.config import UserError
from llada_jax.data.manifest import MANIFEST_FILE, Manifest
from llada_jax.text.tokenizer import Tokenizer

_LOCK_FILE = ".lock"
SHARD_BYTES = 1 << 28  # of a shard before compression
_MAX_SEQUENCE_LENGTH = 1 << 20


def check_settings(
    output: str | os.PathLike, sequence_length: int, fraction: float, workers: int, shard_rows: int
) -> Path:
    """The output folder, once all settings are known to make sense. UserError says which does not."""
    if not 2 <= sequence_length <= _MAX_SEQUENCE_LENGTH:
        raise UserError(f"sequence_length={sequence_length}: from 2 to {_MAX_SEQUENCE_LENGTH} is possible")
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction={fraction}: from 0 to below 1 is possible")
    if workers < 0 or shard_rows < 0:
        raise UserError(f"workers={workers} and shard_rows={shard_rows} must not be negative")
    if not os.fspath(output):
        raise UserError("output: name the folder to write")
    if "://" in os.fspath(output):
        raise UserError(f"output {output}: prepare into a local folder, then copy it there")
    target = Path(os.path.abspath(output))
    refuse_existing(target)
    return target


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def id_dtype(tokenizer: Tokenizer) -> str:
    """The dtype of ids in the records."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


@contextlib.contextmanager
def write_errors(output: str | os.PathLike) -> Iterator[None]:
    """UserError for an OSError in it."""
    try:
        yield
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else " ".join(str(error).split())
        raise UserError(f"output {output} cannot be written: {reason}") from error


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


class Progress:
    """A bar on a terminal, elsewhere a line every half minute, both on stderr."""

    def __init__(self, total: int, enabled: bool):
        """`total`: bytes of the input."""
        self._total = total
        self._tokens = 0
        self._start = self._last = time.monotonic()
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = None
        if enabled and not self._lines:
            import tqdm

            self._bar = tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="preparing", file=sys.stderr)

    def update(self, position: int, tokens: int) -> None:
        """Tells how many bytes of the input are read, and how many tokens were made since the last time."""
        self._tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(position - self._bar.n)
            self._bar.set_postfix_str(f"{self._tokens / max(now - self._start, 1e-9):,.0f} tokens/s", refresh=False)
        elif self._lines and now - self._last > 30:
            self._last = now
            done = 100 * position // max(self._total, 1)
            print(f"preparing: {done} % of the input, {self._tokens:,} tokens", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
