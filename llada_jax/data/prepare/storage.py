"""Reads and writes files in local folders and on object storage (gs:// and whatever else fsspec opens) in one way.

This is not `llada_jax/storage/objects.py`, and neither can take the other's place. Input and output of a preparation
may lie wherever fsspec reaches (s3://, az://, hf://, memory://, local folders), are found by patterns, and are read and
written as streams of many gigabytes, from any offset. A workdir needs writes on the condition that an object has a
certain generation. TensorStore has them and fsspec has not, but TensorStore holds an object in memory, and has few
kinds of storage.
"""

import contextlib
import io
import os
import pickle
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from llada_jax.config import UserError
from llada_jax.storage.objects import installation, is_bucket

_CHUNK = 1 << 24  # bytes


class RemoteFile(NamedTuple):
    """A file on object storage, with what the readers of the input need of `pathlib.Path`."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def suffix(self) -> str:
        """The ending of the name, as that of a Path."""
        return PurePosixPath(self.url).suffix

    @property
    def stem(self) -> str:
        """The name without its ending, as that of a Path."""
        return PurePosixPath(self.url).stem

    def open(self, mode: str) -> BinaryIO:
        """Opens the file for reading."""
        return io.BufferedReader(open_file(self.url, mode), _CHUNK)


def is_remote(path: str | os.PathLike | RemoteFile) -> bool:
    """Returns whether a path is a URL."""
    return isinstance(path, RemoteFile) or is_bucket(path)


def open_file(path: str, mode: str) -> Any:
    """Opens a local or remote file in the binary mode "rb" or "wb"."""
    if not is_remote(path):
        return open(path, mode)
    system, name = _system(path)
    return system.open(name, mode)


def exists(path: str) -> bool:
    """Returns whether there is a file or folder."""
    if not is_remote(path):
        return os.path.exists(path)
    system, name = _system(path)
    return system.exists(name)


def find(pattern: str) -> list[RemoteFile]:
    """Returns the remote files that a URL or a pattern names, in the order of their names."""
    system, name = _system(pattern)
    found = system.glob(name) if any(mark in name for mark in "*?[") else [name] if system.isfile(name) else []
    return [RemoteFile(system.unstrip_protocol(each)) for each in sorted(found) if system.isfile(each)]


def size_of(file: Path | RemoteFile) -> int:
    """Returns the size of a file in bytes."""
    if isinstance(file, Path):
        return file.stat().st_size
    system, name = _system(file.url)
    return int(system.size(name))


def stamp(file: Path | RemoteFile) -> tuple[int, str]:
    """Returns the size of a file, and what else changes with its content: a local file's time, an object's checksum."""
    if isinstance(file, Path):
        return file.stat().st_size, str(file.stat().st_mtime_ns)
    system, name = _system(file.url)
    details = system.info(name)
    return int(details["size"]), str(details.get("md5Hash") or details.get("ETag") or details.get("created") or "")


def remove(folder: str) -> None:
    """Removes a folder with all that is in it."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    system, name = _system(folder)
    system.rm(name, recursive=True)


@contextlib.contextmanager
def whole(path: str) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name only when the block ends without an exception.

    On object storage, an object appears when it is closed, but also when the block raises. What reads such a file must
    know from another file, written later, that it is complete.
    """
    if is_remote(path):
        with open_file(path, "wb") as file:
            yield file
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}")  # several workers may write the same file
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def save(path: str, value: Any) -> None:
    """Writes a value, whole or not at all. `load` reads it."""
    content = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    with whole(path) as file:
        file.write(content)


def load(path: str) -> Any:
    """Returns a value that `save` has written, or None if there is no such file."""
    try:
        with open_file(path, "rb") as file:
            return pickle.loads(file.read())
    except FileNotFoundError:
        return None


def move(file: Path, path: str) -> None:
    """Moves a local file that is complete to a path."""
    if is_remote(path):
        with file.open("rb") as source, whole(path) as target:
            shutil.copyfileobj(source, target, _CHUNK)
        file.unlink()
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file.replace(path)


def copy_folder(source: str, target: str) -> None:
    """Copies the files of a folder, one of which may be local and the other one remote."""
    names = [each.name for each in Path(source).iterdir()] if not is_remote(source) else []
    if is_remote(source):
        names = [PurePosixPath(file.url).name for file in find(f"{source}/*")]
    for name in names:
        with open_file(f"{source}/{name}", "rb") as content, whole(f"{target}/{name}") as copy:
            shutil.copyfileobj(content, copy, _CHUNK)


def _system(path: str) -> tuple[Any, str]:
    """Returns the file system of a URL, and the name in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {error}{installation(path)}") from error
