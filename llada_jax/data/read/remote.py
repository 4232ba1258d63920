"""Makes the shards of a prepared set readable on every host.

Any host may need any row at any step, so every host must see all shards. There are two ways:

  a mounted folder   (local disk, NFS, Lustre, Cloud Storage FUSE): config.data.path=/mnt/sets/text. Rows are read
                     from the folder itself. Use this way for a set that is larger than the hosts' disks. Mount Cloud
                     Storage FUSE with its file cache on, because each row is a small read.
  a bucket           config.data.path=gs://BUCKET/text (or s3://, az://, hf://). Each host copies the set to
                     config.data.cache before it trains, and reads the rows from the copy. It copies the set only
                     once: the next start, and all other processes of the host, find the copy again. The copy needs
                     as much space as the whole set.

`gcloud storage cp -r sets/text gs://BUCKET/` copies a prepared set to a bucket. gs:// needs gcsfs (pip install
'llada_jax[gcs]'). This module is only about prepared sets: the workdir is always a local or mounted folder.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from llada_jax.config import UserError
from llada_jax.data.manifest import MANIFEST_FILE, TOKENIZER_FOLDER, Manifest, Shard, load_manifest

_COPIES_AT_ONCE = 8
_CHUNK = 1 << 24  # bytes


def is_remote(path: str) -> bool:
    """Returns whether a set must be copied before its rows can be read."""
    return "://" in path


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
    if not is_remote(path):
        return path
    manifest = _remote_manifest(path)
    root = Path(cache or "~/.cache/llada_jax").expanduser()
    target = root / manifest.sha256[:24]
    shards = manifest.files()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with (root / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this host may be copying it
            if (target / MANIFEST_FILE).exists() and not _missing(shards, target):
                return str(target)
            missing = _missing(shards, target)
            size = sum(shard.size for shard in missing)
            report(f"copying {len(missing)} files ({size / 2**30:.2f} GiB) of {path} to {target}")
            with ThreadPoolExecutor(_COPIES_AT_ONCE) as executor:
                for _ in executor.map(lambda shard: _copy(epath.Path(path) / shard.name, target, shard), missing):
                    pass
            _copy_tokenizer(epath.Path(path) / TOKENIZER_FOLDER, target)
            temporary = target / f"{MANIFEST_FILE}.tmp"
            temporary.write_text(manifest.to_json())
            temporary.replace(target / MANIFEST_FILE)  # last, because the manifest makes the copy a complete set
    except OSError as error:
        raise UserError(
            f"{path} cannot be copied to {target}: {' '.join(str(error).split())}; "
            "set config.data.cache to use another folder"
        ) from error
    return str(target)


def _remote_manifest(path: str) -> Manifest:
    try:
        return load_manifest(path)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path}: {error}; gs:// needs pip install 'llada_jax[gcs]'") from error
    except Exception as error:  # each file system has its own exceptions for no access, no network and no bucket
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _missing(shards: list[Shard], folder: Path) -> list[Shard]:
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    return [shard for shard in shards if sizes.get(shard.name) != shard.size]


def _copy(source: epath.Path, folder: Path, shard: Shard) -> None:
    temporary, digest = folder / f"{shard.name}.tmp", hashlib.sha256()
    with temporary.open("wb") as write:
        for chunk in _chunks(source):
            digest.update(chunk)
            write.write(chunk)
    if digest.hexdigest() != shard.sha256:
        temporary.unlink()
        raise UserError(f"{source} is not what the manifest says: copy it there again, or prepare the set again")
    temporary.replace(folder / shard.name)


def _chunks(source: epath.Path) -> Iterator[bytes]:
    """Yields the content of a remote file. Raises UserError if it cannot be read, whatever the file system raises."""
    try:
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing: copy the whole folder there, or prepare the set again") from error
    except Exception as error:  # each remote file system has its own exceptions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{source} cannot be read: {reason}") from error


def _copy_tokenizer(source: epath.Path, folder: Path) -> None:
    temporary = folder / f"{TOKENIZER_FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in source.iterdir():
        (temporary / file.name).write_bytes(file.read_bytes())
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    os.rename(temporary, folder / TOKENIZER_FOLDER)
