"""Tests that checkpoints are restored bitwise on any mesh, and that damaged ones are reported and skipped."""

import errno
import os
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llada_jax.config import CheckpointConfig, UserError
from llada_jax.formats import arrays, weights, workdir
from llada_jax.training import checkpoint
from llada_jax.training.step import TrainState, make_state


@pytest.fixture(scope="module")
def config():
    config = tiny.get_config()
    config.model.vocab_size = 384
    return config


@pytest.fixture(scope="module")
def one_device(make_mesh):
    return make_mesh(1)


@pytest.fixture(scope="module")
def state(config, one_device):
    with jax.set_mesh(one_device):
        return make_state(config)


@pytest.fixture
def open_checkpoints(one_device):
    """Returns open_one(folder, **settings), which opens the checkpoints of a workdir until the test ends."""
    opened = []

    def open_one(folder, **settings):
        opened.append(checkpoint.Checkpoints(folder, CheckpointConfig(**{"every": 1, "keep": 3, **settings})))
        return opened[-1]

    with jax.set_mesh(one_device):
        yield open_one
        for one in opened:
            try:
                one.close()
            except arrays.SaveFailed:
                pass


def at(state: TrainState, step: int) -> TrainState:
    """Returns a state that is different for each `step`."""
    return TrainState(jnp.full_like(state.step, step), jax.tree.map(lambda x: x + step, state.params), state.opt_state)


def same(a, b) -> bool:
    """Returns whether two trees are bitwise equal, on any devices."""
    a, b = jax.device_get((a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def two_saved(state, one_device, tmp_path_factory):
    """Returns a workdir with checkpoints 1 and 2. Copy it before you change anything."""
    folder = tmp_path_factory.mktemp("saved")
    with jax.set_mesh(one_device):
        saved = checkpoint.Checkpoints(folder, CheckpointConfig(every=1, keep=3))
        for step in (1, 2):
            saved.save(at(state, step), {"window": {"steps": step}})
        saved.close()
    return folder


@pytest.fixture
def folder(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_comes_back_bit_by_bit_on_any_mesh(config, state, folder, make_mesh, open_checkpoints, shape):
    mesh = make_mesh(*shape)
    found, record = open_checkpoints(folder).restore(config, mesh, pytest.fail)
    assert same(found, at(state, 2))
    assert record["window"] == {"steps": 2}
    assert found.params["blocks"]["q_proj"].sharding.mesh.shape == mesh.shape
    shards = found.params["blocks"]["q_proj"].addressable_shards
    assert shards[0].data.size * shape[1] * shape[2] == found.params["blocks"]["q_proj"].size


def test_without_a_checkpoint_there_is_nothing_to_restore(config, tmp_path, one_device, open_checkpoints):
    with pytest.raises(UserError, match="checkpoints has no complete checkpoint"):
        open_checkpoints(tmp_path).restore(config, one_device, pytest.fail)


def test_a_sharded_state_is_saved_whole(config, folder, state, make_mesh, one_device, open_checkpoints):
    mesh = make_mesh(1, 2, 4)
    with jax.set_mesh(mesh):
        elsewhere, _ = open_checkpoints(folder).restore(config, mesh, pytest.fail)
        elsewhere.step = elsewhere.step + 1
        saved = open_checkpoints(folder)
        saved.save(elsewhere, {})
        saved.wait()
    found, _ = open_checkpoints(folder).restore(config, one_device, pytest.fail)
    assert int(found.step) == 3 and same(found.params, at(state, 2).params)


def test_donating_what_is_being_saved_does_no_harm(tmp_path, one_device, open_checkpoints):
    # The array has 64 MiB, so it is still being written when the next step takes its buffer.
    x = jax.random.normal(jax.random.key(0), (1 << 24,))
    wanted = np.array(x)
    saved = open_checkpoints(tmp_path)
    saved.save(TrainState(jnp.int32(1), {"x": x}, ()), {})
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    for _ in range(3):
        x = step(x)
    jax.block_until_ready(x)
    saved.wait()
    found = arrays.load(tmp_path, 1, {"params": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}})
    assert np.array_equal(found["params"]["x"], wanted)


def test_the_record_is_that_of_the_moment(config, state, tmp_path, one_device, open_checkpoints):
    saved, record = open_checkpoints(tmp_path), {"window": {"sums": [1.0, 2.0]}}
    saved.save(at(state, 1), record)
    record["window"]["sums"][0] = 7.0  # as the loop does while the files are being written
    saved.wait()
    assert saved.restore(config, one_device, pytest.fail)[1]["window"] == {"sums": [1.0, 2.0]}


def test_retention(state, tmp_path, open_checkpoints):
    saved = open_checkpoints(tmp_path, keep=2, permanent_every=4)
    for step in range(1, 12):
        saved.save(at(state, step), {})
    saved.wait()
    assert saved.steps() == workdir.steps_in(tmp_path) == [4, 8, 10, 11]


def test_a_step_is_saved_once(state, folder, open_checkpoints):
    saved = open_checkpoints(folder)
    before = (folder / "checkpoints" / "2" / "run" / "metadata").stat().st_mtime_ns
    saved.save(at(state, 2), {"window": "another"})
    saved.save(at(state, 3), {})
    saved.save(at(state, 3), {})  # while checkpoint 3 is being written
    saved.wait()
    assert saved.steps() == [1, 2, 3]
    assert (folder / "checkpoints" / "2" / "run" / "metadata").stat().st_mtime_ns == before


def largest(folder: Path) -> Path:
    return max((folder / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    content = bytearray(largest(folder).read_bytes())
    content[len(content) // 2] ^= 16
    largest(folder).write_bytes(content)


DAMAGE = {
    "truncated array file": lambda folder: os.truncate(largest(folder), 1000),
    "flipped bit": flip_a_bit,
    "removed array file": lambda folder: largest(folder).unlink(),
    "emptied metadata": lambda folder: os.truncate(folder / "state" / "_METADATA", 0),
    "emptied record": lambda folder: os.truncate(folder / "run" / "metadata", 0),
    "removed state": lambda folder: shutil.rmtree(folder / "state"),
    "everything removed": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "another step's": lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.parent / "1", folder)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    config, state, folder, one_device, open_checkpoints, capfd, kind
):
    DAMAGE[kind](folder / "checkpoints" / "2")
    lines = []
    saved = open_checkpoints(folder)
    found, record = saved.restore(config, one_device, lines.append)
    assert same(found, at(state, 1)) and record["window"] == {"steps": 1}
    assert len(lines) == 1 and lines[0].startswith("checkpoint 2 is damaged") and "\n" not in lines[0]
    assert "Traceback" not in capfd.readouterr().err
    saved.save(at(state, 2), {"window": {"steps": 2}})
    saved.wait()
    assert saved.steps() == [1, 2] and (folder / "checkpoints" / "damaged-2").is_dir()
    assert same(open_checkpoints(folder).restore(config, one_device, pytest.fail)[0], at(state, 2))


def listing(folder: Path) -> set[tuple[str, int]]:
    return {(str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def test_all_damaged_is_an_error_and_nothing_is_touched(config, folder, one_device, open_checkpoints):
    for step in ("1", "2"):
        os.truncate(folder / "checkpoints" / step / "state" / "_METADATA", 0)
    before = listing(folder)
    with pytest.raises(UserError, match=r"none of the checkpoints \[1, 2\] can be restored"):
        open_checkpoints(folder).restore(config, one_device, lambda line: None)
    assert listing(folder) == before


def test_no_memory_is_no_damage(config, folder, one_device, open_checkpoints, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    saved = open_checkpoints(folder)
    monkeypatch.setattr(arrays, "_verify", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        saved.restore(config, one_device, pytest.fail)
    assert workdir.steps_in(folder) == [1, 2]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_an_error_of_the_machine_is_no_damage(config, folder, one_device, open_checkpoints, monkeypatch, code):
    """The newest checkpoint would be put aside otherwise, and the run would continue from an older one."""

    def fail(*_):
        raise ValueError(f"NOT_FOUND: Error opening: [OS error {code}: {os.strerror(code)}] [source locations]")

    saved = open_checkpoints(folder)
    monkeypatch.setattr(arrays, "_read_arrays", fail)
    with pytest.raises(OSError) as error:
        saved.restore(config, one_device, pytest.fail)
    assert error.value.errno == code and workdir.steps_in(folder) == [1, 2]


def test_unfinished_checkpoints_are_ignored_and_removed(config, state, folder, one_device, open_checkpoints):
    (folder / "checkpoints" / "2").rename(folder / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert workdir.steps_in(folder) == [1]
    saved = open_checkpoints(folder)
    found, _ = saved.restore(config, one_device, pytest.fail)
    assert int(found.step) == 1
    saved.save(at(state, 2), {})
    saved.wait()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_saved(state, folder, open_checkpoints, value):
    poisoned = at(state, 3)
    weight = poisoned.params["blocks"]["k_proj"]
    values = np.array(weight)
    values[1, 2, 3, 4] = value
    poisoned.params["blocks"]["k_proj"] = jax.device_put(values, weight.sharding)
    saved = open_checkpoints(folder)
    with pytest.raises(arrays.SaveFailed, match=r"step 3 is not saved: params/blocks/k_proj is not finite"):
        saved.save(poisoned, {})
    assert workdir.steps_in(folder) == [1, 2]


def test_a_disk_that_takes_no_more(config, state, folder, one_device, open_checkpoints, capfd):
    saved = open_checkpoints(folder, keep=1)
    before, limits = listing(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(arrays.SaveFailed, match="could not be written to .*checkpoints"):
            saved.save(at(state, 3), {})
            saved.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in capfd.readouterr().err
    # No older checkpoint was removed, because the new one was never completed.
    assert before <= listing(folder)
    again = open_checkpoints(folder, keep=1)
    assert same(again.restore(config, one_device, pytest.fail)[0], at(state, 2))
    again.save(at(state, 3), {})
    again.wait()
    assert workdir.steps_in(folder) == [3]


def test_the_failure_of_a_save_is_noticed_before_the_next_one(state, folder, open_checkpoints):
    saved = open_checkpoints(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(arrays.SaveFailed):
            saved.save(at(state, 3), {})
            for _ in range(3000):
                saved.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_parts_of_a_workdir(config, state, folder, make_mesh, one_device):
    workdir.write_config(folder, config, {})
    mesh = make_mesh(1, 4, 2)
    assert same(checkpoint.load_state(folder, 1, config, mesh), at(state, 1))
    assert same(weights.load_params(folder, None, config, mesh), at(state, 2).params)
    halves = weights.load_params(folder, 2, config, one_device, jnp.bfloat16)
    assert same(halves, jax.tree.map(lambda x: x.astype(jnp.bfloat16), at(state, 2).params))
    model = weights.load_model(folder, 1, one_device)
    assert same(model.embedding[...], at(state, 1).params["embedding"])


def test_parts_of_a_damaged_checkpoint_are_refused(config, folder, one_device):
    flip_a_bit(folder / "checkpoints" / "2")
    with pytest.raises(UserError, match="checkpoint 2 of .* cannot be restored: the content of .* is not what was"):
        checkpoint.load_state(folder, None, config, one_device)
    assert int(checkpoint.load_state(folder, 1, config, one_device).step) == 1


def test_steps_that_are_not_there(config, folder, tmp_path, one_device):
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has 1, 2$"):
        weights.load_params(folder, 3, config, one_device)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        workdir.choose_step(tmp_path, None)
    assert workdir.choose_step(folder, None) == 2 and workdir.choose_step(folder, 1) == 1
