"""How the shards of a prepared set reach the hosts.

Any row may be needed by any host at any step, so every host must see all shards. There are two ways:

  a mounted folder   (local disk, NFS, Lustre, Cloud Storage FUSE): config.data.path=/mnt/sets/text. Rows are read
                     where they lie. The way for a set larger than the hosts' disks; with Cloud Storage FUSE mount
                     with its file cache on, since single rows are small reads.
  a bucket           config.data.path=gs://BUCKET/text (s3://, az:// and hf:// alike). Each host copies the set to
                     config.data.cache before it trains, and reads rows there: once, for the copy is found again at
                     the next start, and by all processes of the host. It needs the space of the whole set.

`gcloud storage cp -r sets/text gs://BUCKET/` puts a prepared set there. gs:// needs gcsfs (pip install
'llada_jax[gcs]'). The workdir is another matter: it is always a local or mounted folder.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from llada_jax.config import UserError
from llada_jax.data.manifest import MANIFEST_FILE, TOKENIZER_FOLDER, Manifest, Shard, load_manifest

_COPIES_AT_ONCE = 8
_CHUNK = 1 << 24  # bytes


def is_remote(path: str) -> bool:
    """Whether a set must be copied before its rows can be read."""
    return "://" in path


def local_copy(path: str, cache: str, report: Callable[[str], None] = print) -> str:
    """The folder of a prepared set on this host; a remote set is copied first, what is whole there is kept.

    Args:
      path: the set; a local path is returned as it is.
      cache: the folder for copies, "" = ~/.cache/llada_jax.
      report: told once if there is something to copy.

    Raises:
      UserError: there is no such set, it cannot be read, or what was read is not what the manifest says.
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
            temporary.replace(target / MANIFEST_FILE)  # last: with it the copy is a set
    except OSError as error:
        raise UserError(
            f"{path} cannot be copied to {target}: {' '.join(str(error).split())}; "
            "config.data.cache names another folder"
        ) from error
    return str(target)


def _remote_manifest(path: str) -> Manifest:
    try:
        return load_manifest(path)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path}: {error}; for gs:// pip install 'llada_jax[gcs]'") from error
    except Exception as error:  # every file system has its own exceptions for no access, no network, no bucket
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _missing(shards: list[Shard], folder: Path) -> list[Shard]:
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    return [shard for shard in shards if sizes.get(shard.name) != shard.size]


def _copy(source: epath.Path, folder: Path, shard: Shard) -> None:
    temporary, digest = folder / f"{shard.name}.tmp", hashlib.sha256()
    try:
        with source.open("rb") as read, temporary.open("wb") as write:
            while chunk := read.read(_CHUNK):
                digest.update(chunk)
                write.write(chunk)
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing: copy the whole folder there, or prepare the set again") from error
    except OSError:
        raise
    except Exception as error:  # every remote file system has its own
        raise UserError(f"{source} cannot be copied to {folder}: {type(error).__name__}: {error}") from error
    if digest.hexdigest() != shard.sha256:
        temporary.unlink()
        raise UserError(f"{source} is not what the manifest says: copy it there again, or prepare the set again")
    temporary.replace(folder / shard.name)


def _copy_tokenizer(source: epath.Path, folder: Path) -> None:
    temporary = folder / f"{TOKENIZER_FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in source.iterdir():
        (temporary / file.name).write_bytes(file.read_bytes())
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    os.rename(temporary, folder / TOKENIZER_FOLDER)
