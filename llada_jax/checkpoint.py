"""Checkpoints of a run (Orbax): asynchronous saves, retention, restore on any mesh, damage found and named.

A workdir holds config.json, tokenizer/ and checkpoints/STEP/. A checkpoint holds the TrainState and a small
"run" record: the fingerprint of every array, by which a damaged one is recognised, and the metrics window.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from llada_jax import config as configs
from llada_jax.config import CheckpointConfig, Config, UserError
from llada_jax.model import Transformer, abstract_model, merge, split
from llada_jax.train_step import TrainState, make_state

FOLDER = "checkpoints"


class Damaged(Exception):
    """A checkpoint that was read without error but does not hold what was saved."""


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """uint32, one number per leaf: the sum of its bits modulo 2**32, the same on any mesh."""

    def one(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in jax.tree.leaves(tree)])


def _as_dict(state: TrainState) -> dict:
    # Plain names in the files, so that they do not depend on a class of ours.
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _target(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of what `make` would return on `mesh`, without making it."""
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(make)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, _spec(x))), abstract
    )


def _spec(x: jax.ShapeDtypeStruct) -> P:
    return P() if x.sharding is None else x.sharding.spec  # a scalar has none


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig):
        self.directory = Path(workdir).absolute() / FOLDER
        self._every = config.every
        policies = [preservation_policy.LatestN(config.keep)]
        if config.permanent_every:
            policies.append(preservation_policy.EveryNSteps(config.permanent_every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),  # the loop decides
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        """Complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, window: dict) -> None:
        """Starts saving; the arrays are copied off the device before this returns, files are written behind it.

        Args:
          state: saved under its step.
          window: JSON-able record of metrics.Window.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        prints = [int(x) for x in np.asarray(fingerprint(_as_dict(state)))]
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)),
                run=ocp.args.JsonSave({"fingerprint": prints, "window": window}),
            ),
        )

    def restore(self, config: Config, mesh: Mesh, report: Callable[[str], None]) -> tuple[TrainState, dict] | None:
        """The newest checkpoint that is whole, on `mesh`; None if there is none at all.

        A damaged one is reported, put aside as damaged-STEP, and the one before it is used.

        Raises:
          UserError: there are checkpoints and none can be read; nothing is moved then.
        """
        target = _as_dict(_target(lambda: make_state(config), mesh))
        problems = {}
        for step in reversed(self.steps()):
            try:
                state, window = self._restore_step(step, target)
            except Exception as error:  # any failure to read is damage: Orbax and TensorStore raise many kinds
                problems[step] = _first_line(error)
                report(f"checkpoint {step} is damaged ({problems[step]})")
                continue
            self._put_aside(list(problems))
            return TrainState(**state), window
        if problems:
            raise UserError(
                f"{self.directory}: none of the checkpoints {sorted(problems)} can be restored; "
                f"the newest fails with: {problems[max(problems)]}"
            )
        return None

    def _restore_step(self, step: int, target: dict) -> tuple[dict, dict]:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), run=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        _check(restored["state"], restored["run"]["fingerprint"])
        if int(restored["state"]["step"]) != step:
            raise Damaged(f"it holds step {int(restored['state']['step'])}")
        return restored["state"], restored["run"]["window"]

    def _put_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self.directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints put aside")
        self._manager.reload()

    def due(self, step: int) -> bool:
        """Whether a rolling or a permanent checkpoint falls on this step."""
        return step % self._every == 0

    def reached_preemption(self, step: int) -> bool:
        """Whether any host of several was told to stop; all hosts agree on the step."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Until all that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees what the manager holds."""
        self._manager.close()


def _check(state: Any, expected: list[int]) -> None:
    found = np.asarray(fingerprint(state))
    if len(found) != len(expected):
        raise Damaged(f"it holds {len(found)} arrays instead of {len(expected)}")
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    for path, value, wanted in zip(paths, found, expected, strict=True):
        if int(value) != wanted:
            raise Damaged(f"the content of {path} is not what was saved")


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 300 else text[:300] + "..."


def read_config(workdir: str | os.PathLike) -> tuple[Config, dict]:
    """The resolved config of a workdir and its identity record (see `write_config`). UserError if there is none."""
    path = Path(workdir) / "config.json"
    try:
        record = json.loads(path.read_text())
        return configs.from_dict(record["config"]), record["identity"]
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a training workdir: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {_first_line(error)}") from None


def write_config(workdir: str | os.PathLike, config: Config, identity: dict) -> None:
    """Writes config.json: the resolved config, and the identity of data and tokenizer (hashes) of the run."""
    path = Path(workdir) / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"config": configs.to_dict(config), "identity": identity}, indent=2) + "\n")
    temporary.replace(path)


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a workdir, ascending. UserError if there are none."""
    folder = Path(workdir) / FOLDER
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet")
    return steps


def choose_step(workdir: str | os.PathLike, step: int | None) -> int:
    """`step`, or the newest if None. UserError if it does not exist."""
    steps = saved_steps(workdir)
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return step


def load_state(workdir: str | os.PathLike, step: int | None, config: Config, mesh: Mesh) -> TrainState:
    """The whole state of a checkpoint of another workdir, to branch from it; config gives its shapes.

    Raises:
      UserError: no such checkpoint, or it cannot be restored into this config.
    """
    step = choose_step(workdir, step)
    target = _as_dict(_target(lambda: make_state(config), mesh))
    return TrainState(**_load(workdir, step, target))


def load_params(workdir: str | os.PathLike, step: int | None, config: Config, mesh: Mesh, dtype: Any = None) -> dict:
    """The parameters alone, as nested dicts in `dtype` (None = fp32), on `mesh`. UserError as `load_state`."""
    step = choose_step(workdir, step)
    target = _target(lambda: split(Transformer(config.model, config.compute, jax.random.key(0)))[1], mesh)
    if dtype is not None:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), target)
    return _load(workdir, step, {"params": target})["params"]


def load_model(workdir: str | os.PathLike, step: int | None, mesh: Mesh, dtype: Any = None) -> Transformer:
    """The model of a workdir at a step (None = the newest), its parameters in `dtype` (None = fp32), on `mesh`."""
    config, _ = read_config(workdir)
    if dtype is not None:
        config.compute.dtype = jnp.dtype(dtype).name
    params = load_params(workdir, step, config, mesh, dtype)
    with jax.set_mesh(mesh):
        graphdef, _ = split(abstract_model(config.model, config.compute))
    return merge(graphdef, params)


def _load(workdir: str | os.PathLike, step: int, target: dict) -> dict:
    path = Path(workdir).absolute() / FOLDER / str(step)
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(path / "state", args=args)
    except Exception as error:
        raise UserError(f"checkpoint {step} of {workdir} cannot be restored: {_first_line(error)}") from None
