"""Defines the files and folders of a training workdir, and reads its config.json and the steps of its checkpoints.

    WORKDIR/config.json           the resolved configuration, and the hashes of the data and the tokenizer
    WORKDIR/tokenizer/            the tokenizer that the data was prepared with
    WORKDIR/checkpoints/STEP/     a checkpoint: `arrays.py` says what is in it
    WORKDIR/frozen/               with low-rank adapters: the weights that they are added to, a checkpoint of step 0
    WORKDIR/published/            the files beside the weights in the published folder that the run started from

Nothing here imports Orbax, which takes a second to load.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from llada_jax import config as configs
from llada_jax.config import Config, UserError
from llada_jax.formats import published
from llada_jax.storage import copies, objects
from llada_jax.storage.objects import Place

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
FROZEN = "frozen"
PUBLISHED_FILES = "published"
COMPLETE = "commit_success.txt"  # the object that makes a checkpoint in a bucket complete


def is_workdir(path: Place, name: str) -> bool:
    """Returns True for a training workdir and False for a published folder.

    Args:
      path: The folder, as a user gave it.
      name: The words that error messages put in front of the path, such as "input ".

    Raises:
      UserError: If the path is neither.
    """
    if objects.is_bucket(path):
        objects.check(path, name)
        there = objects.names(path)
        if any(file.startswith(f"{CHECKPOINTS}/") for file in there):
            return True
        if any("/" not in file and ".safetensors" in file for file in there):
            return False
        objects.require_bucket(path)
        raise UserError(f"{name}{path} has no model: it has neither {CHECKPOINTS}/ nor *.safetensors")
    if not path.is_dir():
        raise UserError(f"{name}{path} is not a folder: pass a training workdir or a published model's folder")
    if (path / CHECKPOINTS).is_dir():
        return True
    if any(path.glob("*.safetensors*")):
        return False
    others = sorted(file.name for ending in ("bin", "pt", "pth", "gguf") for file in path.glob(f"*.{ending}"))
    found = f"; it has weights in other formats ({', '.join(others)}): convert them to safetensors" if others else ""
    raise UserError(
        f"{name}{path} has no model: it has neither {CHECKPOINTS}/ (a training workdir) nor *.safetensors (a published "
        f"model){found}"
    )


def read_config(workdir: str | os.PathLike) -> tuple[Config, dict]:
    """Returns the resolved configuration of a workdir and the identity that `write_config` stored with it.

    Raises:
      UserError: If there is no config.json, or if it is damaged.
    """
    path = objects.place(workdir) / published.CONFIG
    try:
        record = json.loads(objects.read(path))
        return configs.from_dict(record["config"]), record["identity"]
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a training workdir: it has no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def write_config(workdir: str | os.PathLike, config: Config, identity: dict) -> None:
    """Writes config.json, whole or not at all.

    Args:
      workdir: An existing folder.
      config: The resolved configuration of the run.
      identity: What the run was trained on: the hashes of its data and its tokenizer.
    """
    path = Path(workdir) / published.CONFIG
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump({"config": configs.to_dict(config), "identity": identity}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())  # without this file, the checkpoints cannot be used
    temporary.replace(path)


def steps_in(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the complete checkpoints of a workdir in ascending order.

    A checkpoint that is still being written has a name that is not a number. In a bucket, where nothing can be renamed,
    it lacks the object that Orbax writes last.
    """
    if objects.is_bucket(workdir):
        parts = [name.split("/") for name in objects.names(objects.place(workdir) / CHECKPOINTS)]
        return sorted(int(part[0]) for part in parts if part[0].isdigit() and part[1:] == [COMPLETE])
    folder = Path(workdir) / CHECKPOINTS
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Returns the steps of the complete checkpoints in ascending order. Raises UserError if there are none."""
    steps = steps_in(workdir)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet")
    return steps


def choose_step(workdir: str | os.PathLike, step: int | None) -> int:
    """Returns `step`, or the newest step if it is None. Raises UserError if there is no such checkpoint."""
    steps = saved_steps(workdir)
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return step


def checkpoint_path(workdir: str | os.PathLike, step: int) -> Place:
    """Returns the folder of a checkpoint."""
    return objects.absolute(workdir) / CHECKPOINTS / str(step)


def local_files(path: str | os.PathLike, report: Callable[[str], None]) -> Path:
    """Returns the folder on this machine that has the files of a model folder which libraries read as files.

    Args:
      path: A training workdir or a published folder. On this machine, it is returned as it is. Of a workdir in a
        bucket, the small files are copied, and of a published folder everything.
      report: A function that is called with one line of text before weights are copied.
    """
    if not objects.is_bucket(path):
        return Path(path)
    if is_workdir(objects.place(path), ""):
        small = (f"{TOKENIZER}/", f"{PUBLISHED_FILES}/", published.CONFIG)
        return copies.local_copy(path, lambda name: name.startswith(small), report, (CHECKPOINTS,))
    return copies.local_copy(path, lambda name: True, report)


def trained_length(folder: str | Path) -> int | None:
    """Returns the sequence length that the model in a folder was trained with, or None if config.json does not say.

    Args:
      folder: A training workdir or a published folder.
    """
    try:
        record = json.loads(objects.read(objects.place(folder) / published.CONFIG))
        run = record.get("config")  # only the config.json of a workdir has this field
        return published.sequence_length(record) if run is None else run.get("sequence_length")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
