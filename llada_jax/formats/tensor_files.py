"""Folders of safetensors files: opened without reading a tensor, written without holding more than one.

Files are read by the safetensors library. It can write a file only from all its tensors at once, which for a
published model are gigabytes; here they are written one after the other as they come, into the same bytes.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llada_jax.config import UserError
from llada_jax.formats.published import CONFIG, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as the files name them, as numpy does
_CHUNK_BYTES = 16 << 20  # of a tensor that are put in order at a time


class Folder:
    """The safetensors of a published folder, opened and listed; tensors are read when they are cut."""

    def __init__(self, directory: Path, files: contextlib.ExitStack):
        """Opens all shards in `files`. UserError for missing, truncated or foreign ones."""
        self.directory = directory
        index = directory / INDEX
        weight_map = _weight_map(index) if index.exists() else None
        if weight_map is None:
            names = sorted(path.name for path in directory.glob("*.safetensors"))
            if len(names) != 1:
                raise UserError(f"{directory}: {len(names)} .safetensors files, expected one, or {INDEX}")
        else:
            names = sorted(set(weight_map.values()))
        self._tensors: dict[str, Any] = {}
        for name in names:
            shard = _open(directory / name, files, "" if weight_map is None else f", {INDEX} names it")
            for tensor in shard.keys():
                if tensor in self._tensors:
                    raise UserError(f"{directory}: tensor {tensor} is in more than one file")
                if weight_map is not None and weight_map.get(tensor, name) != name:
                    raise UserError(f"{index}: {tensor} should be in {weight_map[tensor]}, it is in {name}")
                self._tensors[tensor] = shard
        for tensor in weight_map or ():
            if tensor not in self._tensors:
                raise UserError(f"{directory / weight_map[tensor]}: tensor {tensor} is missing, {INDEX} names it")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Any:
        """A tensor that is read when it is cut."""
        return self._tensors[name].get_slice(name)

    def dtypes(self) -> dict[str, str]:
        """The dtype of each tensor, by numpy's name."""
        return {name: DTYPES[self[name].get_dtype()] for name in self._tensors if not _is_table(name)}

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """UserError unless there are exactly these tensors, of these shapes and of a float dtype."""
        for name, shape in expected.items():
            if name not in self:
                raise UserError(f"{self.directory}: tensor {name} is missing")
            found, dtype = tuple(self[name].get_shape()), self[name].get_dtype()
            if found != shape:
                raise UserError(f"{self.directory}: tensor {name} has shape {found}, expected {shape}")
            if dtype not in DTYPES:
                raise UserError(f"{self.directory}: tensor {name} is {dtype}, supported: {', '.join(DTYPES)}")
        for name in self._tensors:
            if name not in expected and not _is_table(name):
                raise UserError(f"{self.directory}: tensor {name} is not part of the model that {CONFIG} describes")


def _is_table(name: str) -> bool:
    # Older exports of Llama's naming carry the table of RoPE frequencies.
    return name.endswith("rotary_emb.inv_freq")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file. UserError if the index does not say so."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"{index}: {tensor} is in {json.dumps(name)[:100]}, which is no name of a file beside it")
    return weight_map


def _open(path: Path, files: contextlib.ExitStack, named: str) -> Any:
    if not path.exists():
        raise UserError(f"{path} is missing{named}")
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        return files.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not safetensors: {error}") from error


def write(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    shard_bytes: int,
    read: Callable[[str], np.ndarray],
    here: bool = True,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
) -> None:
    """Writes tensors as one file, or as several with an index if they are more than `shard_bytes`.

    Args:
      directory: exists.
      shapes: name -> shape, in the order in which they fill the files.
      dtypes: of each, float32, bfloat16 or float16.
      shard_bytes: of tensors per file at most, unless a single tensor has more.
      read: gives a tensor by its name, once each. It may be a view of any strides: rows are put in order in parts.
      here: whether this process writes; if not it calls `read` all the same, which may be a collective.
      progress: wraps the names while they are gone through.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    # Larger dtypes first in a file, so that each tensor starts at a multiple of its own.
    files = _fill(sizes, shard_bytes, lambda name: (-dtypes[name].itemsize, name))
    place = {name: file for file, names in files.items() for name in names}
    with contextlib.ExitStack() as current:
        out = None
        for name in progress(list(place)):
            if here and name == files[place[name]][0]:
                current.close()
                out = current.enter_context(_finished(directory / place[name]))
                out.write(_header({name: (shapes[name], dtypes[name]) for name in files[place[name]]}))
            tensor = read(name)
            if (tensor.shape, tensor.dtype) != (shapes[name], dtypes[name]):
                wanted = f"{shapes[name]} of {dtypes[name]}"
                raise ValueError(f"{name}: {tensor.shape} of {tensor.dtype}, expected {wanted}")
            if here:
                _write_rows(out, tensor)
    if here and len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(place.items()))}
        with _finished(directory / INDEX) as out:
            out.write((json.dumps(index, indent=2) + "\n").encode())


def _fill(sizes: Mapping[str, int], shard_bytes: int, order: Callable[[str], Any]) -> dict[str, list[str]]:
    """File name -> tensors in it, in the order in which they are written there."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {SINGLE: sorted(shards[0], key=order)}
    numbered = enumerate(shards, start=1)
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": sorted(names, key=order) for i, names in numbered}


def _header(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """What a file starts with: the length of a JSON object, and that object, which says where each tensor lies."""
    codes = {name: code for code, name in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned in a file that is mapped
    return len(text).to_bytes(8, "little") + text


def _write_rows(file: Any, tensor: np.ndarray) -> None:
    row_bytes = tensor[:1].nbytes
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, len(tensor), step):
        file.write(np.ascontiguousarray(tensor[start : start + step]).view(np.uint8))


@contextlib.contextmanager
def _finished(path: Path):
    """A new file that is on the disk when this ends."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
