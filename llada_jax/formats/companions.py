"""Finds and copies the companion files of a published folder, which are all its files except the weights.

A published model is more than its weights: config.json, the tokenizer, chat templates, code and a licence belong to it.
A run that starts from a published model keeps these files in WORKDIR/published/, so that `convert` can write them
again.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from llada_jax.formats.workdir import CHECKPOINTS, PUBLISHED_FILES

# The endings of weights in any format that folders on the Hugging Face Hub hold. A .bin file may also be something
# else, so it counts as weights only if its name begins with one of _WEIGHTS_BIN.
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_WEIGHTS_BIN = ("pytorch_model", "model", "adapter_model", "optimizer", "consolidated")


def companion_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Finds the files of a published folder and of its subfolders; hidden files are left out.

    Returns:
      A dict from the name of each companion file (relative to the folder, with "/") to its path, and the list of the
      names of the files with weights.
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
    """Writes files into a folder and its subfolders.

    Args:
      folder: The folder, which may be missing if `files` is not empty.
      files: For each name, the content of the file or a file to copy.
    """
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def keep_companions(workdir: Path, source: Path) -> None:
    """Copies the companion files of the model that a run starts from into its workdir, whole or not at all.

    Args:
      workdir: The workdir of a run that has no checkpoint yet.
      source: A published folder, or a workdir, which may or may not hold companion files.
    """
    origin = source / PUBLISHED_FILES if (source / CHECKPOINTS).is_dir() else source
    target, temporary = workdir / PUBLISHED_FILES, workdir / f"{PUBLISHED_FILES}.tmp"
    shutil.rmtree(target, ignore_errors=True)  # left by an earlier start that did not reach its first checkpoint
    shutil.rmtree(temporary, ignore_errors=True)
    if origin.is_dir():
        temporary.mkdir()
        put_files(temporary, companion_files(origin)[0])
        temporary.rename(target)
