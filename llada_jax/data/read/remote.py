"""Makes the rows of a prepared set readable on every host.

Any host may need any row at any step, so every host must see all shards. There are three ways:

  a mounted folder   (local disk, NFS, Lustre, Cloud Storage FUSE): config.data.path=/mnt/sets/text. Rows are read
                     from the folder itself. Mount Cloud Storage FUSE with its file cache on, because each row is a
                     small read.
  a bucket           config.data.path=gs://BUCKET/text, or s3://. Rows are read where they lie, each by a request of its
                     own, see in_place.py. config.data.cache keeps the tokenizer and the row indices.
  a copy             With config.data.copy=True, and always for az:// and hf://, each host copies the set to
                     config.data.cache before it trains, and reads the rows from the copy. It copies the set only once:
                     the next start, and all other processes of the host, find the copy again. The copy needs as much
                     space as the whole set.

`gcloud storage cp -r sets/text gs://BUCKET/` copies a prepared set to a bucket. Reading in place needs nothing more.
A copy needs the package of its file system: for gs:// gcsfs (pip install 'llada_jax[gcs]'), for s3:// s3fs
(pip install 'llada_jax[s3]').
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from llada_jax.config import UserError
from llada_jax.data.manifest import MANIFEST_FILE, TOKENIZER_FOLDER, Manifest, Shard, load_manifest, read_file
from llada_jax.storage import ranges, retries
from llada_jax.storage.objects import installation, is_bucket
from llada_jax.storage.retries import StorageFailed

_COPIES_AT_ONCE = 8
_CHUNK = 1 << 24  # bytes


def cache_folder(manifest: Manifest, cache: str) -> Path:
    """Returns the folder of this host that holds the copy of a set, or of its row indices and its tokenizer.

    Args:
      manifest: The manifest of the set.
      cache: The value of config.data.cache; "" means ~/.cache/llada_jax.
    """
    return Path(cache or "~/.cache/llada_jax").expanduser() / manifest.sha256[:24]


def read_in_place(path: str, copy: bool) -> bool:
    """Returns whether the rows of a remote set are read where they lie. `copy` is config.data.copy."""
    return not copy and ranges.supported(path)


def local_tokenizer(path: str, cache: str) -> str:
    """Returns a folder of this host with the tokenizer of a set. That of a set that is read in place is copied.

    Raises:
      UserError: If the tokenizer cannot be copied.
      StorageFailed: If the storage does not answer.
    """
    if not is_bucket(path):
        return os.path.join(path, TOKENIZER_FOLDER)
    folder = cache_folder(manifest_of(path), cache)
    try:
        with _locked(folder):
            if not (folder / TOKENIZER_FOLDER).exists():
                bucket, inside = ranges.Folder(path), f"{TOKENIZER_FOLDER}/"
                names = [name for name in bucket.names() if name.startswith(inside)]
                _keep_tokenizer({name.removeprefix(inside): bucket.whole(name) for name in names}, folder)
    except OSError as error:
        raise _not_copied(path, folder, error) from error
    return str(folder / TOKENIZER_FOLDER)


def local_copy(path: str, cache: str, report: Callable[[str], None] = print) -> str:
    """Returns the folder of a prepared set on this host. A remote set is copied to this host first.

    Files that are already complete in the copy are not copied again.

    Args:
      path: The path of the set. A local path is returned as it is.
      cache: The folder for copies; "" means ~/.cache/llada_jax.
      report: A function that is called with one line of text if there is something to copy.

    Raises:
      UserError: If there is no such set, if it cannot be read or copied, or if a file is not what the manifest says.
    """
    if not is_bucket(path):
        return path
    with _readable(path):
        manifest = retries.call(path, lambda: load_manifest(path), retries.POLICY)
    target = cache_folder(manifest, cache)
    shards = manifest.files()
    try:
        with _locked(target):
            if (target / MANIFEST_FILE).exists() and not _missing(shards, target):
                return str(target)
            missing = _missing(shards, target)
            size = sum(shard.size for shard in missing)
            report(f"copying {len(missing)} files ({size / 2**30:.2f} GiB) of {path} to {target}")
            with ThreadPoolExecutor(_COPIES_AT_ONCE) as executor:
                for _ in executor.map(lambda shard: _copy(epath.Path(path) / shard.name, target, shard), missing):
                    pass
            _keep_tokenizer(_tokenizer_files(epath.Path(path) / TOKENIZER_FOLDER), target)
            temporary = target / f"{MANIFEST_FILE}.tmp"
            temporary.write_text(manifest.to_json())
            temporary.replace(target / MANIFEST_FILE)  # last, because the manifest makes the copy a complete set
    except OSError as error:
        raise _not_copied(path, target, error) from error
    return str(target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes a folder for copies, and keeps all other processes of this host from copying to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _not_copied(path: str, folder: Path, error: OSError) -> Exception:
    if isinstance(error, StorageFailed):
        return error
    return UserError(
        f"{path} cannot be copied to {folder}: {' '.join(str(error).split())}; "
        "set config.data.cache to use another folder"
    )


def manifest_of(path: str) -> Manifest:
    """Returns the manifest of a set on this host, or of one that is read in place.

    Raises:
      UserError: As `load_manifest`, or if the storage cannot be read.
      StorageFailed: If the storage does not answer.
    """
    return load_manifest(path, read_file)


@contextlib.contextmanager
def _readable(path: str | epath.Path) -> Iterator[None]:
    """Turns what a remote file system raises into a UserError; each has its own exceptions, for example for access."""
    try:
        yield
    except (UserError, StorageFailed):
        raise
    except ImportError as error:
        raise UserError(f"{path}: {error}{installation(path)}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy the whole folder there, or prepare the set again") from error
    except Exception as error:
        if not is_bucket(os.fspath(path)):
            raise
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _missing(shards: list[Shard], folder: Path) -> list[Shard]:
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    return [shard for shard in shards if sizes.get(shard.name) != shard.size]


def _copy(source: epath.Path, folder: Path, shard: Shard) -> None:
    temporary = folder / f"{shard.name}.tmp"
    with _readable(source):
        found = retries.call(os.fspath(source), lambda: _transfer(source, temporary), retries.POLICY)
    if isinstance(found, OSError):
        raise found
    if found != shard.sha256:
        temporary.unlink()
        raise UserError(f"{source} is not what the manifest says: copy it there again, or prepare the set again")
    temporary.replace(folder / shard.name)


def _transfer(source: epath.Path, target: Path) -> str | OSError:
    """Copies a remote file and returns its sha256, or the error if this host cannot write it."""
    digest = hashlib.sha256()
    with source.open("rb") as file:
        try:
            write = target.open("wb")
        except OSError as error:
            return error
        with write:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                try:
                    write.write(chunk)
                except OSError as error:
                    return error
    return digest.hexdigest()


def _tokenizer_files(source: epath.Path) -> dict[str, bytes]:
    with _readable(source):
        read = lambda: {file.name: file.read_bytes() for file in source.iterdir()}  # noqa: E731
        return retries.call(os.fspath(source), read, retries.POLICY)


def _keep_tokenizer(files: dict[str, bytes], folder: Path) -> None:
    temporary = folder / f"{TOKENIZER_FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    os.rename(temporary, folder / TOKENIZER_FOLDER)
