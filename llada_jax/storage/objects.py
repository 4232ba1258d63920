"""Whole objects in a bucket: read, written, listed and deleted, and written only if nobody else has written meanwhile.

An address is gs://BUCKET/NAME or s3://BUCKET/NAME. A "folder" of a bucket is the objects whose names begin with its
name and a slash. An object appears whole or not at all, and who reads after a write has returned finds what was
written. There is no append and no rename.

The engine is TensorStore, which Orbax uses for the arrays as well. Orbax reads and writes its small files through
etils.epath, which needs gcsfs (pip install 'llada_jax[gcs]') or s3fs ('llada_jax[s3]'); `check` prepares them. For
streams, patterns and other kinds of storage there is data/prepare/storage.py, which says why there are two modules.
"""

import functools
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from llada_jax.config import UserError
from llada_jax.storage import addresses, retries

# A request is given up, and tried again, if it does not connect or moves no more than a byte per second for so long.
_IDLE_SECONDS = 60
_AT_ONCE = 16  # requests
_PIECE = 1 << 26  # number of bytes of a large object that one request reads
NEEDED = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # the package that etils.epath needs, and our extra with it
_SLOWEST = 1 << 20  # bytes per second; an object that is written more slowly may be given up

Place = Path | epath.Path  # a folder or a file: on this machine, or in a bucket


def is_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path is an address of object storage."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike) -> Place:
    """Returns a path that can be joined with "/": a pathlib.Path, or for an address in a bucket an etils.epath.Path."""
    return epath.Path(os.fspath(path).rstrip("/")) if is_bucket(path) else Path(path)


def absolute(path: str | os.PathLike) -> Place:
    """Returns `place` of the path, absolute if it is on this machine."""
    return place(path) if is_bucket(path) else Path(path).absolute()


def check(path: str | os.PathLike, named: str) -> None:
    """Checks that this package can work with a path, and prepares the libraries for a bucket.

    Args:
      path: A path of any kind. A path on this machine is always accepted.
      named: The words that error messages put in front of the path, such as "--workdir=".

    Raises:
      UserError: If the storage is of another kind than gs:// or s3://, if no bucket is named, or if the package for
        it is missing.
    """
    if not is_bucket(path):
        return
    kind, bucket, _ = addresses.parse(path)
    if kind not in addresses.DRIVERS:
        raise UserError(
            f"{named}{path}: models and runs can lie in gs:// and s3:// only; mount the bucket and pass the folder"
        )
    if not bucket:
        raise UserError(f"{named}{path}: name a bucket, {kind}://BUCKET/FOLDER")
    package, extra = NEEDED[kind]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{named}{path} needs the package {package}: pip install 'llada_jax[{extra}]'")
    _prepare()


def installation(path: str | os.PathLike) -> str:
    """Returns what an error about a missing package says at its end: how to install it, "" if none of our extras is."""
    _, extra = NEEDED.get(addresses.parse(path).kind, ("", ""))
    return f": pip install 'llada_jax[{extra}]'" if extra else ""


def require_bucket(path: str | os.PathLike) -> None:
    """Raises UserError if there is no such bucket. Call this if nothing was found: a list of its objects is empty, too.

    Args:
      path: An address that `check` has accepted.
    """
    import fsspec

    kind, bucket, _ = addresses.parse(path)
    try:
        fsspec.filesystem(kind).info(bucket)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such bucket") from None
    except Exception:  # for example, nobody but its owner may look at the bucket itself
        return


@functools.cache
def _prepare() -> None:
    """Sets what the libraries wait for, and turns off the listings that they keep, which others' writes outdate."""
    import aiohttp
    import fsspec

    for name in ("CONNECT_TIMEOUT_SECONDS", "LOW_SPEED_TIME_SECONDS"):
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(_IDLE_SECONDS))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_IDLE_SECONDS, sock_read=_IDLE_SECONDS)
    for kind in ("gs", "gcs"):
        # gcsfs passes the second one with most of its requests, and it holds in place of the first.
        waits = {"session_kwargs": {"timeout": timeout}, "requests_timeout": timeout}
        ours = {"use_listings_cache": False, **waits}
        fsspec.config.conf[kind] = ours | fsspec.config.conf.get(kind, {})
    idle = {"connect_timeout": _IDLE_SECONDS, "read_timeout": _IDLE_SECONDS}
    endpoint, region = addresses.elsewhere()
    ours = {"use_listings_cache": False, "config_kwargs": idle}
    ours |= {"endpoint_url": endpoint} if endpoint else {}
    ours |= {"client_kwargs": {"region_name": region}} if region else {}
    fsspec.config.conf["s3"] = ours | fsspec.config.conf.get("s3", {})


@functools.cache
def _bucket(kind: str, name: str) -> Any:
    """Returns TensorStore's view of a bucket, which sends each request once: `retries` decides about another try."""
    import tensorstore

    once = {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}
    context = tensorstore.Context({f"{addresses.DRIVERS[kind]}_request_retries": once})
    conditions = {"use_conditional_write": True} if kind == "s3" else {}  # otherwise that depends on the host's name
    return addresses.opened(kind, name, context, **conditions)


def _split(path: str | os.PathLike) -> tuple[Any, str]:
    kind, bucket, name = addresses.parse(path)
    return _bucket(kind, bucket), name


def _call(path: str | os.PathLike, request, size: int = 0) -> Any:
    """Sends a request with `size` bytes as `retries.call` does. Refusals are mistakes of the user, told in one line."""
    try:
        policy = retries.POLICY
        seconds = policy.seconds + size / _SLOWEST
        return retries.call(os.fspath(path), lambda: request().result(timeout=seconds), policy)
    except ValueError as error:  # all kinds of TensorStore's errors
        text = " ".join(str(error).split())
        why = "there is no such bucket" if retries.status(error) == 404 else "it cannot be used"
        raise UserError(f"{path}: {why} ({text[:200]})") from error


def read(path: str | os.PathLike) -> bytes:
    """Returns the content of an object or of a file.

    Raises:
      FileNotFoundError: If there is none.
      UserError, StorageFailed: If the bucket cannot be read.
    """
    if not is_bucket(path):
        return Path(path).read_bytes()
    content, _ = read_with_generation(path)
    if content is None:
        raise FileNotFoundError(2, "No such object", os.fspath(path))
    return content


def exists(path: str | os.PathLike) -> bool:
    """Returns whether there is an object or a file of this name."""
    if not is_bucket(path):
        return Path(path).is_file()
    return read_with_generation(path, slice(0, 1))[0] is not None


def read_with_generation(path: str | os.PathLike, piece: slice | None = None) -> tuple[bytes | None, bytes]:
    """Returns the content of an object, or None if there is none, and the generation for `write_if`.

    Args:
      path: The address of the object.
      piece: The bytes to read. None means all. Beyond the end of the object there are none.
    """
    store, name = _split(path)
    try:
        found = _call(path, lambda: store.read(name, byte_range=piece))
    except UserError as error:
        if piece is None or "OUT_OF_RANGE" not in str(error):
            raise
        return _read_end(path, piece.start)
    return (found.value if found.state == "value" else None), found.stamp.generation


def _read_end(path: str | os.PathLike, start: int) -> tuple[bytes | None, bytes]:
    """Returns the end of an object from `start`. There is less of it than was asked for, and perhaps nothing."""
    store, name = _split(path)
    try:
        found = _call(path, lambda: store.read(name, byte_range=slice(start, None) if start else None))
        return (found.value if found.state == "value" else None), found.stamp.generation
    except UserError as error:
        if "OUT_OF_RANGE" not in str(error):
            raise
    found = _call(path, lambda: store.read(name, byte_range=slice(0, 1)))
    return (b"" if found.state == "value" else None), found.stamp.generation


def names(folder: str | os.PathLike) -> list[str]:
    """Returns the names of all objects in a folder of a bucket and its subfolders, relative to it, sorted."""
    import tensorstore

    store, prefix = _split(f"{os.fspath(folder).rstrip('/')}/")
    inside = tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + "0" if prefix else "")  # "0" comes after "/"
    found = _call(folder, lambda: store.list(inside))
    return sorted(name.decode()[len(prefix) :] for name in found if name.decode().startswith(prefix))


def write(path: str | os.PathLike, content: bytes) -> None:
    """Writes an object, whole or not at all. It is in the bucket when this returns."""
    store, name = _split(path)
    _call(path, lambda: store.write(name, content), len(content))


def write_all(folder: str | os.PathLike, files: Mapping[str, bytes | Path]) -> set[str]:
    """Writes objects into a folder of a bucket, several at once. A file is held in memory while it is written.

    Args:
      folder: The address of the folder.
      files: For each name, the content or a file with it.

    Returns:
      The names that were written: all but those of files that are not there.
    """
    from concurrent.futures import ThreadPoolExecutor

    def put(item: tuple[str, bytes | Path]) -> str | None:
        name, content = item
        try:
            content = content if isinstance(content, bytes) else content.read_bytes()
        except FileNotFoundError:
            return None
        write(place(folder) / name, content)
        return name

    with ThreadPoolExecutor(_AT_ONCE) as executor:
        return {name for name in executor.map(put, files.items()) if name is not None}


def upload(folder: Path, target: str | os.PathLike, last: str) -> None:
    """Writes all files of a folder on this machine into a folder of a bucket, one after the other.

    A file is held in memory while it is written.

    Args:
      folder: The folder on this machine.
      target: The address of the folder in the bucket.
      last: The name, relative to the folder, of the file that makes the folder in the bucket complete. It is written
        when all others are there, because nothing can be renamed in a bucket.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (name == last, name)):
        write(place(target) / name, (folder / name).read_bytes())


def write_if(path: str | os.PathLike, content: bytes, generation: bytes) -> bytes | None:
    """Writes an object if it still has a generation.

    Args:
      path: The address of the object.
      content: The content, which no other writer writes: a write that has succeeded although its answer was lost is
        recognised by it.
      generation: The generation from `read_with_generation`, which may have found no object, or from an earlier call.

    Returns:
      The new generation, or None if the object has another generation and is left as it was.
    """
    store, name = _split(path)
    try:
        stamp = _call(path, lambda: store.write(name, content, if_equal=generation))
        if stamp.generation:
            return stamp.generation
    except UserError as error:
        if "NoSuchKey" not in str(error.__cause__):  # the answer of S3 if the object has gone
            raise
    found, now = read_with_generation(path)
    return now if found == content else None


def delete(path: str | os.PathLike, generation: bytes | None = None) -> None:
    """Deletes an object, if there is one. If `generation` is given, only the object of that generation.

    S3 has no such condition, so TensorStore looks which generation there is before it deletes.
    """
    store, name = _split(path)
    _call(path, lambda: store.write(name, None, if_equal=generation))


def delete_all(folder: str | os.PathLike) -> None:
    """Deletes all objects in a folder of a bucket and its subfolders."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_AT_ONCE) as executor:
        list(executor.map(lambda name: delete(place(folder) / name), names(folder)))


def move_all(folder: str | os.PathLike, target: str | os.PathLike, first: str) -> None:
    """Moves all objects of a folder to another folder of the same bucket. They are copied within the storage.

    Args:
      folder: The address of the folder.
      target: The address of the new folder.
      first: The name of an object without which the folder does not count any more. It is deleted before any other
        object is moved, and not copied.
    """
    from concurrent.futures import ThreadPoolExecutor

    import fsspec

    delete(place(folder) / first)
    files = fsspec.filesystem(addresses.parse(folder).kind)

    def move(name: str) -> None:
        source, new = place(folder) / name, place(target) / name
        retries.call(str(source), lambda: files.cp_file(str(source), str(new)), retries.POLICY)
        delete(source)

    with ThreadPoolExecutor(_AT_ONCE) as executor:
        list(executor.map(move, names(folder)))


def copy_to(path: str | os.PathLike, file: Path) -> None:
    """Copies an object into a file, in pieces. Raises FileNotFoundError if there is none."""
    with file.open("wb") as target:
        content, generation = read_with_generation(path, slice(0, _PIECE))
        if content is None:
            raise FileNotFoundError(2, "No such object", os.fspath(path))
        while content:
            assert len(content) <= _PIECE
            target.write(content)
            content, now = read_with_generation(path, slice(target.tell(), target.tell() + _PIECE))
            if now != generation:
                raise UserError(f"{path} has changed while it was read: try again")
