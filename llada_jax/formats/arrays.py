"""Checkpoints on disk (Orbax): arrays are written with a fingerprint each, read on any mesh, and checked.

    checkpoints/STEP/state/           the arrays, in Orbax's format
    checkpoints/STEP/run/metadata     the record: a JSON object with the fingerprint of every array, and more

`training/checkpoint.py` writes the checkpoints of a run, and `weights.py` writes checkpoints that hold only weights.
Both modules, and everything that reads checkpoints, use the functions here.
"""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.cli.machine_errors import machine_error
from llada_jax.config import UserError
from llada_jax.devices import distributed
from llada_jax.formats import orbax_s3
from llada_jax.formats.fingerprint import fingerprint
from llada_jax.formats.orbax_errors import one_line
from llada_jax.formats.workdir import checkpoint_path
from llada_jax.storage import objects, retries
from llada_jax.storage.objects import Place


class Damaged(Exception):
    """Raised if a checkpoint cannot be read or does not hold what was saved."""


class SaveFailed(Exception):
    """Raised if a checkpoint could not be written or must not be written."""


def abstract(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Returns the shapes, dtypes and shardings of what `make` would return on `mesh`, without computing it."""
    with jax.set_mesh(mesh):
        tree = jax.eval_shape(make)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, _spec(x))), tree)


def _spec(x: jax.ShapeDtypeStruct) -> P:
    return P() if x.sharding is None else x.sharding.spec  # a scalar has no sharding


def save_args(step: int, tree: dict, record: dict) -> ocp.args.Composite:
    """Returns what Orbax needs to save a checkpoint: the arrays, and the record with their fingerprints added.

    Args:
      step: The step that the arrays belong to, for the error message.
      tree: Nested dicts of arrays.
      record: A JSON object. It is copied, because Orbax writes it in the background.

    Raises:
      SaveFailed: If an array holds a value that is not finite.
    """
    fingerprints, broken = fingerprint(tree)
    if broken:
        raise SaveFailed(f"the state of step {step} is not saved: {broken[0]} is not finite")
    record = copy.deepcopy({**record, "fingerprint": fingerprints})
    return ocp.args.Composite(state=ocp.args.StandardSave(tree), run=ocp.args.JsonSave(record))


@contextlib.contextmanager
def save_errors(directory: Place, remedy: str = "") -> Iterator[None]:
    """Turns any exception of the block, which writes checkpoints to `directory`, into SaveFailed.

    Args:
      directory: The folder of the checkpoints.
      remedy: What the message says at its end about what to do.
    """
    try:
        yield
    except SaveFailed:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, often from a background thread
        raise SaveFailed(f"a checkpoint could not be written to {directory}: {one_line(error)}{remedy}") from error


def read_record(path: Place) -> dict:
    """Returns the record of the checkpoint in the folder `path`."""
    return json.loads(objects.read(path / "run" / "metadata"))


def read(path: Place, target: dict, partial: bool = True) -> tuple[dict, dict]:
    """Reads arrays of a checkpoint and checks them against their fingerprints.

    Each process reads the part that its devices need. All processes must call this with the same arguments.

    Args:
      path: The folder of the checkpoint.
      target: Nested dicts of jax.ShapeDtypeStruct with shardings on the mesh in use, as `abstract` returns them.
      partial: Whether the checkpoint may hold more arrays than `target` names.

    Returns:
      The arrays, nested as in `target`, and the record.

    Raises:
      Damaged: In all processes, if one of them cannot read its part or if an array is not what was saved.
      OSError: If the machine does not let this process read its part, for example because of too many open files.
    """
    orbax_s3.prepare(path)
    tree, record, problem = None, {}, None
    try:
        tree, record = _read_arrays(path, target, partial), read_record(path)
        expected = record["fingerprint"]
    except (MemoryError, jax.errors.JaxRuntimeError, UserError):
        raise  # most likely there is not enough memory or no access, which is not a fault of the files
    except Exception as error:  # Orbax and TensorStore raise many kinds
        if objects.is_bucket(path) and retries.storage_to_blame(error):
            raise retries.StorageFailed(str(path), one_line(error)) from error
        if failed := machine_error(error, path):
            raise failed from error  # a run must not put such a checkpoint aside
        problem = one_line(error)
    # A checkpoint that is damaged for one process must count as damaged for all, or the processes would take different
    # actions.
    problem = distributed.first_problem("checkpoint read", problem)
    if problem is not None:
        raise Damaged(problem)
    _verify(tree, expected)
    return tree, record


def _read_arrays(path: Place, target: dict, partial: bool) -> dict:
    # Orbax's managers wait until all processes have read, so they would wait forever if one process failed. Its handler
    # does not wait.
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=partial)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.restore(epath.Path(path) / "state", args=args)


def _verify(tree: Any, expected: dict[str, int]) -> None:
    for name, value in fingerprint(tree)[0].items():
        if value != expected.get(name):
            raise Damaged(f"the content of {name} is not what was saved")


def load(workdir: str | os.PathLike, step: int, target: dict) -> dict:
    """Reads arrays of one checkpoint of a workdir. See `read` for `target`.

    Raises:
      UserError: If the checkpoint is damaged or does not hold these arrays.
    """
    try:
        return read(checkpoint_path(workdir, step), target)[0]
    except Damaged as error:
        raise UserError(f"checkpoint {step} of {workdir} cannot be restored: {error}") from None
