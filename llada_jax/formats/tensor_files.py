"""Opens folders of safetensors files without reading a tensor, and writes them without holding more than one tensor.

The safetensors library reads the files. It can write a file only from all of its tensors at once, which are gigabytes
for a published model. Therefore this module writes the tensors of a file one after the other. The bytes of the file
are the same as if the library had written it.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llada_jax.cli.machine_errors import machine_error, reason
from llada_jax.config import UserError
from llada_jax.formats.published import CONFIG, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # names in the files -> names in numpy
_TABLES = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached",
           "rotary_emb.rope_pos_cos", "rotary_emb.rope_pos_sin", ".position_ids")  # fmt: skip
_CHUNK_BYTES = 16 << 20  # number of bytes of a tensor that are made contiguous at a time


class Folder:
    """The open safetensors files of a published folder. A tensor is read only when it is sliced."""

    def __init__(self, directory: Path, files: contextlib.ExitStack):
        """Opens the safetensors files that are the model: model.safetensors, or the files that the index names.

        If the folder has both, model.safetensors is the model, as in transformers. If it has neither, its only
        safetensors file is the model. `files` names what belongs to the model.

        Args:
          directory: The published folder.
          files: The stack that closes the files.

        Raises:
          UserError: If a file is missing, truncated or not a safetensors file, or if the files and their index
            contradict each other.
        """
        self.directory = directory
        index = directory / INDEX
        weight_map = _weight_map(index) if index.exists() and not (directory / SINGLE).exists() else None
        if weight_map is not None:
            names = sorted(set(weight_map.values()))
        elif (directory / SINGLE).exists():
            names = [SINGLE]
        else:
            names = sorted(path.name for path in directory.glob("*.safetensors") if path.name[0] != ".")
            if len(names) != 1:
                raise UserError(
                    f"{directory} has {len(names)} .safetensors files; expected one, or {SINGLE}, or {INDEX}"
                )
        self.files = {*names, *([] if weight_map is None else [INDEX])}
        self._tensors: dict[str, Any] = {}
        named = "" if weight_map is None else f", but {INDEX} names it"
        shards = {name: _open(directory / name, files, named) for name in names}
        for name, shard in shards.items():
            for tensor in shard.keys():
                place = (weight_map or {}).get(tensor, name)
                if place != name or tensor in self._tensors:
                    self._check_copy(tensor, shard, name, place, shards[place])
                else:
                    self._tensors[tensor] = shard
        for tensor in weight_map or ():
            if tensor not in self._tensors and not _is_table(tensor):
                raise UserError(f"{directory / weight_map[tensor]}: tensor {tensor} is missing, but {INDEX} names it")

    def _check_copy(self, tensor: str, shard: Any, name: str, place: str, counts: Any) -> None:
        """Raises UserError unless a second copy of a tensor equals the one that counts, in the file `place`."""
        if _is_table(tensor):
            return
        if tensor not in counts.keys():
            raise UserError(f"{self.directory / INDEX}: {tensor} should be in {place}, but it is in {name}")
        if not _equal(shard.get_slice(tensor), counts.get_slice(tensor)):
            raise UserError(f"{self.directory}: tensor {tensor} is in more than one file, with different values")

    def check_tied(self, head: str, embedding: str) -> None:
        """Raises UserError unless the head that a model with tied embeddings also carries equals its embedding."""
        if not _equal(self[head], self[embedding]):
            raise UserError(
                f"{self.directory}: tensor {head} is not part of a model with tied embeddings "
                f"(weight_tying or tie_word_embeddings in {CONFIG}), unless it equals the embedding: it does not"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Any:
        """Returns a tensor that is read only when it is sliced."""
        return self._tensors[name].get_slice(name)

    def dtypes(self, names: Iterable[str]) -> dict[str, str]:
        """Returns the name that numpy gives to the dtype of each of these tensors, by the name of the tensor."""
        return {name: DTYPES[self[name].get_dtype()] for name in names}

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Collection[str] = ()) -> None:
        """Raises UserError unless the folder holds exactly these tensors, with these shapes and float dtypes.

        Tables that are computed from config.json, and the `ignored` tensors, may be there as well.
        """
        for name, shape in expected.items():
            if name not in self:
                raise UserError(f"{self.directory}: tensor {name} is missing")
            found, dtype = tuple(self[name].get_shape()), self[name].get_dtype()
            if found != shape:
                raise UserError(f"{self.directory}: tensor {name} has shape {found}, expected {shape}")
            if dtype not in DTYPES:
                raise UserError(f"{self.directory}: tensor {name} has dtype {dtype}; supported are {', '.join(DTYPES)}")
        for name in self._tensors:
            if name not in expected and name not in ignored and not _is_table(name):
                raise UserError(f"{self.directory}: tensor {name} is not part of the model that {CONFIG} describes")


def _is_table(name: str) -> bool:
    # Older exports also hold tables of RoPE and of positions, which are not parameters.
    return name.endswith(_TABLES)


def _equal(one: Any, other: Any) -> bool:
    """Returns whether two tensors that have not been read yet have the same shape and values."""
    shape = tuple(one.get_shape())
    if not shape or shape != tuple(other.get_shape()) or not {one.get_dtype(), other.get_dtype()} <= DTYPES.keys():
        return False
    rows = max(1, _CHUNK_BYTES // max(1, 4 * math.prod(shape[1:])))
    parts = (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
    same = ((one[part].astype(np.float32), other[part].astype(np.float32)) for part in parts)
    return all(np.array_equal(*pair, equal_nan=True) for pair in same)  # NaN is told of where the model is used


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the name of the file of each tensor. Raises UserError if the index does not give it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"{index}: {tensor} is in {json.dumps(name)[:100]}, which is not the name of a file there")
    return weight_map


def _open(path: Path, files: contextlib.ExitStack, named: str) -> Any:
    if not path.exists():
        raise UserError(f"{path} is missing{named}")
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        with path.open("rb"):  # safe_open reports every reason why a file cannot be opened as a missing file
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    try:
        return files.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        if failed := machine_error(error, path):
            raise UserError(f"{path} cannot be read: {reason(failed)}") from error
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error


def write(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    shard_bytes: int,
    read: Callable[[str], np.ndarray],
    here: bool = True,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
) -> None:
    """Writes tensors to one file, or to several files with an index if they have more than `shard_bytes` bytes.

    Args:
      directory: An existing folder.
      shapes: The shape of each tensor by its name, in the order in which the tensors fill the files.
      dtypes: The dtype of each tensor by its name: float32, bfloat16 or float16.
      shard_bytes: The largest number of bytes of tensors per file. A single tensor that is larger gets its own file.
      read: Returns the tensor with the given name, and is called once for each tensor. The tensor may be a view with
        any strides, because its rows are made contiguous in parts.
      here: Whether this process writes. A process that does not write calls `read` all the same, because `read` may be
        a collective operation.
      progress: Wraps the iteration over the names of the tensors, for example to show a progress bar.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    # Put larger dtypes first in a file, so that each tensor starts at a multiple of the size of its elements.
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
                wanted = f"{shapes[name]} and {dtypes[name]}"
                raise ValueError(f"{name} has shape and dtype {tensor.shape} and {tensor.dtype}, expected {wanted}")
            if here:
                _write_rows(out, tensor)
    if here and len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(place.items()))}
        with _finished(directory / INDEX) as out:
            out.write((json.dumps(index, indent=2) + "\n").encode())


def _fill(sizes: Mapping[str, int], shard_bytes: int, order: Callable[[str], Any]) -> dict[str, list[str]]:
    """Returns the names of the tensors in each file, in the order in which they are written there."""
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
    """Returns the start of a file: the length of a JSON object, and the object, which says where each tensor lies."""
    codes = {name: code for code, name in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned when the file is memory-mapped
    return len(text).to_bytes(8, "little") + text


def _write_rows(file: Any, tensor: np.ndarray) -> None:
    row_bytes = tensor[:1].nbytes
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, len(tensor), step):
        file.write(np.ascontiguousarray(tensor[start : start + step]).view(np.uint8))


@contextlib.contextmanager
def _finished(path: Path):
    """Opens a new file, which is on the disk when the context ends."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
