"""Checkpoints of a run (Orbax): asynchronous saves, retention, restore on any mesh, damage found and named.

A workdir holds config.json, tokenizer/ and checkpoints/STEP/. A checkpoint holds the TrainState and a small
"run" record: the fingerprint of every array, by which a damaged one is recognised, and the metrics window. A run with
low-rank adapters has no more than these in its TrainState; the weights that they adapt are in frozen/, written once.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from llada_jax.config import CheckpointConfig, Config, LoraConfig, UserError
from llada_jax.devices import distributed
from llada_jax.formats.fingerprint import fingerprint
from llada_jax.formats.folders import CHECKPOINTS
from llada_jax.formats.orbax_errors import one_line, quiet
from llada_jax.model import lora
from llada_jax.model.transformer import Transformer, abstract_model, merge, split
from llada_jax.training import workdir as workdirs
from llada_jax.training.step import TrainState, make_state

FOLDER = CHECKPOINTS
BASE = "frozen"  # in the workdir of a run with adapters: their base


class Damaged(Exception):
    """A checkpoint that was read without error but does not hold what was saved."""


class SaveFailed(Exception):
    """A checkpoint could not be written, or must not be."""


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
        quiet()
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

    def save(self, state: TrainState, run: dict) -> None:
        """Starts saving; the arrays are copied off the device before this returns, files are written behind it.

        Args:
          state: saved under its step; nothing happens if that is saved already.
          run: JSON-able record that `restore` gives back.

        Raises:
          SaveFailed: this state is not finite, or the save before this one failed.
        """
        step = int(state.step)
        with self._failures():
            if distributed.first_decides("saved already", lambda: step in self._manager.all_steps()):
                return
            self._save(step, _as_dict(state), run)

    def _save(self, step: int, tree: dict, run: dict) -> None:
        prints, broken = fingerprint(tree)
        if broken:
            raise SaveFailed(f"the state of step {step} is not saved: {broken[0]} is not finite")
        # The record is written in the background: it must not be one that the caller goes on changing.
        record = copy.deepcopy({**run, "fingerprint": prints})
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), run=ocp.args.JsonSave(record))
        self._manager.save(step, args=args)

    def save_weights(self, step: int, params: dict, run: dict) -> None:
        """As `save`, of parameters alone, in their dtype: `load_params` takes them, a run cannot go on from them."""
        dtype = jax.tree.leaves(params)[0].dtype.name
        with self._failures():
            self._save(step, {"params": params}, {**run, "weights_only": True, "dtype": dtype})

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except SaveFailed:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds, often those of a background thread
            raise SaveFailed(
                f"a checkpoint could not be written to {self.directory}: {one_line(error)}; "
                f"the same command goes on from the newest whole one"
            ) from error

    def check(self) -> None:
        """Raises SaveFailed if the save in the background has failed by now."""
        with self._failures():
            if not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()  # at once; its own check_for_errors does not see all of them

    def restore(self, config: Config, mesh: Mesh, report: Callable[[str], None]) -> tuple[TrainState, dict] | None:
        """The newest checkpoint that is whole, on `mesh`, with the record saved beside it; None if there is none.

        A damaged one is reported, put aside as damaged-STEP, and the one before it is used.

        Raises:
          UserError: there are checkpoints and none can be read; nothing is moved then.
        """
        target = _as_dict(_target(lambda: make_state(config), mesh))
        problems = {}
        # All processes look at the same ones: one may see a file that another does not see yet.
        for step in distributed.first_decides("checkpoints", lambda: self.steps()[::-1]):
            state, run, problem = None, None, None
            try:
                with jax.set_mesh(mesh):
                    state, run = self._read(step, target)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # out of memory, most likely: no fault of the files
            except Exception as error:  # any failure to read is damage: Orbax and TensorStore raise many kinds
                problem = one_line(error)
            # Each process reads its own part: what is damaged for one of them is damaged for all.
            problem = distributed.first_problem("checkpoint read", problem)
            if problem is None:
                try:
                    with jax.set_mesh(mesh):
                        self._check(step, state, run)
                except Damaged as error:
                    problem = str(error)
            if problem is None:
                self._put_aside(list(problems))
                return TrainState(**state), run
            problems[step] = problem
            report(f"checkpoint {step} is damaged ({problem})")
        if problems:
            raise UserError(
                f"{self.directory}: none of the checkpoints {sorted(problems)} can be restored; "
                f"the newest fails with: {problems[max(problems)]}"
            )
        return None

    def _read(self, step: int, target: dict) -> tuple[dict, dict]:
        path = self.directory / str(step)
        return _read_arrays(path, target, partial=False), _read_run(path)

    def _check(self, step: int, state: dict, run: dict) -> None:
        _verify(state, run["fingerprint"])
        if int(state["step"]) != step:
            raise Damaged(f"it holds step {int(state['step'])}")

    def _put_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if distributed.index() == 0:
            for step in steps:
                aside = self.directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        distributed.barrier("damaged checkpoints put aside")
        self._manager.reload()

    def due(self, step: int) -> bool:
        """Whether a rolling or a permanent checkpoint falls on this step."""
        return step % self._every == 0

    def wait(self) -> None:
        """Until all that was started is on disk. SaveFailed if it cannot be written."""
        with self._failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees what the manager holds. SaveFailed as `wait`."""
        with self._failures():
            self._manager.close()


def _read_arrays(path: Path, target: dict, partial: bool = True) -> dict:
    """What `target` describes of a checkpoint (all of it, unless `partial`); each process reads what it needs.

    By Orbax's handler alone: its managers wait for all processes to have read, for ever where one of them fails.
    """
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=partial)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.restore(epath.Path(path) / "state", args=args)


def _read_run(path: Path) -> dict:
    """The record beside it."""
    return json.loads((path / "run" / "metadata").read_text())


def _verify(tree: Any, expected: dict[str, int]) -> None:
    """Damaged, unless every array of `tree` (a whole checkpoint or some of it) is what was saved under its name."""
    for name, value in fingerprint(tree)[0].items():
        if value != expected.get(name):
            raise Damaged(f"the content of {name} is not what was saved")


def steps_in(workdir: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a workdir, ascending: one that is being written has another name."""
    folder = Path(workdir) / FOLDER
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a workdir, ascending. UserError if there are none."""
    steps = steps_in(workdir)
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


def weights_record(workdir: str | os.PathLike, step: int) -> dict | None:
    """The record of a checkpoint that holds weights alone, None for one of training (or one that cannot be read)."""
    with contextlib.suppress(OSError, ValueError):
        run = _read_run(Path(workdir) / FOLDER / str(step))
        if run.get("weights_only"):
            return run
    return None


def load_state(workdir: str | os.PathLike, step: int | None, config: Config, mesh: Mesh) -> TrainState:
    """The whole state of a checkpoint of another workdir, to branch from it; config gives its shapes.

    Raises:
      UserError: no such checkpoint, or it cannot be restored into this config.
    """
    quiet()
    step = choose_step(workdir, step)
    target = _as_dict(_target(lambda: make_state(config), mesh))
    with jax.set_mesh(mesh):
        return TrainState(**_load(workdir, step, target))


def load_params(workdir: str | os.PathLike, step: int | None, config: Config, mesh: Mesh, dtype: Any = None) -> dict:
    """The parameters alone, as nested dicts in `dtype` (None = fp32), on `mesh`. UserError as `load_state`.

    Of a run with low-rank adapters they are those of the merged model (`lora.merge`); so config.model.lora is not
    looked at. Where `dtype` is not what was saved, they are read one by one: beside them there is memory for the
    largest one.
    """
    quiet()
    step = choose_step(workdir, step)
    key, wanted = jax.random.key(0), jnp.dtype(jnp.float32 if dtype is None else dtype)
    if (adapted := _adapted(workdir)).rank:
        model = dataclasses.replace(config.model, lora=adapted)
        target = _target(lambda: lora.initialise(model, config.compute, key), mesh)
        base = load_base(workdir, config, mesh, wanted)
        with jax.set_mesh(mesh):
            return lora.merge(lora.combine(_load(workdir, step, {"params": target})["params"], base), model)
    target = _target(lambda: split(Transformer(lora.plain(config.model), config.compute, key))[1], mesh)
    saved = jnp.dtype((weights_record(workdir, step) or {}).get("dtype", "float32"))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, saved, sharding=x.sharding), target)
    with jax.set_mesh(mesh):
        if saved == wanted:
            return _load(workdir, step, {"params": target})["params"]

        def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            # In the dtype in which it was saved: only that can be compared with its fingerprint.
            part: Any = leaf
            for key in reversed(path):
                part = {key.key: part}
            (array,) = jax.tree.leaves(_load(workdir, step, {"params": part}))
            return jax.block_until_ready(_cast(array, wanted))

        return jax.tree_util.tree_map_with_path(read, target)


def load_model(workdir: str | os.PathLike, step: int | None, mesh: Mesh, dtype: Any = None) -> Transformer:
    """The model of a workdir at a step (None = the newest), its parameters in `dtype` (None = fp32), on `mesh`.

    Of a run with low-rank adapters it is the merged model, without any.
    """
    config, _ = workdirs.read_config(workdir)
    config.model = lora.plain(config.model)
    if dtype is not None:
        config.compute.dtype = jnp.dtype(dtype).name
    params = load_params(workdir, step, config, mesh, dtype)
    with jax.set_mesh(mesh):
        graphdef, _ = split(abstract_model(config.model, config.compute))
    return merge(graphdef, params)


def _adapted(workdir: str | os.PathLike) -> LoraConfig:
    """The adapters that its checkpoints hold; none, where no config.json speaks of any."""
    return workdirs.read_config(workdir)[0].model.lora if (Path(workdir) / "config.json").exists() else LoraConfig()


def write_base(workdir: str | os.PathLike, frozen: dict) -> None:
    """Writes the weights that a run adapts, in their dtype, into its workdir; {} = it adapts none, nothing happens.

    To be called before the first checkpoint: until there is one, nothing depends on what an earlier start left here,
    and it is written anew. All of it is on disk when this returns. SaveFailed as `Checkpoints.save`; UserError if what
    has that name already is something else.
    """
    if frozen:
        base = Path(workdir) / BASE
        distributed.first_decides("frozen weights", lambda: _make_room(base))
        saved = Checkpoints(base, CheckpointConfig())
        saved.save_weights(0, frozen, {})
        saved.close()


def _make_room(base: Path) -> None:
    if base.exists() and [path.name for path in base.iterdir()] not in ([], [FOLDER]):
        raise UserError(f"{base} is where the weights go that adapters are added to, and it holds something else")
    shutil.rmtree(base, ignore_errors=True)


def load_base(workdir: str | os.PathLike, config: Config, mesh: Mesh, dtype: Any) -> dict:
    """What `write_base` wrote, in `dtype`, on `mesh`. UserError if it is missing or damaged."""
    base = Path(workdir) / BASE
    if not steps_in(base):
        raise UserError(f"{base} is missing: the checkpoints of {workdir} hold adapters alone, of no use without it")
    return load_params(base, None, config, mesh, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return x.astype(dtype)


def _load(workdir: str | os.PathLike, step: int, target: dict) -> dict:
    path = Path(workdir).absolute() / FOLDER / str(step)
    tree, expected, problem = None, {}, None
    try:
        tree, expected = _read_arrays(path, target), _read_run(path)["fingerprint"]
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        problem = one_line(error)
    # Each process reads its own part: what is damaged for one of them is damaged for all.
    problem = distributed.first_problem("checkpoint read", problem)
    if problem is None:
        try:
            _verify(tree, expected)
        except Damaged as error:
            problem = str(error)
    if problem is not None:
        raise UserError(f"checkpoint {step} of {workdir} cannot be restored: {problem}")
    return tree
