"""Keeps a workdir for one run at a time, records every start, and keeps the tokenizer of the run.

`formats/workdir.py` says what a workdir holds. This module does what only the run that owns the workdir does.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from llada_jax import config as configs
from llada_jax.config import Config, UserError
from llada_jax.devices import distributed
from llada_jax.formats.published import CONFIG
from llada_jax.formats.workdir import CHECKPOINTS, FROZEN, PUBLISHED_FILES, TOKENIZER
from llada_jax.storage import objects
from llada_jax.storage.lease import mark_of
from llada_jax.storage.objects import Place
from llada_jax.training.home import BucketHome, Home, working_copy

_FILES = ("metrics.jsonl", "samples.txt", "starts.jsonl", "wandb_id", CONFIG)
_FOLDERS = ("tensorboard", "profile", "data", "wandb", CHECKPOINTS, FROZEN, PUBLISHED_FILES, TOKENIZER)
_SHARED_SECONDS = 20  # how long a network file system may take to show one host what another has written


@contextlib.contextmanager
def locked(workdir: Place) -> Iterator[Home]:
    """Creates a workdir if needed, and owns it until the block ends or the process dies.

    If the run has several processes, the first one takes the lock for all. Each of the others checks that it sees the
    same folder. In a bucket, the lock is a lease (`storage/lease.py`), which a dead owner loses.

    Yields:
      The workdir, and in process 0 the folder for its files.

    Raises:
      UserError: If another run owns the workdir, if it cannot be written, or if it is not the same folder for all
        processes.
    """
    with contextlib.ExitStack() as owned:
        homes: list[Home] = []

        def own() -> str:
            if objects.is_bucket(workdir):
                home = BucketHome(workdir, f"--workdir={workdir}", distributed.log)
                homes.append(home)
                owned.callback(home.close)
                return home.lease.mark
            return _own(workdir, owned)

        mark = distributed.first_decides("workdir", own)
        if distributed.index():
            _check_shared(workdir, mark)
        folder = working_copy(workdir) if objects.is_bucket(workdir) else workdir
        yield homes[0] if homes else Home(workdir, folder)


def _own(workdir: Path, owned: contextlib.ExitStack) -> str:
    """Takes the lock, which `owned` releases, and returns the mark that other processes will find in its file."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = owned.enter_context((workdir / "lock").open("a"))
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    for names, kind, wrong in ((_FILES, "folder", Path.is_dir), (_FOLDERS, "file", Path.is_file)):
        for name in names:
            if wrong(workdir / name):  # otherwise the run would fail when it first writes there
                raise UserError(f"--workdir={workdir} has a {kind} called {name}, which a run needs: remove it")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--workdir={workdir} is in use by another process") from None
    except OSError:
        pass  # this file system has no locks
    mark = f"{platform.node()} {os.getpid()} {time.time_ns()}"
    if distributed.count() > 1:
        lock.truncate(0)
        lock.write(mark)
        lock.flush()
        os.fsync(lock.fileno())
    return mark


def _check_shared(workdir: Place, mark: str) -> None:
    """Raises UserError unless process 0 has written `mark` into this folder."""
    if objects.is_bucket(workdir):
        if (found := mark_of(workdir / "lock")) != mark:
            raise UserError(f"--workdir={workdir} is owned by {found} as {platform.node()} sees it, not by {mark}")
        return
    for _ in range(_SHARED_SECONDS):
        with contextlib.suppress(OSError):
            if (workdir / "lock").read_text() == mark:
                return
        time.sleep(1)
    raise UserError(
        f"--workdir={workdir} is not the same folder on {platform.node()} as where process 0 runs: "
        "use a folder on a file system that all hosts have mounted"
    )


def record_start(workdir: Path, config: Config, step: int, account: dict | None = None) -> None:
    """Appends a line to starts.jsonl: time, step, command, config, commit, versions and hardware of this start.

    Args:
      workdir: The workdir of the run.
      config: The resolved configuration.
      step: The step that this start begins at.
      account: Where the time of the run went until now: further fields of the line (`goodput.py`).
    """
    devices = jax.devices()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "numpy")
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        **(account or {}),
        "command": sys.argv,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "hardware": {
            "device_kind": devices[0].device_kind,
            "devices": len(devices),
            "processes": jax.process_count(),
            "host": platform.node(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "config": configs.to_dict(config),
    }
    with (workdir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def _commit() -> str | None:
    """Returns the commit of this source tree, with "-dirty" if files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def keep_tokenizer(workdir: Path, source: str | os.PathLike) -> None:
    """Copies the folder of a tokenizer into the workdir, whole or not at all. A different tokenizer there is replaced.

    Args:
      workdir: The workdir of the run.
      source: A folder that etils.epath can open, which may be remote (gs://).
    """
    target, temporary = workdir / TOKENIZER, workdir / f"{TOKENIZER}.tmp"
    contents = _contents(source)
    if target.exists():
        if _contents(target) == contents:
            return
        shutil.rmtree(target)  # left by an earlier start that did not reach its first checkpoint
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, content in contents.items():
        (temporary / name).write_bytes(content)
    temporary.rename(target)


def _contents(folder: str | os.PathLike) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in epath.Path(folder).iterdir()}
