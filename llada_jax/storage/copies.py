"""Copies of folders of a bucket on this machine, for libraries that read files: safetensors and tokenizers.

A copy is made once: as long as the objects stay the same, the next program finds it. It lies in
~/.cache/llada_jax/models (or under XDG_CACHE_HOME), and may be deleted at any time.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llada_jax.config import UserError
from llada_jax.storage import objects
from llada_jax.storage.retries import StorageFailed

_COPIES_AT_ONCE = 4
_DONE = ".complete"  # the file that makes a copy complete


def cache(kind: str) -> Path:
    """Returns the folder for what can be fetched from a bucket again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llada_jax" / kind


def local_copy(
    folder: str | os.PathLike, wanted: Callable[[str], bool], report: Callable[[str], None], folders: tuple = ()
) -> Path:
    """Copies objects of a folder to this machine, unless they are there, and returns the folder with the files.

    Args:
      folder: The address of the folder.
      wanted: A function that tells by the name, relative to the folder, whether an object is copied.
      report: A function that is called with one line of text if there is something to copy that takes long.
      folders: The names of empty folders that the copy has as well.

    Raises:
      UserError: If the copy cannot be written, or if the bucket cannot be read.
      StorageFailed: If the bucket does not answer.
    """
    names = [name for name in objects.names(folder) if wanted(name) and not name.endswith("/")]
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as executor:

        def generation(name: str) -> str:
            return objects.read_with_generation(objects.place(folder) / name, slice(0, 1))[1].hex()

        known = repr([os.fspath(folder), folders, *zip(names, executor.map(generation, names), strict=True)])
        target = cache("models") / hashlib.sha256(known.encode()).hexdigest()[:24]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this host may be copying it
                if (target / _DONE).exists():
                    return target
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                for name in (*folders, *{os.path.dirname(name) for name in names}):
                    (target / name).mkdir(parents=True, exist_ok=True)
                if any(name.endswith(".safetensors") for name in names):
                    report(f"copying {folder} to {target}")
                copies = [executor.submit(objects.copy_to, objects.place(folder) / n, target / n) for n in names]
                for each in copies:
                    each.result()
                (target / _DONE).touch()
        except OSError as error:
            if isinstance(error, StorageFailed | FileNotFoundError):
                raise
            raise UserError(f"{folder} cannot be copied to {target}: {' '.join(str(error).split())}") from error
    return target
