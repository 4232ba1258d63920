"""Identifies the model and the versions behind a file of results, and shows the figures as a table."""

import hashlib
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from llada_jax import __version__
from llada_jax.devices import distributed
from llada_jax.formats import published, workdir
from llada_jax.storage import objects
from llada_jax.storage.objects import Place

_PACKAGES = ("jax", "jaxlib", "flax", "lm_eval", "datasets", "tokenizers", "sentencepiece", "numpy")


def identify(path: str, step: int | None = None) -> dict[str, Any]:
    """Identifies a model, so that another model at the same path can be distinguished from it.

    Args:
      path: The folder of the model.
      step: The step of a checkpoint in a training workdir. None means the newest checkpoint.

    Returns:
      The path, the step (None for a published folder), a hash of config.json, and a hash of the weights. For a
      checkpoint, the weights' hash is the hash of the checkpoint's record, which has a fingerprint of every array. For
      a published folder, it is a hash of the names, sizes and modification times of the *.safetensors files.
    """
    folder, remote = objects.place(path), objects.is_bucket(path)
    record: dict[str, Any] = {"path": path if remote else str(Path(path).resolve()), "step": None}
    if workdir.is_workdir(folder, "--model=") if remote else (folder / workdir.CHECKPOINTS).is_dir():
        record["step"] = workdir.choose_step(folder, step)
        weights = _content(workdir.checkpoint_path(folder, record["step"]) / "run" / "metadata")
        # For a model with adapters, the weights of the frozen base model count as well.
        weights += _content(workdir.checkpoint_path(folder / workdir.FROZEN, 0) / "run" / "metadata")
    else:
        folder = workdir.local_files(path, distributed.log)
        found = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
        weights = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]).encode()
        if remote:
            weights = folder.name.encode()  # the name of the copy is a hash of the generations of its objects
    return record | {"config": digest(_content(folder / published.CONFIG)), "weights": digest(weights)}


def _content(path: Place) -> bytes:
    """Returns the content of a file, empty if it cannot be read: loading the model reports what is missing."""
    try:
        return objects.read(path)
    except OSError:
        return b""


def digest(content: bytes) -> str:
    """Returns the sha256 of some bytes in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions of this package and of the installed packages that the figures depend on."""
    found = {"llada_jax": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def as_json(results: dict[str, Any]) -> tuple[str, list[str]]:
    """Returns results as the text of a JSON file, and the places of the numbers that JSON cannot represent.

    NaN and infinite numbers become null. Keys, and values from a task's config, of a type that JSON does not have
    become texts. Every text can be written, also one that no encoding allows (half a surrogate pair).
    """
    broken: list[str] = []

    def plain(value: Any, place: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            broken.append(place)
            return None
        if isinstance(value, dict):
            return {str(key): plain(item, f"{place}/{key}".lstrip("/")) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{place}/{i}") for i, item in enumerate(value)]
        return value if value is None or isinstance(value, bool | int | float | str) else str(value)

    content = plain(results, "")
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(content, indent=2, allow_nan=False)
    return text + "\n", broken


def table(results: dict[str, Any]) -> str:
    """Returns a table of the figures with their standard errors, one figure per line."""
    rows = [("task", "shots", "filter", "metric", "value", "stderr")]
    for task, figures in results["results"].items():
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            shots = str(results["n-shot"].get(task, ""))
            rows.append((figures.get("alias", task), shots, kind, metric, _figure(value), _figure(error)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
    return "" if value is None else str(value)
