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
from collections.abc import Iterator
from pathlib import Path

import jax

from llada_jax import config as configs
from llada_jax.config import Config, UserError

# Settings a run keeps for life, beside the hashes of its data and tokenizer.
FIXED = ("seed", "batch_size", "sequence_length", "optimizer.name")
FIXED_GROUPS = ("model.", "diffusion.")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes `workdir` and owns it until the end, even an end by kill -9. UserError if another process does."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("a")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir={workdir} is in use by another process") from None
        except OSError:
            pass  # a file system without locks: nothing to hold on to
        yield


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
    if jax.process_index():
        return
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
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def keep_tokenizer(workdir: Path, source: Path) -> None:
    """Copies the tokenizer's folder into the workdir, whole or not at all; a different one there is replaced."""
    target, temporary = workdir / "tokenizer", workdir / "tokenizer.tmp"
    if target.exists():
        if _contents(target) == _contents(source):
            return
        shutil.rmtree(target)  # of an earlier start that never came to its first checkpoint
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(target)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
