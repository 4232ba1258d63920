"""Whole runs: started, stopped in every way, resumed, branched, refused."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from llada_jax import checkpoint, command_line, diffusion, huggingface, loop, metrics, train, workdir
from llada_jax import mesh as meshes
from llada_jax.config import UserError
from llada_jax.data.prepare import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "set"
    prepare([corpus], folder, train_tokenizer=320, sequence_length=32, workers=1, progress=False)
    return str(folder)


@pytest.fixture(scope="module")
def run(prepared):
    """run(folder, devices=1, "name=value" as name=value, dots as __): trains in this process, returns the exit code."""

    def run_it(folder, devices: int = 1, **settings) -> int:
        config = tiny.get_config()
        config.data.path = prepared
        for name, value in settings.items():
            *groups, leaf = name.split("__")
            node = config
            for group in groups:
                node = getattr(node, group)
            assert hasattr(node, leaf)
            setattr(node, leaf, value)

        def first_devices(mesh_config):
            return meshes.mesh_over(meshes.axis_sizes(mesh_config, devices), jax.devices()[:devices])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(meshes, "make_mesh", first_devices)
            return train.train(config, folder)

    return run_it


@pytest.fixture(scope="module")
def reference(run, tmp_path_factory):
    """A run that nothing disturbed. Not to be changed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert run(folder, checkpoint__keep=5) == command_line.FINISHED
    return folder


@pytest.fixture
def copy(reference, tmp_path):
    """A copy of the undisturbed run up to a step, as if it had been killed there."""

    def copied(step: int) -> Path:
        folder = tmp_path / f"copy_{step}"
        shutil.copytree(reference, folder)
        for later in checkpoint.steps_in(folder):
            if later > step:
                shutil.rmtree(folder / "checkpoints" / str(later))
        return folder

    return copied


def state_of(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint (None = the newest) by name, on the host."""
    config, _ = workdir.read_config(folder)
    state = checkpoint.load_state(folder, step, config, meshes.one_device_mesh())
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def record_of(folder: Path, step: int) -> dict:
    return json.loads((folder / "checkpoints" / str(step) / "run" / "metadata").read_text())


def assert_same_run(folder: Path, other: Path) -> None:
    """Losses and everything else in metrics.jsonl, final parameters, moments and samples: bit by bit."""
    assert tiny.records(folder) == tiny.records(other)
    ours, theirs = state_of(folder), state_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert (folder / "samples.txt").read_text() == (other / "samples.txt").read_text()
    assert board_steps(folder) == board_steps(other)


def board_steps(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps of the scalars that TensorBoard shows: a start event drops all that lies at or beyond its step."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: dict[str, list[int]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        content, place = file.read_bytes(), 0
        while place + 12 <= len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            if place + length + 16 > len(content):
                break  # torn by a kill
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16
            if event.session_log.status == SessionLog.START:
                shown = {tag: [step for step in steps if step < event.step] for tag, steps in shown.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    shown.setdefault(value.tag, []).append(event.step)
    return {tag: steps for tag, steps in shown.items() if steps and tag not in tiny.TIMED}


@contextlib.contextmanager
def when_done(step: int, action):
    """Within it `action` is called as soon as the loop has dispatched this step."""
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


# Killed and resumed


@pytest.fixture(scope="module")
def outside(corpus, tmp_path_factory):
    """(folder, seconds) of an undisturbed run from text to the end in a process of its own."""
    folder = tmp_path_factory.mktemp("outside") / "run"
    started = time.monotonic()
    process = tiny.start(["-m", "llada_jax.train", *tiny.command(folder, f"data.input={corpus}")])
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    return folder, time.monotonic() - started


def test_killed_at_chosen_moments_the_run_is_the_same(outside, corpus, tmp_path):
    folder = tmp_path / "run"
    flags = tiny.command(folder, f"data.input={corpus}")
    for point in (["publish"], ["config"], ["dispatched", "4"], ["saving", "5"], ["written", "14"], ["saving", "20"]):
        process = tiny.start([str(tiny.ROOT / "tests" / "dying.py"), *point, "--", *flags])
        errors = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, (point, errors)
        if point == ["publish"]:
            assert not (folder / "data").exists() and list(folder.glob(".data.preparing-*"))
        elif point == ["config"]:
            assert (folder / "data").exists() and not (folder / "config.json").exists()
        elif point[0] == "saving":
            assert list((folder / "checkpoints").glob(f"{point[1]}.*tmp*")), "it was not killed while saving"
            assert int(point[1]) not in checkpoint.steps_in(folder)
    process = tiny.start(["-m", "llada_jax.train", *flags])
    errors = process.communicate()[1]
    assert process.returncode == 0 and f"resuming {folder} at step 15" in errors, errors
    assert_same_run(folder, outside[0])
    left = [path.name for path in [*folder.iterdir(), *(folder / "checkpoints").iterdir()]]
    assert not [name for name in left if "tmp" in name or "preparing" in name]


def test_killed_three_times_at_random_the_run_is_the_same(outside, corpus, tmp_path):
    folder, delays = tmp_path / "run", []
    shutil.copytree(outside[0] / "data", folder / "data")
    flags = ["-m", "llada_jax.train", *tiny.command(folder, f"data.input={corpus}")]
    for _ in range(3):
        process = tiny.start(flags)
        delays.append(random.uniform(0.2, 1.0) * outside[1])
        time.sleep(delays[-1])
        process.kill()
        process.communicate()
    process = tiny.start(flags)
    errors = process.communicate()[1]
    assert process.returncode == 0, (delays, errors)
    assert_same_run(folder, outside[0])


def test_the_last_line_is_torn_and_steps_are_beyond_the_checkpoint(run, copy, reference):
    folder = copy(10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    with (folder / "samples.txt").open("a") as file:
        file.write("--- step 99\nsamples of another future\n")
    assert run(folder, checkpoint__keep=5) == 0
    assert_same_run(folder, reference)
    written = [record["step"] for record in tiny.records(folder)]
    assert written == sorted(set(written)) == [3, 6, 7, 9, 12, 14, 15, 18, 20]


def test_a_finished_run_is_finished(run, copy, reference, capfd):
    folder = copy(20)
    assert run(folder, checkpoint__keep=5) == 0
    assert "is finished: nothing to train up to step 20" in capfd.readouterr().err
    assert_same_run(folder, reference)
    assert run(folder, steps=22) == 0  # and goes on when asked to
    assert tiny.records(folder)[-1]["step"] == 22 and checkpoint.steps_in(folder) == [20, 22]


def test_what_was_logged_is_the_mean_since_the_last_line(run, tmp_path, reference):
    # Resumed in the middle of a window, the line holds the steps before the stop too.
    every = tmp_path / "every"
    assert run(every, logging__every=1) == 0
    losses = {record["step"]: record["loss"] for record in tiny.records(every)}
    for record in tiny.records(reference):
        if record["step"] in (3, 6, 9, 12, 15, 18):
            assert record["loss"] == sum(losses[record["step"] - i] for i in (2, 1, 0)) / 3
    assert record_of(reference, 5)["window"]["steps"] == 2  # steps 4 and 5


# SIGTERM


@pytest.mark.parametrize("step", [1, 5, 6, 13])
def test_sigterm_saves_and_the_run_goes_on(run, reference, tmp_path, step):
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with when_done(step, terminate):
        assert run(folder, checkpoint__keep=5) == command_line.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.steps_in(folder)[-1] == step
    assert run(folder, checkpoint__keep=9) == 0
    assert_same_run(folder, reference)


def test_sigterm_at_the_end_changes_nothing(run, reference, tmp_path):
    with when_done(20, terminate):
        assert run(tmp_path, checkpoint__keep=5) == 0
    assert_same_run(tmp_path, reference)


def wait_for(process, text: str) -> str:
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(seen)


def test_sigterm_to_a_process(prepared, tmp_path):
    folder = tmp_path / "run"
    flags = ["-m", "llada_jax.train", *tiny.command(folder, f"data.path={prepared}", "steps=1000000")]
    process = tiny.start(flags)
    wait_for(process, "compiling the train step")  # nothing to save yet: it is gone at once
    process.terminate()
    process.communicate()
    assert process.returncode == -signal.SIGTERM and checkpoint.steps_in(folder) == []
    process = tiny.start(flags)
    wait_for(process, "step      12/1000000")
    process.terminate()
    errors = process.communicate()[1]
    assert process.returncode == command_line.PREEMPTED, errors
    step = checkpoint.steps_in(folder)[-1]
    assert errors.rstrip().endswith(f"stopped by SIGTERM: saved step {step}; the same command goes on from there")
    assert tiny.records(folder)[-1]["step"] <= step


# Other meshes


def test_another_mesh_sees_the_same_rows_and_the_same_noise(run, reference, tmp_path, capfd):
    folder = tmp_path / "run"
    first_rows = {}
    stages = [
        (5, 1, {}),
        (10, 4, {"mesh__fsdp": 2, "mesh__tensor": 2}),
        (15, 8, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "accumulation": 2}),
        (20, 4, {"mesh__fsdp": 4, "accumulation": 2}),
    ]
    for stop, devices, settings in stages:
        with when_done(stop, terminate) if stop < 20 else contextlib.nullcontext():
            code = run(folder, devices, checkpoint__keep=5, **settings)
        assert code == (command_line.PREEMPTED if stop < 20 else 0)
        first_rows |= dict(re.findall(r"first row of step (\d+): (.*\n.*\n.*\n)", capfd.readouterr().err))
    assert first_rows.keys() == {"0", "5", "10", "15"}
    for step in (5, 10, 15, 20):
        ours, theirs = record_of(folder, step)["window"], record_of(reference, step)["window"]
        for exact in ("steps", "tokens", "bucket_tokens", "skipped"):  # masked tokens by mask ratio: rows and noise
            assert ours[exact] == theirs[exact], (step, exact)
    for ours, theirs in zip(tiny.records(folder), tiny.records(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["step"], name)
    for step in (5, 10, 15):  # decoded by a run that starts there on one device
        shutil.copytree(reference, tmp_path / str(step))
        for later in checkpoint.steps_in(reference):
            if later > step:
                shutil.rmtree(tmp_path / str(step) / "checkpoints" / str(later))
        with when_done(step + 2, terminate):
            run(tmp_path / str(step), checkpoint__keep=5)
        found = dict(re.findall(r"first row of step (\d+): (.*\n.*\n.*\n)", capfd.readouterr().err))
        assert found[str(step)] == first_rows[str(step)]


@pytest.mark.parametrize("devices, settings", [(8, {"mesh__tensor": 4}), (2, {"accumulation": 4})])
def test_the_first_step_on_another_mesh(run, tmp_path, reference, devices, settings):
    folders = tmp_path / "here", tmp_path / "there"
    assert run(folders[0], steps=1, validation__rows=0) == 0
    assert run(folders[1], devices, steps=1, validation__rows=0, **settings) == 0
    (here,), (there,) = map(tiny.records, folders)
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)


# Damage, retention


def test_after_damage_the_run_goes_on_from_the_checkpoint_before(run, copy, reference, capfd):
    folder = copy(15)
    os.truncate(folder / "checkpoints" / "15" / "state" / "_METADATA", 0)
    assert run(folder, checkpoint__keep=5) == 0
    errors = capfd.readouterr().err
    assert errors.count("checkpoint 15 is damaged") == 1 and f"resuming {folder} at step 10" in errors
    assert checkpoint.steps_in(folder) == [5, 10, 15, 20]
    assert_same_run(folder, reference)


def test_all_damaged(run, copy):
    folder = copy(10)
    for step in ("5", "10"):
        os.truncate(folder / "checkpoints" / step / "run" / "metadata", 0)
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"none of the checkpoints \[5, 10\] can be restored"):
        run(folder)
    assert checkpoint.steps_in(folder) == [5, 10] and (folder / "metrics.jsonl").read_text() == before


def test_rolling_and_permanent_checkpoints(run, tmp_path):
    settings = {"checkpoint__every": 3, "checkpoint__keep": 2, "checkpoint__permanent_every": 6}
    assert run(tmp_path, validation__rows=0, **settings) == 0
    assert checkpoint.steps_in(tmp_path) == [6, 12, 18, 20]


# Branches


def test_a_branch_goes_on_where_its_parent_was(run, reference, tmp_path):
    folder = tmp_path / "branch"
    assert run(folder, init_from=str(reference), init_step=10, checkpoint__keep=5) == 0
    ours = {record["step"]: record for record in tiny.records(folder)}
    theirs = {record["step"]: record for record in tiny.records(reference)}
    assert ours.keys() == {12, 14, 15, 18, 20}
    for step in (14, 15, 18, 20):  # the first line has only the steps since the branch
        assert ours[step] == theirs[step]
    assert state_of(folder).keys() == state_of(reference).keys()
    assert all(value.tobytes() == state_of(reference)[name].tobytes() for name, value in state_of(folder).items())


def test_a_branch_may_have_another_learning_rate_and_more_steps(run, reference, tmp_path, capfd):
    folder = tmp_path / "branch"
    settings = {"init_from": str(reference), "init_step": 15, "steps": 24}
    settings |= {"optimizer__peak_learning_rate": 1e-4, "optimizer__schedule": ((0, 1.0), (24, 0.0))}
    with when_done(19, terminate):
        assert run(folder, **settings) == command_line.PREEMPTED
    shutil.rmtree(folder / "checkpoints" / "15", ignore_errors=True)
    assert run(folder, **settings) == 0  # resumed from its own checkpoint, not branched anew
    assert f"resuming {folder} at step 19" in capfd.readouterr().err
    rates = {r["step"]: r["learning_rate"] for r in tiny.records(folder) if "learning_rate" in r}
    assert rates == pytest.approx({18: 1e-4 * 6 / 24, 21: 1e-4 * 3 / 24, 24: 0.0})
    with pytest.raises(UserError, match="config.init_step is 10, but .* was started with 15"):
        run(folder, **{**settings, "init_step": 10})


def test_weights_only(run, reference, tmp_path):
    folder = tmp_path / "run"
    settings = {"init_from": str(reference), "init_weights_only": True, "seed": 5, "optimizer__peak_learning_rate": 0.0}
    assert run(folder, steps=2, batch_size=4, **settings) == 0
    ours, theirs = state_of(folder), state_of(reference)
    assert ours[".step"] == 2
    for name, value in ours.items():
        if name.startswith(".params"):
            assert value.tobytes() == theirs[name].tobytes()


def publish(source: Path, target: Path, **changes) -> None:
    """Writes the model of a workdir as a published folder."""
    config, _ = workdir.read_config(source)
    model = checkpoint.load_model(source, None, meshes.one_device_mesh())
    tensors = {huggingface.LLADA[name]: np.asarray(getattr(model, name)[...]) for name in ("embedding", "final_norm")}
    tensors[huggingface.LLADA["head"]] = np.ascontiguousarray(np.asarray(model.head[...]).T)
    for name, pattern in huggingface.LLADA.items():
        if "{}" in pattern:
            for i, layer in enumerate(np.asarray(getattr(model.blocks, name)[...])):
                if layer.ndim == 1:
                    tensors[pattern.format(i)] = layer
                else:
                    outputs, inputs = huggingface.published_shape(name, layer.shape)
                    tensors[pattern.format(i)] = np.ascontiguousarray(layer.reshape(inputs, outputs).T)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    names = {field: published[0] for field, published in huggingface.FIELDS.items()}
    fields = {names[field]: getattr(config.model, field) for field in names} | changes
    (target / "config.json").write_text(json.dumps(fields))


def test_a_published_folder(run, reference, tmp_path, capfd):
    publish(reference, tmp_path / "published")
    settings = {"init_from": str(tmp_path / "published"), "optimizer__peak_learning_rate": 0.0, "steps": 1}
    assert run(tmp_path / "run", 4, **settings) == 0
    assert f"starting from the weights of {tmp_path / 'published'}" in capfd.readouterr().err
    ours, theirs = state_of(tmp_path / "run"), state_of(reference)
    for name, value in ours.items():
        if name.startswith(".params"):
            assert value.tobytes() == theirs[name].tobytes(), name


def test_sources_that_do_not_fit(run, reference, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    publish(reference, tmp_path / "published", mask_token_id=7)
    cases = [
        ({"init_from": str(tmp_path / "nowhere")}, "config.init_from=.*nowhere has no model"),
        ({"init_from": str(tmp_path / "empty")}, "has no checkpoint yet"),
        ({"init_from": str(reference), "init_step": 11}, "no checkpoint of step 11; it has 5, 10, 15, 20"),
        ({"init_from": str(reference), "model__layers": 3}, "config.model.layers is 3, but .* was trained with 2"),
        ({"init_from": str(reference), "seed": 1}, "config.seed is 1, .*: set --config.init_weights_only"),
        (
            {"init_from": str(reference), "init_weights_only": True, "model__feed_forward": 32},
            "config.model.feed_forward is 32, but .* has 64: its weights do not fit",
        ),
        ({"init_from": str(reference), "init_step": 10, "steps": 8}, "is at step 10, beyond config.steps=8"),
        ({"init_from": str(tmp_path / "published")}, r"config.model.mask_id is \d+, but .* has 7: its weights do"),
        ({"init_from": str(tmp_path / "published"), "init_step": 3}, "is a published folder, it has no steps"),
    ]
    for i, (settings, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            run(tmp_path / f"run_{i}", **settings)
        assert checkpoint.steps_in(tmp_path / f"run_{i}") == []


# Refused and allowed changes


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": 1}, "config.seed is 1, but .* was trained with 0"),
        ({"batch_size": 16}, "config.batch_size is 16, but .* was trained with 8"),
        ({"model__layers": 3}, "config.model.layers is 3, but .* was trained with 2"),
        ({"model__kv_heads": 2}, "config.model.kv_heads is 2, but .* was trained with 4"),
        ({"model__tied_embeddings": True}, "config.model.tied_embeddings is True"),
        ({"diffusion__t_sampling": "independent"}, "config.diffusion.t_sampling is independent"),
        ({"data__weights": (1.0,)}, "the weights differs"),
        ({"init_from": "elsewhere"}, "config.init_from is 'elsewhere', but .* was started with ''"),
        ({"steps": 10}, "is at step 20, beyond config.steps=10"),
    ],
)
def test_what_a_resume_may_not_change(run, reference, settings, message):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        run(reference, **settings)
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()} == before


def test_other_data_is_refused_and_the_same_elsewhere_is_not(run, corpus, prepared, copy, tmp_path, capfd):
    shutil.copytree(prepared, tmp_path / "moved")
    prepare([corpus], tmp_path / "other", tokenizer=f"{prepared}/tokenizer", sequence_length=32,
            validation_fraction=0.1, workers=1, progress=False)  # fmt: skip
    prepare([corpus], tmp_path / "tokens", train_tokenizer=330, sequence_length=32, workers=1, progress=False)
    prepare([corpus], tmp_path / "long", tokenizer=f"{prepared}/tokenizer", sequence_length=64, workers=1,
            progress=False)  # fmt: skip
    folder = copy(20)
    with pytest.raises(UserError, match="the data differs from that of"):
        run(folder, data__path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="config.model.token_count is 330, but .* was trained with 320"):
        run(folder, data__path=str(tmp_path / "tokens"))
    with pytest.raises(UserError, match="config.sequence_length is 64, but .* was trained with 32"):
        run(folder, data__path=str(tmp_path / "long"), sequence_length=64)
    assert run(folder, data__path=str(tmp_path / "moved"), steps=21) == 0
    assert f"  config.data.path: {prepared} -> {tmp_path / 'moved'}" in capfd.readouterr().err


def test_what_a_resume_may_change(run, copy, capfd):
    folder = copy(10)
    settings = {
        "steps": 16, "accumulation": 2, "mesh__fsdp": 2, "optimizer__schedule": ((0, 0.5),),
        "optimizer__peak_learning_rate": 1e-3, "logging__every": 2, "logging__buckets": 3,
        "logging__tensorboard": False,
        "checkpoint__every": 4, "checkpoint__keep": 1, "validation__every": 3, "validation__rows": 4,
        "sampling__every": 0, "compute__remat": "full", "optimizer__clip_norm": 0.5,
    }  # fmt: skip
    assert run(folder, 2, **settings) == 0
    errors = capfd.readouterr().err
    for name in settings:
        assert f"  config.{name.replace('__', '.')}: " in errors, name
    assert checkpoint.steps_in(folder) == [16]
    written = tiny.records(folder)
    assert [record["step"] for record in written if record["step"] > 10] == [12, 14, 15, 16]
    assert written[-1]["learning_rate"] == pytest.approx(5e-4)
    assert workdir.read_config(folder)[0].steps == 16


def test_text_prepared_in_the_workdir(run, corpus, tmp_path):
    folder, other = tmp_path / "run", Path(corpus).with_name("other.jsonl")
    other.write_text(Path(corpus).read_text())
    base = {"data__path": "", "data__input": corpus, "steps": 2, "validation__rows": 0}
    run(folder, **base)
    cases = [
        ({"data__input": str(other)}, "config.data.input is .*other.jsonl, but .* was prepared with .*corpus.jsonl"),
        ({"data__train_tokenizer": 300}, "config.data.train_tokenizer is 300, but .* was prepared with 320"),
        ({"data__validation_fraction": 0.1}, "config.data.validation_fraction is 0.1, but .* prepared with 0.02"),
        ({"sequence_length": 64}, "config.sequence_length is 64, but .* was prepared with 32"),
    ]
    before = checkpoint.steps_in(folder)
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            run(folder, **{**base, **settings, "steps": 3})
    assert checkpoint.steps_in(folder) == before
    # The tokenizer it was trained with is the same one by another name.
    with pytest.raises(UserError, match="there is no tokenizer at"):
        run(folder, **base, data__tokenizer=str(tmp_path / "nowhere"))
    assert run(folder, **base, data__tokenizer=str(folder / "tokenizer")) == 0
    # Where the set itself is gone, another text is not prepared only to be refused.
    shutil.rmtree(folder / "data")
    with pytest.raises(UserError, match="config.data.input is .*other.jsonl, but .* was trained on .*corpus.jsonl"):
        run(folder, **{**base, "data__input": str(other)})
    assert not (folder / "data").exists()
    assert run(folder, **base) == 0  # the same text gives the same set


def test_before_the_first_checkpoint_nothing_binds(run, tmp_path, prepared, corpus):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    prepare([corpus], tmp_path / "tokens", train_tokenizer=330, sequence_length=32, workers=1, progress=False)
    with when_done(2, stop), pytest.raises(Stop):
        run(tmp_path / "run", seed=3)
    assert (tmp_path / "run" / "config.json").exists()
    assert run(tmp_path / "run", data__path=str(tmp_path / "tokens"), seed=4, steps=3, batch_size=4) == 0
    kept, wanted = (path.read_bytes() for path in (
        tmp_path / "run" / "tokenizer" / "tokenizer.model", tmp_path / "tokens" / "tokenizer" / "tokenizer.model"
    ))  # fmt: skip
    assert kept == wanted


def test_checkpoints_without_a_config(run, copy):
    folder = copy(5)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has checkpoints but no config.json"):
        run(folder)


# One owner, a place to write


def test_a_second_process_is_refused(run, reference, prepared, tmp_path):
    folder = tmp_path / "run"
    codes = []

    def second():
        process = tiny.start(["-m", "llada_jax.train", *tiny.command(folder, f"data.path={prepared}")])
        codes.append((process.communicate()[1].strip(), process.returncode))

    with when_done(8, second):
        assert run(folder, checkpoint__keep=5) == 0
    assert codes == [(f"error: --workdir={folder} is in use by another process", command_line.USER_ERROR)]
    assert_same_run(folder, reference)


def test_a_workdir_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file/run cannot be written"):
        run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="--workdir=gs://bucket/run: a local or mounted folder"):
        run("gs://bucket/run")


def test_a_full_disk_ends_the_run_and_it_goes_on_later(run, reference, tmp_path, capfd):
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk():
        while checkpoint.steps_in(folder) != [5, 10]:  # that one is still being written
            time.sleep(0.01)
        # Small enough for no checkpoint, large enough for metrics.jsonl.
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))

    try:
        with when_done(13, fill_disk):
            assert run(folder, checkpoint__keep=5) == command_line.FAILURE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capfd.readouterr().err
    assert "stopped: a checkpoint could not be written to" in errors and "Traceback" not in errors
    assert checkpoint.steps_in(folder) == [5, 10]
    assert run(folder, checkpoint__keep=5) == 0
    assert_same_run(folder, reference)


# Not finite


@contextlib.contextmanager
def poisoned(first: int, last: int):
    """The loss of steps first..last (counted from 1) is NaN: their rows say so by an impossible length."""
    place, step, pretrain = meshes.place_batch, loop.Loop._step, diffusion.OBJECTIVES["pretrain"]
    now = []

    def noted_step(self, *args):
        now[:] = [self.done + 1]
        return step(self, *args)

    def marked(batch, mesh, batch_size):
        if first <= now[0] <= last:
            batch = {**batch, "length": batch["length"] + 1000}
        return place(batch, mesh, batch_size)

    def objective(key, tokens_BT, length_B, *rest):
        noisy = pretrain(key, tokens_BT, length_B % 1000, *rest)
        return noisy._replace(weight_BT=jnp.where(length_B[:, None] > 1000, jnp.nan, noisy.weight_BT))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", noted_step)
        patch.setattr(loop.mesh, "place_batch", marked)
        patch.setitem(diffusion.OBJECTIVES, "pretrain", objective)
        yield


def test_steps_that_are_not_finite_end_the_run(run, tmp_path, capfd):
    settings = {"optimizer__max_nonfinite": 6, "checkpoint__every": 2, "checkpoint__keep": 9}
    with poisoned(8, 99):
        assert run(tmp_path, **settings) == command_line.FAILURE
    errors = capfd.readouterr().err
    assert "stopped: loss or gradients were not finite in 6 steps in a row, up to step 13" in errors
    assert [(r["step"], r["skipped"]) for r in tiny.records(tmp_path) if "skipped" in r] == [
        (3, 0), (6, 0), (9, 2), (12, 3)
    ]  # fmt: skip
    assert tiny.records(tmp_path)[-1]["loss"] is None  # not a step of the window was finite
    assert checkpoint.steps_in(tmp_path) == [2, 4, 6, 8, 10, 12]
    seven = {name: value for name, value in state_of(tmp_path, 8).items() if name != ".step"}
    for step in (10, 12):
        for name, value in state_of(tmp_path, step).items():
            assert np.isfinite(value).all()
            assert name == ".step" or value.tobytes() == seven[name].tobytes()
    # The count goes on over a restart.
    assert record_of(tmp_path, 12)["skipped_in_a_row"] == 5
    with poisoned(8, 99):
        assert run(tmp_path, **settings) == command_line.FAILURE
    assert "in 6 steps in a row, up to step 13" in capfd.readouterr().err


def test_a_few_steps_that_are_not_finite_are_skipped(run, tmp_path):
    with poisoned(8, 10):
        assert run(tmp_path, optimizer__max_nonfinite=4) == 0
    assert {r["step"]: r["skipped"] for r in tiny.records(tmp_path) if "skipped" in r}[9] == 2
    assert tiny.records(tmp_path)[-1]["step"] == 20 and tiny.records(tmp_path)[-1]["loss"] < 6


def test_an_absurd_learning_rate_leaves_nothing_but_finite_numbers(run, tmp_path):
    settings = {"optimizer__peak_learning_rate": 1e30, "optimizer__schedule": ((0, 1.0),), "checkpoint__every": 1}
    assert run(tmp_path, optimizer__max_nonfinite=3, checkpoint__keep=20, **settings) == command_line.FAILURE
    for step in checkpoint.steps_in(tmp_path):
        assert all(np.isfinite(value).all() for value in state_of(tmp_path, step).values())


# Between host and device


def test_nothing_crosses_unasked(run, tmp_path, monkeypatch):
    place = meshes.place_batch

    def careless(*args):
        batch = place(*args)
        return {**batch, "length": batch["length"] + np.int32(0)}

    monkeypatch.setattr(loop.mesh, "place_batch", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path)


def test_the_host_stays_one_step_behind(run, tmp_path, monkeypatch):
    dispatched, looks = [], []
    make, fetch = loop.make_train_step, metrics.fetch

    def make_noting(*args):
        step = make(*args)

        def noting(*args):
            dispatched.append(None)
            return step(*args)

        return noting

    def note_fetch(values):
        looks.append(len(dispatched))
        return fetch(values)

    monkeypatch.setattr(loop, "make_train_step", make_noting)
    monkeypatch.setattr(loop.metrics, "fetch", note_fetch)
    assert run(tmp_path, logging__every=1, validation__rows=0, sampling__every=0, checkpoint__every=5) == 0
    # Step s is looked at once s + 1 is under way, but for those that end in a checkpoint.
    assert looks == [s if s % 5 == 0 else s + 1 for s in range(1, 21)]


# Profile


@pytest.mark.parametrize("stop, first, count", [(None, 3, 2), (None, 18, 9), (5, 3, 9)])
def test_a_profile_is_closed_whatever_happens(run, tmp_path, capfd, stop, first, count):
    with when_done(stop, terminate) if stop else contextlib.nullcontext():
        code = run(tmp_path, profile__first_step=first, profile__steps=count, validation__rows=0)
    assert code == (command_line.PREEMPTED if stop else 0)
    last = min(first + count, stop or 20)
    assert f"profile from step {first} to {last} in" in capfd.readouterr().err
    assert [file.stat().st_size > 1000 for file in tmp_path.rglob("*.xplane.pb")] == [True]


def test_a_profile_that_is_over_before_the_start(run, copy, capfd):
    assert run(copy(15), profile__first_step=3, profile__steps=2) == 0
    assert "no profile: config.profile.first_step=3 lies before step 15" in capfd.readouterr().err


# What is left behind


def test_nothing_is_left_running(run, tmp_path):
    assert run(tmp_path, steps=3) == 0
    names = [thread.name for thread in threading.enumerate() if "save" in thread.name or "data" in thread.name]
    assert names == []


def test_a_workdir_is_self_contained(reference):
    starts = [json.loads(line) for line in (reference / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0]
    config, identity = workdir.read_config(reference)
    assert config.model.vocab_size == 384 and config.model.mask_id is not None
    assert identity["tokenizer"] and identity["data"]
    assert (reference / "tokenizer" / "tokenizer.model").exists()
    assert (reference / "samples.txt").read_text().startswith("--- step 9\n")
