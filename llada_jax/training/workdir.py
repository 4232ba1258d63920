"""The folder of a run: one owner at a time, a record of every start, and what a resume may not change."""

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

# Settings a run keeps for life, beside the hashes of its data and tokenizer.
FIXED = ("seed", "batch_size", "sequence_length", "optimizer.name", "optimizer.state_dtype")
FIXED_GROUPS = ("model.", "diffusion.")

_SHARED_SECONDS = 20  # until what one host has written must be seen by the others


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes `workdir` and owns it until the end, even an end by kill -9.

    Of several processes the first owns it for all; each of the others checks that it sees the same folder.

    Raises:
      UserError: another run owns it, it cannot be written, or it is not the same folder everywhere.
    """
    with contextlib.ExitStack() as owned:
        mark = distributed.first_decides("workdir", lambda: _own(workdir, owned))
        if distributed.index():
            _check_shared(workdir, mark)
        yield


def _own(workdir: Path, owned: contextlib.ExitStack) -> str:
    """Takes the lock, which `owned` gives back; returns what the other processes, if any, will find in its file."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = owned.enter_context((workdir / "lock").open("a"))
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--workdir={workdir} is in use by another process") from None
    except OSError:
        pass  # a file system without locks: nothing to hold on to
    mark = f"{platform.node()} {os.getpid()} {time.time_ns()}"
    if distributed.count() > 1:
        lock.truncate(0)
        lock.write(mark)
        lock.flush()
        os.fsync(lock.fileno())
    return mark


def _check_shared(workdir: Path, mark: str) -> None:
    """UserError unless process 0 has written `mark` into this very folder; a network file system may be late."""
    for _ in range(_SHARED_SECONDS):
        with contextlib.suppress(OSError):
            if (workdir / "lock").read_text() == mark:
                return
        time.sleep(1)
    raise UserError(
        f"--workdir={workdir} is not the same folder on {platform.node()} as where process 0 runs: "
        "several hosts need one that all have mounted"
    )


def identity(config: Config, manifests: list, tokenizer_sha256: str) -> dict:
    """What makes two runs the same run, beyond the config: the content of data and tokenizer."""
    return {
        "data": [manifest.sha256 for manifest in manifests],
        "weights": list(config.data.weights),
        "tokenizer": tokenizer_sha256,
    }


def check_same_run(old: tuple[Config, dict], new: tuple[Config, dict], where: str, remedy: str) -> dict[str, tuple]:
    """What else changed, dotted name -> (old, new). UserError naming the first difference that is not allowed.

    Args:
      old, new: config and identity.
      where: the workdir of the old one.
      remedy: what to do about a difference.
    """
    changed = configs.differences(old[0], new[0])
    for name, (before, after) in changed.items():
        if name in FIXED or name.startswith(FIXED_GROUPS):
            raise UserError(f"config.{name} is {after}, but {where} was trained with {before}: {remedy}")
    for name, after in new[1].items():
        if old[1].get(name) != after:
            raise UserError(f"the {name} differs from that of {where} (by its hash or value): {remedy}")
    return {name: values for name, values in changed.items() if name not in FIXED}


def read_config(workdir: str | os.PathLike) -> tuple[Config, dict]:
    """The resolved config of a workdir and its identity record (see `write_config`). UserError if there is none."""
    path = Path(workdir) / "config.json"
    try:
        record = json.loads(path.read_text())
        return configs.from_dict(record["config"]), record["identity"]
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a training workdir: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def write_config(workdir: str | os.PathLike, config: Config, identity: dict) -> None:
    """Writes config.json: the resolved config, and the identity of data and tokenizer (hashes) of the run."""
    path = Path(workdir) / "config.json"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump({"config": configs.to_dict(config), "identity": identity}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())  # the checkpoints are worth nothing without it
    temporary.replace(path)


def record_start(workdir: Path, config: Config, step: int) -> None:
    """Appends to starts.jsonl: when, from which step, command, config, commit, versions, hardware."""
    devices = jax.devices()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "numpy")
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
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
    """The commit of this source tree, with "-dirty" if files differ from it; None outside a checkout."""
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
    """Copies the tokenizer's folder into the workdir, whole or not at all; a different one there is replaced.

    Args:
      workdir: local or mounted.
      source: anything etils.epath opens, such as gs://.
    """
    target, temporary = workdir / "tokenizer", workdir / "tokenizer.tmp"
    contents = _contents(source)
    if target.exists():
        if _contents(target) == contents:
            return
        shutil.rmtree(target)  # of an earlier start that never came to its first checkpoint
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, content in contents.items():
        (temporary / name).write_bytes(content)
    temporary.rename(target)


def _contents(folder: str | os.PathLike) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in epath.Path(folder).iterdir()}
