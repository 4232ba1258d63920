"""Saves the checkpoints of a run in the background, removes old ones, and restores the newest undamaged one.

A checkpoint holds the TrainState and a record with the metrics window. What is common to all checkpoints, such as the
fingerprints by which a damaged array is recognised, is in `formats/arrays.py`. Code that needs only the model uses
`formats/weights.py`.
"""

import contextlib
import os
import shutil
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from llada_jax.config import CheckpointConfig, Config, UserError
from llada_jax.devices import distributed
from llada_jax.formats import arrays, orbax_s3, workdir
from llada_jax.formats.arrays import Damaged
from llada_jax.formats.orbax_errors import quiet
from llada_jax.storage import objects
from llada_jax.training.step import TrainState, make_state

_REMEDY = "; the same command continues from the newest complete checkpoint"


def _as_dict(state: TrainState) -> dict:
    # The names in the files must not depend on the class TrainState.
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


class Checkpoints:
    """The checkpoints of one workdir, for the run that owns it."""

    def __init__(self, folder: str | os.PathLike, config: CheckpointConfig):
        """Opens the checkpoints of a workdir and removes unfinished ones.

        Args:
          folder: The workdir.
          config: How often checkpoints are saved, and how many are kept.
        """
        quiet()
        self.directory = objects.absolute(folder) / workdir.CHECKPOINTS
        orbax_s3.prepare(self.directory)
        self._every = config.every
        policies = [preservation_policy.LatestN(config.keep)]
        if config.permanent_every:
            policies.append(preservation_policy.EveryNSteps(config.permanent_every))
        in_bucket = objects.is_bucket(folder)
        if in_bucket:
            _remove_unfinished(folder)
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),  # the training loop decides
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not in_bucket,
        )
        with arrays.save_errors(self.directory) if in_bucket else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints in ascending order."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Returns whether a rolling or a permanent checkpoint falls on this step."""
        return step % self._every == 0

    def save(self, state: TrainState, record: dict) -> None:
        """Starts to save a state under the number of its step. Does nothing if that step is saved already.

        The arrays have left the devices when this returns; the files are written in the background.

        Args:
          state: The state to save.
          record: A JSON object that `restore` returns with the state.

        Raises:
          SaveFailed: If the state is not finite, or if the previous save failed.
        """
        step = int(state.step)
        with arrays.save_errors(self.directory, _REMEDY):
            if distributed.first_decides("saved already", lambda: step in self._manager.all_steps()):
                return
            self._manager.save(step, args=arrays.save_args(step, _as_dict(state), record))

    def check(self) -> None:
        """Raises SaveFailed if the save in the background has failed by now."""
        with arrays.save_errors(self.directory, _REMEDY):
            if not self._manager.is_saving_in_progress():
                # This returns at once. The manager's own check_for_errors misses some failures.
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """Waits until every started save is on the disk. Raises SaveFailed if one cannot be written."""
        with arrays.save_errors(self.directory, _REMEDY):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and then frees what the manager holds."""
        with arrays.save_errors(self.directory, _REMEDY):
            self._manager.close()

    def restore(self, config: Config, mesh: Mesh, report: Callable[[str], None]) -> tuple[TrainState, dict]:
        """Restores the newest checkpoint that is not damaged.

        A damaged checkpoint is reported and renamed to damaged-STEP, and then the checkpoint before it is tried. In a
        bucket it is moved to damaged/STEP in the workdir, because Orbax removes from checkpoints/ what is unfinished.

        Args:
          config: The configuration of the run, which the shapes come from.
          mesh: The mesh that the state is placed on; the state may have been saved on another mesh.
          report: A function that is called with one line of text for each damaged checkpoint.

        Returns:
          The state, and the record that was saved with it.

        Raises:
          UserError: If no checkpoint can be restored. Nothing is renamed then.
        """
        target = _as_dict(arrays.abstract(lambda: make_state(config), mesh))
        problems = {}
        # All processes must try the same checkpoints: one of them may see a file that another does not see yet.
        for step in distributed.first_decides("checkpoints", lambda: self.steps()[::-1]):
            try:
                with jax.set_mesh(mesh):
                    state, record = arrays.read(self.directory / str(step), target, partial=False)
                    if int(state["step"]) != step:
                        raise Damaged(f"it holds step {int(state['step'])}")
            except Damaged as error:
                problems[step] = str(error)
                report(f"checkpoint {step} is damaged ({error})")
                continue
            self._put_aside(list(problems))
            return TrainState(**state), record
        if not problems:
            raise UserError(f"{self.directory} has no complete checkpoint")
        raise UserError(
            f"{self.directory}: none of the checkpoints {sorted(problems)} can be restored; "
            f"the newest fails with: {problems[max(problems)]}"
        )

    def _put_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if distributed.index() == 0:
            for step in steps:
                if objects.is_bucket(self.directory):
                    aside = self.directory.parent / "damaged" / str(step)
                    objects.move_all(self.directory / str(step), aside, workdir.COMPLETE)
                    continue
                aside = self.directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        distributed.barrier("damaged checkpoints put aside")
        self._manager.reload()


def _remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes from a workdir in a bucket what a run that died left of checkpoints.

    Orbax would remove it in the background while it lists the checkpoints, and its listing fails if it finds that there
    are some and then that there are none.
    """
    if distributed.index() == 0:
        directory = objects.absolute(folder) / workdir.CHECKPOINTS
        complete = map(str, workdir.steps_in(folder))
        for name in {name.partition("/")[0] for name in objects.names(directory)}.difference(complete):
            objects.delete_all(directory / name)
    distributed.barrier("unfinished checkpoints removed")


def load_state(folder: str | os.PathLike, step: int | None, config: Config, mesh: Mesh) -> TrainState:
    """Reads the whole state of a checkpoint of another workdir, to branch from it.

    Args:
      folder: The other workdir.
      step: The step of the checkpoint. None means the newest.
      config: The configuration that the shapes come from.
      mesh: The mesh that the state is placed on.

    Raises:
      UserError: If there is no such checkpoint, or if it is damaged or does not fit `config`.
    """
    quiet()
    step = workdir.choose_step(folder, step)
    target = _as_dict(arrays.abstract(lambda: make_state(config), mesh))
    with jax.set_mesh(mesh):
        return TrainState(**arrays.load(folder, step, target))
