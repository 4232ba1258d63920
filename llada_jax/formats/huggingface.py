"""Reads and writes published folders: config.json and safetensors files, from and to sharded arrays.

Tensors are processed one at a time. The tensor of a layer is read from the memory-mapped file, transferred to its
devices, and written in place into the stacked parameter there, before the next tensor is read. Writing goes the same
way in the opposite direction. The host never holds more than one tensor.
"""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from llada_jax.cli.outputs import check_folder, whole_folder
from llada_jax.config import ComputeConfig, ModelConfig, UserError
from llada_jax.devices import distributed, mesh
from llada_jax.formats import published, tensor_files, tensor_names
from llada_jax.formats.companions import companion_files, put_files
from llada_jax.formats.families import OWN
from llada_jax.formats.generation_config import with_ends
from llada_jax.formats.published import CONFIG, as_json, model_config, read_json
from llada_jax.formats.tensor_files import Folder
from llada_jax.formats.tensor_names import PublishedTensor, published_tensors
from llada_jax.model.int8 import is_int8
from llada_jax.model.transformer import Transformer, abstract_model, merge, split

SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Published:
    """Describes what a published folder holds, as far as this is known without reading a tensor."""

    config: ModelConfig
    fields: dict[str, Any]  # the fields of config.json
    naming: str  # the naming of the tensors: llada or llama
    dtype: str  # the dtype that holds all tensors exactly: float32 or bfloat16
    dtypes: dict[str, str]  # the dtype of each tensor, by its name: float32, bfloat16 or float16
    notes: list[str]  # lines that say what in the folder is not used


@contextlib.contextmanager
def opened(directory: str | os.PathLike) -> Iterator[tuple[Published, Folder]]:
    """Opens a published folder and checks that it holds exactly the expected tensors, with the right shapes.

    Yields:
      The description of the folder, and its safetensors files, which are closed when the context ends.

    Raises:
      UserError: If a tensor is missing, is not expected or has a wrong shape, if a file is damaged, or if a field of
        config.json is not supported.
    """
    directory = Path(directory)
    fields = read_json(directory / CONFIG)
    config, notes = with_ends(model_config(fields, str(directory / CONFIG)), directory)
    with contextlib.ExitStack() as files:
        folder = Folder(directory, files)
        naming = "llama" if tensor_names.LLAMA["embedding"] in folder else "llada"
        names, expected = tensor_names.NAMINGS[naming], tensor_names.expected_tensors(config, naming)
        folder.check(expected, [names["head"]] if config.tied_embeddings else [])
        if config.tied_embeddings and names["head"] in folder:
            folder.check_tied(names["head"], names["embedding"])
            notes.append(f"{directory}: {names['head']} equals the embedding that it is tied to: it is not read")
        dtypes = folder.dtypes(expected)
        dtype = "bfloat16" if set(dtypes.values()) == {"bfloat16"} else "float32"
        others = [name for name in companion_files(directory)[1] if name not in folder.files]
        if others:
            main = tensor_files.INDEX if tensor_files.INDEX in folder.files else next(iter(folder.files))
            notes = [f"{directory}: the model is {main}; weights that are not read: {', '.join(others)}", *notes]
        yield Published(config, fields, naming, dtype, dtypes, notes), folder


def inspect(directory: str | os.PathLike) -> Published:
    """Returns what a published folder holds, without allocating anything. Raises UserError as `opened` does."""
    with opened(directory) as (found, _):
        return found


def read_part(tensor: Any, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Returns a part of one layer's parameter, read from its published tensor.

    Args:
      tensor: Anything that can be sliced like the published array. Only the needed part of it is read.
      name: The parameter's name in mesh.PARAMETERS.
      shape: The shape of our parameter, without the layer dimension L.
      index: The part of our parameter to return: one slice for each dimension of `shape`.
    """
    index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
    part_shape = tuple(part.stop - part.start for part in index)
    if name == "embedding" or len(shape) == 1:
        return tensor[index]
    if name in tensor_names.BIASES:
        _check_whole(index[1], shape[1])
        return tensor[index[0].start * shape[1] : index[0].stop * shape[1]].reshape(part_shape)
    # The published matrix has the shape (outputs, inputs), and heads and head width are one dimension of it. Our
    # parameter has the inputs first, and two dimensions for heads and head width.
    if name in ("q_proj", "k_proj", "v_proj"):
        _check_whole(index[2], shape[2])
        outputs, inputs = slice(index[1].start * shape[2], index[1].stop * shape[2]), index[0]
    elif name == "attn_out":
        _check_whole(index[1], shape[1])
        outputs, inputs = index[2], slice(index[0].start * shape[1], index[0].stop * shape[1])
    else:
        outputs, inputs = index[1], index[0]
    return tensor[outputs, inputs].T.reshape(part_shape)


def _check_whole(part: slice, size: int) -> None:
    assert (part.start, part.stop) == (0, size), "heads may be split over devices, but the width of a head may not"


def as_published(name: str, layer: np.ndarray) -> np.ndarray:
    """Returns a whole parameter of one layer as a view with the published shape: the inverse of `read_part`."""
    if name == "embedding" or layer.ndim == 1:
        return layer
    if name in ("q_proj", "k_proj", "v_proj"):
        return layer.reshape(len(layer), -1).T
    if name in tensor_names.BIASES:
        return layer.reshape(-1)
    return layer.reshape(-1, layer.shape[-1]).T


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), i, axis=0)


def _read_parameter(
    folder: Folder, tensors: list[PublishedTensor], target: jax.ShapeDtypeStruct, dtype: jnp.dtype
) -> jax.Array:
    """Reads one parameter of the model onto the devices of its sharding.

    Args:
      folder: The open folder that holds the tensors.
      tensors: The tensors that the parameter is made of: one per layer, or one that does not belong to a layer.
      target: The abstract parameter, which gives the shape.
      dtype: The dtype of the result.
    """
    name, stacked = tensors[0].parameter, tensors[0].layer is not None
    shape = target.shape[1:] if stacked else target.shape
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), mesh.PARAMETERS[name])

    def on_devices(tensor: PublishedTensor) -> jax.Array:
        parts: dict[str, np.ndarray] = {}  # devices that hold the same part share one array

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if repr(index) not in parts:
                parts[repr(index)] = read_part(folder[tensor.name], name, shape, index)
            return parts[repr(index)]

        # Keep the dtype of the file here and cast on the device, so that the host needs no second copy.
        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read))

    if not stacked:
        array = on_devices(tensors[0])
        return array if array.dtype == dtype else mesh.cast(array, dtype)
    stack = jnp.zeros(target.shape, dtype, out_sharding=P(None, *mesh.PARAMETERS[name]))
    for i, tensor in enumerate(tensors):
        # Wait for the update: a dispatched but unfinished computation would keep its layer in memory.
        stack = jax.block_until_ready(_set_layer(stack, on_devices(tensor), np.int32(i)))
    return stack


def load_model(
    directory: str | os.PathLike,
    dtype: jnp.dtype,
    update: Callable[[ModelConfig], ModelConfig] = lambda config: config,
    progress: bool = False,
    change: Callable[[str, jax.Array], jax.Array] | None = None,
) -> Transformer:
    """Loads the model of a published folder, sharded over the mesh in use.

    Args:
      directory: A folder with config.json and *.safetensors. The tensors have LLaDA's or Llama's names.
      dtype: The dtype of the parameters and of the computation.
      update: A function that completes the architecture read from config.json, for example with what only the
        tokenizer knows.
      progress: Whether to show a progress bar on stderr.
      change: A function that is called with each parameter's name and array as soon as it is read, and returns the
        array that takes its place.

    Raises:
      UserError: If a tensor is missing, is not expected or has a wrong shape, if a file is damaged, if a field of
        config.json is not supported, or if the mesh does not divide a dimension. All of this is checked before
        anything is allocated.
    """
    dtype = jnp.dtype(dtype)
    with opened(directory) as (found, folder):
        config = update(found.config)
        mesh.check_model(config, tuple(jax.sharding.get_abstract_mesh().axis_sizes))
        graphdef, targets = split(abstract_model(config, ComputeConfig(dtype=dtype.name)))
        tensors: dict[str, list[PublishedTensor]] = {}
        for tensor in published_tensors(config, found.naming):
            tensors.setdefault(tensor.parameter, []).append(tensor)
        with tqdm.tqdm(total=len(tensors), desc="reading", unit="parameter", disable=not progress) as bar:

            def read(name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
                array = _read_parameter(folder, tensors[name], target, dtype)
                bar.update()
                return array if change is None else change(name, array)

            params = {name: read(name, target) for name, target in targets.items() if name != "blocks"}
            params["blocks"] = {name: read(name, target) for name, target in targets["blocks"].items()}
    return merge(graphdef, params)


@functools.partial(jax.jit, static_argnums=2)
def _get_layer(stack: jax.Array, i: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, i, axis=0, keepdims=False).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _copy(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.copy(x).astype(dtype)


def save_model(
    model: Transformer,
    directory: str | os.PathLike,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    dtypes: Mapping[str, str] | None = None,
    naming: str = "llada",
    original: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes a published folder: config.json, the safetensors files (with an index if there are several), and others.

    The folder appears under its name only when all of it is on the disk. One tensor at a time is fetched from its
    devices. If there are several processes, all of them must call this function, and process 0 writes.

    Args:
      model: The model, on any mesh.
      directory: The folder to write. It must not exist yet, or it must be empty.
      dtype: The dtype of the tensors, float32 or bfloat16. None means the dtype of the parameters, so that no bit of
        them changes.
      dtypes: The dtypes of the tensors that are written in another dtype than `dtype`, by their names in `naming`.
        float16 is allowed here, too.
      naming: The naming of the tensors, "llada" or "llama".
      original: The fields of the config.json that the model came with. All of them are kept, unless they are for the
        other naming; in that case the fields that depend on the naming are replaced. None means the fields of
        `published.published_config`.
      files: The other files of the folder, such as the tokenizer and code: for each name, the content of the file or
        a file to copy.
      shard_bytes: The largest number of bytes of tensors per file. A single tensor that is larger gets its own file.
      progress: Whether to show a progress bar on stderr.

    Raises:
      UserError: If the folder exists and is not empty, if it cannot be written, if a setting has an invalid value, or
        if `original` belongs to another model.
    """
    if is_int8(model):
        raise UserError("the matrices of this model are int8: load it without weights=int8 to write it")
    dtype = jnp.dtype(model.embedding[...].dtype if dtype is None else dtype)
    if dtype.name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype.name}: choose float32 or bfloat16")
    if naming not in tensor_names.NAMINGS:
        raise UserError(f"naming={naming!r}: choose {' or '.join(tensor_names.NAMINGS)}")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: it must be at least 1")
    tensors = {tensor.name: tensor for tensor in published_tensors(model.config, naming)}
    written = {name: np.dtype(jnp.dtype((dtypes or {}).get(name, dtype))) for name in tensors}
    kinds = {each.name for each in written.values()}
    fields = _fields(model.config, original, naming, kinds.pop() if len(kinds) == 1 else "float32")
    first = distributed.index() == 0
    # Decide this for all processes before any tensor is fetched: if only process 0 stopped here, the others would wait
    # for it forever.
    if problem := distributed.first_problem("output", _problem(directory) if first else None):
        raise UserError(problem)
    params = split(model)[1]

    def read(name: str) -> np.ndarray:
        tensor, dtype = tensors[name], written[name]
        if tensor.layer is None:
            # Fetch a copy: JAX keeps the fetched value in host memory for as long as the array exists.
            array = _copy(params[tensor.parameter], dtype)
        else:
            array = _get_layer(params["blocks"][tensor.parameter], np.int32(tensor.layer), dtype)
        if not array.is_fully_addressable:
            return as_published(tensor.parameter, multihost_utils.process_allgather(array, tiled=True))
        return as_published(tensor.parameter, np.asarray(array))

    def watched(names: Iterable[str]) -> Iterable[str]:
        return tqdm.tqdm(names, desc="writing", unit="tensor", disable=not progress, file=sys.stderr)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with mesh.mesh_of(model.embedding[...]), whole_folder(directory) if first else contextlib.nullcontext() as folder:
        if first:
            put_files(folder, {**(files or {}), CONFIG: as_json(fields)})
        tensor_files.write(folder, shapes, written, shard_bytes, read, first, watched)
    distributed.barrier("model written")


def _problem(directory: str | os.PathLike) -> str | None:
    """Returns why this folder cannot be written, or None if no problem can be seen yet."""
    try:
        check_folder(directory)
    except UserError as error:
        return str(error)
    return None


def _fields(model: ModelConfig, original: Mapping[str, Any] | None, naming: str, dtype: str) -> dict[str, Any]:
    """Returns the fields of the config.json to write."""
    if original is None:
        return published.published_config(model, naming, dtype)
    found = model_config(original)
    for field in (*published.REQUIRED, "kv_heads", "tied_embeddings", *OWN):
        ours, theirs = getattr(model, field), getattr(found, field)
        if ours != theirs:
            raise UserError(f"the model has {field}={ours}, but the original {CONFIG} says {theirs}")
    if original.keys() & published.own_names(naming):
        return dict(original)
    # `original` was written for the other naming. Drop the names that only the other naming uses, and the fields that
    # say which code reads the tensors, because they would be wrong in the new folder.
    (other,) = tensor_names.NAMINGS.keys() - {naming}
    misleading = published.own_names(other) | {"architectures", "auto_map", "model_type", "vocab_size", "token_count"}
    kept = {name: value for name, value in original.items() if name not in misleading and value is not None}
    nulls = {name: None for name, value in original.items() if name not in misleading and value is None}
    fresh = published.published_config(model, naming, dtype, published.sequence_length(original) or 4096)
    return nulls | fresh | kept
