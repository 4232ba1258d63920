"""Folders of models: of which kind they are, what they hold beside weights; and outputs, whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llada_jax.config import UserError
from llada_jax.data.prepare.output import refuse_existing, temporary_folder

CHECKPOINTS = "checkpoints"  # in a training workdir
KEPT = "published"  # there too: what the published folder that it comes from holds beside its weights
# Weights in any format that folders on the Hugging Face Hub hold; other .bin files may be anything.
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_WEIGHTS_BIN = ("pytorch_model", "model", "adapter_model", "optimizer", "consolidated")


def is_workdir(path: Path, name: str) -> bool:
    """True for a training workdir, False for a published folder.

    Args:
      path: a folder, of a user's.
      name: what messages put in front of it, such as "input ".

    Raises UserError: it is neither.
    """
    if not path.is_dir():
        raise UserError(f"{name}{path} is no folder: give a training workdir or a published model's folder")
    if (path / CHECKPOINTS).is_dir():
        return True
    if any(path.glob("*.safetensors*")):
        return False
    raise UserError(
        f"{name}{path} has no model: neither {CHECKPOINTS}/ (a training workdir) nor *.safetensors (published) in it"
    )


def other_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """What a published folder and its subfolders hold beside weights: config.json, tokenizer, templates, code, licence.

    Returns:
      Name (with the subfolder's, divided by "/") -> file, and the names of the weights; hidden files are neither.
    """
    files, weights = {}, []
    for inner, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if name[0] != "." and name != "__pycache__")
        for name in sorted(name for name in names if name[0] != "."):
            path = Path(inner) / name
            if name.endswith(_WEIGHTS) or (name.endswith(".bin") and name.startswith(_WEIGHTS_BIN)):
                weights.append(path.relative_to(folder).as_posix())
            elif path.is_file():
                files[path.relative_to(folder).as_posix()] = path
    return files, weights


def put_files(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Writes files, name -> content or a file to copy, into a folder and its subfolders."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def keep_published(workdir: Path, source: Path) -> None:
    """Keeps in a workdir what belongs to the published folder that its weights come from, whole or not at all.

    Args:
      workdir: of a new run.
      source: a published folder, or a workdir, which may have such files or not.
    """
    origin = source / KEPT if (source / CHECKPOINTS).is_dir() else source
    target, temporary = workdir / KEPT, workdir / f"{KEPT}.tmp"
    shutil.rmtree(target, ignore_errors=True)  # of an earlier start that never came to its first checkpoint
    shutil.rmtree(temporary, ignore_errors=True)
    if origin.is_dir():
        temporary.mkdir()
        put_files(temporary, other_files(origin)[0])
        temporary.rename(target)


def as_json(fields: Mapping[str, Any]) -> bytes:
    """A file of these fields."""
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def write_text(path: Path, text: str) -> None:
    """Writes the file of a flag --output whole or not at all. UserError if it cannot be written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"--output={path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_output(directory: str | os.PathLike) -> Path:
    """The folder to write; of a link that where it points to. UserError if there is something, or it cannot be one."""
    if not os.fspath(directory) or "://" in os.fspath(directory):
        raise UserError(f"output {os.fspath(directory)!r}: name a local folder to write")
    target = Path(os.path.realpath(directory))  # nothing can be renamed onto a link
    refuse_existing(target)
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output {directory} cannot be written: {parent} is no folder to write to")
    return target


@contextlib.contextmanager
def whole_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A new folder that gets the name `directory` when the block ends, and is gone if it ends in an exception.

    What a killed process left beside it, under another name, is removed by the next one.

    Raises:
      UserError: there is something of that name (an empty folder is fine), or it cannot be written.
    """
    target = check_output(directory)
    try:
        with temporary_folder(target) as beside:
            folder = beside / target.name
            folder.mkdir()
            yield folder
            for inner, _, _ in os.walk(folder):
                _sync(inner)
            try:
                os.rename(folder, target)  # onto a folder only if that is empty
            except OSError:
                refuse_existing(target)
                raise
            _sync(target.parent)
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else " ".join(str(error).split())
        raise UserError(f"output {directory} cannot be written: {reason}") from error


def _sync(folder: str | os.PathLike) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
