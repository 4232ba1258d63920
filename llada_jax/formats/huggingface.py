"""Published LLaDA folders in and out: config.json and safetensors, from and into sharded arrays, tensor by tensor.

A layer's tensor goes from the (memory-mapped) file to its devices and into the stacked parameter there, in
place, before the next one is read; and back the same way. The host never holds more than one of them.
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
from llada_jax.formats import published, tensor_files
from llada_jax.formats.companions import put_files
from llada_jax.formats.published import CONFIG, PublishedTensor, as_json, model_config, published_tensors, read_json
from llada_jax.formats.tensor_files import Folder
from llada_jax.model.transformer import Transformer, abstract_model, merge, split

GENERATION_CONFIG = "generation_config.json"
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Published:
    """What a published folder holds, known without reading a tensor."""

    config: ModelConfig
    fields: dict[str, Any]  # of config.json
    naming: str  # of the tensors: llada or llama
    dtype: str  # float32 or bfloat16: what holds all tensors exactly
    dtypes: dict[str, str]  # of each tensor, by its name: float32, bfloat16 or float16


@contextlib.contextmanager
def opened(directory: str | os.PathLike) -> Iterator[tuple[Published, Folder]]:
    """A published folder whose every tensor is there, with the right shape.

    Raises:
      UserError: a missing, extra or misshapen tensor, a damaged file, a field that is not supported.
    """
    directory = Path(directory)
    fields = read_json(directory / CONFIG)
    config = model_config(fields, str(directory / CONFIG))
    with contextlib.ExitStack() as files:
        folder = Folder(directory, files)
        naming = "llama" if published.LLAMA["embedding"] in folder else "llada"
        folder.check(published.expected_tensors(config, naming))
        dtypes = folder.dtypes()
        dtype = "bfloat16" if set(dtypes.values()) == {"bfloat16"} else "float32"
        yield Published(config, fields, naming, dtype, dtypes), folder


def inspect(directory: str | os.PathLike) -> Published:
    """What a published folder holds. UserError as `opened`; nothing is allocated."""
    with opened(directory) as (found, _):
        return found


def read_part(tensor: Any, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of one layer's parameter of this shape, out of its published tensor.

    Args:
      tensor: anything that can be cut like the published array; only what is needed is read.
      name: the parameter's name in mesh.PARAMETERS.
      shape: our shape, without L.
      index: one slice for each of its dimensions.
    """
    index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
    part_shape = tuple(part.stop - part.start for part in index)
    if name == "embedding" or len(shape) == 1:
        return tensor[index]
    # (outputs, inputs) is published, inputs first is ours; heads and their width are one dimension there.
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
    assert (part.start, part.stop) == (0, size), "heads are split over devices, their width is not"


def as_published(name: str, layer: np.ndarray) -> np.ndarray:
    """The inverse of `read_part` for a whole parameter of one layer: a view with the published shape."""
    if name == "embedding" or layer.ndim == 1:
        return layer
    if name in ("q_proj", "k_proj", "v_proj"):
        return layer.reshape(len(layer), -1).T
    return layer.reshape(-1, layer.shape[-1]).T


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), i, axis=0)


def _read_parameter(
    folder: Folder, tensors: list[PublishedTensor], target: jax.ShapeDtypeStruct, dtype: jnp.dtype
) -> jax.Array:
    """One parameter of the model, on the devices of its sharding.

    Args:
      folder: where its tensors are.
      tensors: those it is made of, one per layer, or just one.
      target: its shape.
      dtype: its dtype.
    """
    name, stacked = tensors[0].parameter, tensors[0].layer is not None
    shape = target.shape[1:] if stacked else target.shape
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), mesh.PARAMETERS[name])

    def on_devices(tensor: PublishedTensor) -> jax.Array:
        parts: dict[str, np.ndarray] = {}  # replicas share one

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if repr(index) not in parts:
                parts[repr(index)] = read_part(folder[tensor.name], name, shape, index)
            return parts[repr(index)]

        # In the dtype of the file: the cast is the device's, so that the host has no second copy.
        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read))

    if not stacked:
        array = on_devices(tensors[0])
        return array if array.dtype == dtype else mesh.cast(array, dtype)
    stack = jnp.zeros(target.shape, dtype, out_sharding=P(None, *mesh.PARAMETERS[name]))
    for i, tensor in enumerate(tensors):
        # Waited for: what is only dispatched keeps its layer.
        stack = jax.block_until_ready(_set_layer(stack, on_devices(tensor), np.int32(i)))
    return stack


def load_model(
    directory: str | os.PathLike,
    dtype: jnp.dtype,
    update: Callable[[ModelConfig], ModelConfig] = lambda config: config,
    progress: bool = False,
) -> Transformer:
    """The model in a published folder, sharded over the mesh in use.

    Args:
      directory: holds config.json and *.safetensors, in LLaDA's or Llama's naming.
      dtype: of the parameters and of the computation.
      update: completes the config, e.g. with what only the tokenizer knows.
      progress: whether to report on stderr.

    Raises:
      UserError: a missing, extra or misshapen tensor, a damaged file, a field that is not supported,
        a dimension that the mesh does not divide; before anything is allocated.
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
                return array

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
    """Writes a published folder: config.json, safetensors (with an index if they take several), other files.

    The folder appears when all of it is on the disk. One tensor at a time is fetched from its devices; of several
    processes, which all must call this, the first writes.

    Args:
      model: on any mesh.
      directory: new, or an empty folder.
      dtype: of the tensors, float32 or bfloat16. None = that of the parameters: no bit of them changes.
      dtypes: of tensors that are to have another one, by their names in `naming`; float16 too.
      naming: of the tensors, "llada" or "llama".
      original: the fields of the config.json that the model came with; all are kept, unless they are for the other
        naming: then its names are replaced. None = those of `published.published_config`.
      files: what else the folder is to hold, name -> content or a file to copy: the tokenizer, code.
      shard_bytes: of tensors per file at most, unless one alone has more.
      progress: whether to report on stderr.

    Raises:
      UserError: the folder exists or cannot be written, a setting that is none, an `original` of another model.
    """
    dtype = jnp.dtype(model.embedding[...].dtype if dtype is None else dtype)
    if dtype.name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype.name}: choose float32 or bfloat16")
    if naming not in published.NAMINGS:
        raise UserError(f"naming={naming!r}: choose {' or '.join(published.NAMINGS)}")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: at least one byte is needed")
    tensors = {tensor.name: tensor for tensor in published_tensors(model.config, naming)}
    written = {name: np.dtype(jnp.dtype((dtypes or {}).get(name, dtype))) for name in tensors}
    kinds = {each.name for each in written.values()}
    fields = _fields(model.config, original, naming, kinds.pop() if len(kinds) == 1 else "float32")
    first = distributed.index() == 0
    # Before any tensor is fetched, for all: the others would wait for one that has left.
    if problem := distributed.first_problem("output", _problem(directory) if first else None):
        raise UserError(problem)
    params = split(model)[1]

    def read(name: str) -> np.ndarray:
        tensor, dtype = tensors[name], written[name]
        if tensor.layer is None:
            # A copy: jax keeps what was fetched of an array as long as that lives.
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
    """Why this folder cannot be written, as far as can be seen now."""
    try:
        check_folder(directory)
    except UserError as error:
        return str(error)
    return None


def _fields(model: ModelConfig, original: Mapping[str, Any] | None, naming: str, dtype: str) -> dict[str, Any]:
    """The fields of the config.json to write."""
    if original is None:
        return published.published_config(model, naming, dtype)
    found = model_config(original)
    for field in (*published.REQUIRED, "kv_heads", "tied_embeddings"):
        ours, theirs = getattr(model, field), getattr(found, field)
        if ours != theirs:
            raise UserError(f"the model has {field} {ours}, the original {CONFIG} says {theirs}")
    if original.keys() & published.own_names(naming):
        return dict(original)
    # Written for the other naming: its own names, and what says which code reads the tensors, would mislead.
    (other,) = published.NAMINGS.keys() - {naming}
    misleading = published.own_names(other) | {"architectures", "auto_map", "model_type", "vocab_size", "token_count"}
    kept = {name: value for name, value in original.items() if name not in misleading and value is not None}
    nulls = {name: None for name, value in original.items() if name not in misleading and value is None}
    fresh = published.published_config(model, naming, dtype, published.sequence_length(original) or 4096)
    return nulls | fresh | kept
