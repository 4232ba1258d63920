"""Reads and writes the weights in a workdir.

These are the weights in the checkpoints of a run, the frozen weights that adapters are added to, and the weights in
checkpoints that hold nothing else.

A run with low-rank adapters has only the adapters in its checkpoints. The frozen weights never change and are
written once, into the folder frozen/ of its workdir. Readers get the merged model.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from llada_jax.config import Config, LoraConfig, UserError
from llada_jax.devices import distributed
from llada_jax.devices.mesh import cast
from llada_jax.formats import arrays, orbax_s3, published, workdir
from llada_jax.formats.orbax_errors import quiet
from llada_jax.model import lora
from llada_jax.model.transformer import Transformer, abstract_model, merge, split
from llada_jax.storage import objects
from llada_jax.storage.objects import Place


def weights_record(folder: str | os.PathLike, step: int) -> dict | None:
    """Returns the record of a checkpoint that holds only weights.

    Returns None for the checkpoint of a run, and for a checkpoint whose record cannot be read.
    """
    with contextlib.suppress(OSError, ValueError):
        record = arrays.read_record(workdir.checkpoint_path(folder, step))
        if record.get("weights_only"):
            return record
    return None


def save_weights(folder: str | os.PathLike, step: int, params: dict, record: dict) -> None:
    """Writes a checkpoint that holds only parameters, in their own dtype. It is on the disk when this returns.

    `load_params` reads it. A run cannot be resumed from it, but can start from its weights.

    Args:
      folder: A workdir.
      step: The step that names the checkpoint.
      params: Nested dicts of arrays of one dtype.
      record: A JSON object that `weights_record` returns later.

    Raises:
      SaveFailed: If the checkpoint cannot be written, or if a parameter is not finite.
    """
    quiet()
    directory = objects.absolute(folder) / workdir.CHECKPOINTS
    orbax_s3.prepare(directory)
    dtype = jax.tree.leaves(params)[0].dtype.name
    manager = ocp.CheckpointManager(directory)
    with arrays.save_errors(directory):
        args = arrays.save_args(step, {"params": params}, {**record, "weights_only": True, "dtype": dtype})
        manager.save(step, args=args)
        # Only on success: after a signal or a failure nothing waits for the files that are still being written.
        manager.close()


def load_params(
    folder: str | os.PathLike,
    step: int | None,
    config: Config,
    mesh: Mesh,
    dtype: Any = None,
    change: Callable[[str, jax.Array], jax.Array] | None = None,
) -> dict:
    """Reads the parameters of the model in a workdir.

    The parameters of a run with low-rank adapters are those of the merged model (`lora.merge`), whatever
    config.model.lora says. If `dtype` is not the dtype that was saved, or if there is a `change`, the parameters are
    read one at a time, so that only the largest of them needs memory beside the result.

    Args:
      folder: The workdir.
      step: The step of the checkpoint. None means the newest.
      config: The configuration that the shapes come from.
      mesh: The mesh that the parameters are placed on.
      dtype: The dtype of the result. None means float32.
      change: A function that is called with each parameter's name and array in that dtype, and returns the array that
        takes its place. With adapters it is called after they are merged.

    Returns:
      Nested dicts of arrays.

    Raises:
      UserError: If there is no such checkpoint, or if it is damaged or does not fit `config`.
    """
    quiet()
    step = workdir.choose_step(folder, step)
    key, wanted = jax.random.key(0), jnp.dtype(jnp.float32 if dtype is None else dtype)
    if (adapted := _adapters(folder)).rank:
        model = dataclasses.replace(config.model, lora=adapted)
        target = arrays.abstract(lambda: lora.initialise(model, config.compute, key), mesh)
        frozen = load_frozen(folder, config, mesh, wanted)
        with jax.set_mesh(mesh):
            params = lora.merge(lora.combine(arrays.load(folder, step, {"params": target})["params"], frozen), model)
            if change is not None:
                for name in list(params["blocks"]):
                    params["blocks"][name] = change(name, params["blocks"].pop(name))
            return params
    target = arrays.abstract(lambda: split(Transformer(lora.plain(config.model), config.compute, key))[1], mesh)
    saved = jnp.dtype((weights_record(folder, step) or {}).get("dtype", "float32"))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, saved, sharding=x.sharding), target)
    with jax.set_mesh(mesh):
        if saved == wanted and change is None:
            return arrays.load(folder, step, {"params": target})["params"]

        def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            # The fingerprint is that of the saved dtype, so the array is read in that dtype and cast afterwards.
            part: Any = leaf
            for key in reversed(path):
                part = {key.key: part}
            (array,) = jax.tree.leaves(arrays.load(folder, step, {"params": part}))
            array = jax.block_until_ready(array if saved == wanted else cast(array, wanted))
            return array if change is None else change(path[-1].key, array)

        return jax.tree_util.tree_map_with_path(read, target)


def load_model(
    folder: str | os.PathLike,
    step: int | None,
    mesh: Mesh,
    dtype: Any = None,
    change: Callable[[str, jax.Array], jax.Array] | None = None,
) -> Transformer:
    """Reads the model in a workdir. A run with low-rank adapters gives the merged model, which has none.

    Args:
      folder: The workdir.
      step: The step of the checkpoint. None means the newest.
      mesh: The mesh that the parameters are placed on.
      dtype: The dtype of the parameters and of the computation. None means float32 parameters, and the computation as
        the run had it.
      change: As for `load_params`.

    Raises:
      UserError: As `load_params`, or if the workdir has no config.json.
    """
    config, _ = workdir.read_config(folder)
    config.model = lora.plain(config.model)
    if dtype is not None:
        config.compute.dtype = jnp.dtype(dtype).name
    params = load_params(folder, step, config, mesh, dtype, change)
    with jax.set_mesh(mesh):
        graphdef, _ = split(abstract_model(config.model, config.compute))
    return merge(graphdef, params)


def _adapters(folder: str | os.PathLike) -> LoraConfig:
    """Returns the adapters that the checkpoints of a workdir hold: none if there is no config.json."""
    if not objects.exists(objects.place(folder) / published.CONFIG):
        return LoraConfig()
    return workdir.read_config(folder)[0].model.lora


def save_frozen(folder: str | os.PathLike, frozen: dict) -> None:
    """Writes the weights that a run adds adapters to into its workdir, in their own dtype.

    Call this before the first checkpoint of the run. Until then nothing depends on what an earlier start left in the
    workdir, so it is replaced.

    Args:
      folder: The workdir.
      frozen: Nested dicts of arrays, as `lora.partition` returns them. Nothing is written if it is empty.

    Raises:
      SaveFailed: As `save_weights`.
      UserError: If frozen/ holds something that this function did not write.
    """
    if frozen:
        target = objects.place(folder) / workdir.FROZEN
        distributed.first_decides("frozen weights", lambda: _make_room(target))
        save_weights(target, 0, frozen, {})


def _make_room(target: Place) -> None:
    if objects.is_bucket(target):
        objects.delete_all(target)
        return
    if target.exists() and [path.name for path in target.iterdir()] not in ([], [workdir.CHECKPOINTS]):
        raise UserError(
            f"{target} is where the weights go that adapters are added to, but it holds something else: remove it"
        )
    shutil.rmtree(target, ignore_errors=True)


def load_frozen(folder: str | os.PathLike, config: Config, mesh: Mesh, dtype: Any) -> dict:
    """Reads what `save_frozen` wrote, in `dtype`, on `mesh`. Raises UserError if it is missing or damaged."""
    target = objects.place(folder) / workdir.FROZEN
    if not workdir.steps_in(target):
        raise UserError(f"{target} is missing: the checkpoints of {folder} hold adapters alone; copy the whole workdir")
    return load_params(target, None, config, mesh, dtype)
