"""Shared by the tests of whole runs: helpers that look into a run's folder or stop a run at a chosen step."""

import contextlib
import copy
import json
import os
import signal
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from llada_jax.config import Config
from llada_jax.devices import mesh as meshes
from llada_jax.diffusion import forward
from llada_jax.formats import workdir
from llada_jax.training import checkpoint, loop, step
from llada_jax.training.run import train

STEPS: dict[tuple, object] = {}  # the train steps that this process has made


def shared_step(config: Config, graphdef, options):
    """Returns the train step of `make_train_step`: the same function for all runs that it would be the same for.

    JAX then traces and lowers it once for each mesh, which is most of what a run costs whose program is in the cache.
    """
    parts = (config.diffusion, config.model, config.optimizer, config.compute.loss_chunk, config.logging.buckets)
    parts += (config.seed, config.steps, config.batch_size, config.accumulation, options)
    key = (repr(parts), graphdef, forward.OBJECTIVES[config.diffusion.objective])  # a test may replace the objective
    if key not in STEPS:
        STEPS[key] = step.make_train_step(copy.deepcopy(config), graphdef, options)
    return STEPS[key]


def train_on(devices: int, config: Config, folder: Path) -> int:
    """Trains in this process on its first `devices` devices, and returns the exit code."""
    if devices > jax.device_count():
        pytest.skip(f"this needs {devices} devices; here are {jax.device_count()}")

    def first_devices(mesh_config):
        return meshes.mesh_over(meshes.axis_sizes(mesh_config, devices), jax.devices()[:devices])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", first_devices)
        if loop.make_train_step is step.make_train_step:
            patch.setattr(loop, "make_train_step", shared_step)
        return train(config, folder)


def state_of(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint (None = the newest one) by name, on the host."""
    config, _ = workdir.read_config(folder)
    state = checkpoint.load_state(folder, step, config, meshes.one_device_mesh())
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def record_of(folder: Path, step: int) -> dict:
    return json.loads((folder / "checkpoints" / str(step) / "run" / "metadata").read_text())


def assert_same_run(folder: Path, other: Path) -> None:
    """Checks that two runs have bitwise the same metrics.jsonl, final parameters, moments and samples."""
    assert tiny.records(folder) == tiny.records(other)
    ours, theirs = state_of(folder), state_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert (folder / "samples.txt").read_text() == (other / "samples.txt").read_text()
    assert board_steps(folder) == board_steps(other)


def board_steps(folder: Path) -> dict[str, list[int]]:
    """Returns tag -> steps of the scalars that TensorBoard shows.

    TensorBoard drops the earlier scalars at or beyond the step of a start event.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: dict[str, list[int]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        content, place = file.read_bytes(), 0
        while place + 12 <= len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            if place + length + 16 > len(content):
                break  # the record was cut off by a kill
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16
            if event.session_log.status == SessionLog.START:
                shown = {tag: [step for step in steps if step < event.step] for tag, steps in shown.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    shown.setdefault(value.tag, []).append(event.step)
    return {tag: steps for tag, steps in shown.items() if steps and not tiny.is_timed(tag)}


@contextlib.contextmanager
def when_done(step: int, action):
    """While the context is active, `action` is called as soon as the loop has dispatched this step."""
    original = loop.Loop._step

    def call(self, *args):
        state = original(self, *args)
        if self.done == step:
            action()
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", call)
        yield


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for(process, text: str) -> str:
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(seen)
