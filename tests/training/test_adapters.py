"""Tests runs with low-rank adapters: what they start from, what their workdirs hold, and which model is loaded."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import rounding
import tiny
from runs import assert_same_run, state_of, terminate, when_done

import llada_jax
from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.devices import mesh as meshes
from llada_jax.formats import weights, workdir
from llada_jax.formats.conversion import convert
from llada_jax.model import lora
from llada_jax.model.transformer import abstract_model, merge, split
from llada_jax.training import checkpoint

SETTINGS = {"model__lora__rank": 4, "steps": 10, "validation__every": 5, "checkpoint__keep": 5}
# One step with a learning rate of zero: the new adapters do not change the model.
STILL = {"model__lora__rank": 2, "optimizer__peak_learning_rate": 0.0, "steps": 1}


@pytest.fixture(scope="module")
def source(reference, tmp_path_factory):
    """Returns the workdir of a run to adapt: a copy, because a test removes it for a while."""
    folder = tmp_path_factory.mktemp("source") / "run"
    shutil.copytree(reference, folder)
    return folder


@pytest.fixture(scope="module")
def adapted(run, source, tmp_path_factory):
    """Returns the workdir of a run of 10 steps that adapts `source`. Do not change it."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    assert run(folder, init_from=str(source), **SETTINGS) == 0
    return folder


@pytest.fixture
def copy_of_adapted(adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "copy")
    return tmp_path / "copy"


def logits_of(folder, step=None) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 300, (2, 24)).astype(np.int32)
    return np.asarray(llada_jax.load(folder, step=step)[0](tokens))


def base_of(folder: Path) -> dict[str, np.ndarray]:
    config, _ = workdir.read_config(folder)
    tree = weights.load_frozen(folder, config, meshes.one_device_mesh(), np.float32)
    return {jax.tree_util.keystr(path): np.array(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def params_of(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(".params"): x for name, x in state.items() if name.startswith(".params")}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_its_checkpoints_hold_adapters_alone(adapted, source):
    state = state_of(adapted)
    assert params_of(state) and all(name.endswith(("_a']", "_b']")) for name in params_of(state))
    assert len([name for name in state if name.startswith(".opt_state")]) == 2 * len(params_of(state)) + 1
    # The weights that it adapts are still bitwise the weights of its source.
    assert same(base_of(adapted), params_of(state_of(source)))


def test_what_is_loaded_is_the_merged_model(adapted):
    tokens = np.random.default_rng(0).integers(0, 300, (2, 24)).astype(np.int32)
    config, _ = workdir.read_config(adapted)
    device_mesh = meshes.one_device_mesh()
    with jax.set_mesh(device_mesh):
        adapters = checkpoint.load_state(adapted, None, config, device_mesh).params
        frozen = weights.load_frozen(adapted, config, device_mesh, np.float32)
        model = merge(split(abstract_model(config.model, config.compute))[0], lora.combine(adapters, frozen))
        unmerged = np.asarray(model(tokens))
        base = merge(split(abstract_model(lora.plain(config.model), config.compute))[0], frozen)
        assert np.abs(np.asarray(base(tokens)) - unmerged).max() > 1e-2  # the adapters change the model
    loaded = llada_jax.load(adapted)[0]
    assert config.model.lora.rank == 4 and loaded.config == lora.plain(config.model)
    # The merged matrices are rounded, and the adapters on their own add a sum to each sum of the model.
    rounding.assert_close(logits_of(adapted), unmerged, 2 * rounding.of_logits(config.model, 24))


def test_interrupted_without_its_source_and_resumed_it_is_the_same(run, adapted, source, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(source, tmp_path / "aside")
    with when_done(7, terminate):
        assert run(folder, init_from=str(source), **SETTINGS) == entry_point.PREEMPTED
    shutil.rmtree(source)
    try:
        assert run(folder, init_from=str(source), **SETTINGS) == 0
    finally:
        shutil.copytree(tmp_path / "aside", source)
    assert_same_run(folder, adapted)
    assert same(base_of(folder), base_of(adapted))


@pytest.mark.slow
def test_resumed_on_another_mesh(run, adapted, copy_of_adapted, source):
    shutil.rmtree(copy_of_adapted / "checkpoints" / "10")
    settings = {"mesh__fsdp": 2, "mesh__tensor": 2, "accumulation": 2, "init_from": str(source)}
    assert run(copy_of_adapted, 4, **SETTINGS, **settings) == 0
    for ours, theirs in zip(tiny.records(copy_of_adapted), tiny.records(adapted), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=rounding.LATER_STEPS)
    # Not the largest difference: a parameter whose gradient is nearly zero may take a step the other way.
    ours, theirs = logits_of(copy_of_adapted), logits_of(adapted)
    rounding.assert_within(rounding.size(ours - theirs), 0, rounding.LATER_STEPS * rounding.size(theirs))


def test_killed_while_the_weights_are_written_nothing_is_lost(run, adapted, source, tmp_path, monkeypatch):
    """The next start writes frozen/ anew, whether the kill left a part of it or all of it with other weights."""
    save = weights.save_weights

    def dies(folder, step, params, record):
        save(folder, step, jax.tree.map(lambda x: x + 1, params), record)
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_weights", dies)
        with pytest.raises(KeyboardInterrupt):
            run(folder, init_from=str(source), **SETTINGS)
    assert workdir.steps_in(folder) == [] and (folder / "frozen").exists()
    assert run(folder, init_from=str(source), **SETTINGS) == 0
    assert_same_run(folder, adapted)
    assert same(base_of(folder), base_of(adapted))
    with pytest.raises(UserError, match="config.model.lora.rank is 0, but .* was trained with 4"):
        run(folder, init_from=str(source), **(SETTINGS | {"model__lora__rank": 0}))


def test_what_is_not_ours_stays(run, prepared, source, tmp_path):
    """A folder frozen/ that holds something else is left alone by runs with and without adapters."""
    other = tmp_path / "run" / "frozen"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="frozen is where the weights go .* holds something else"):
        run(tmp_path / "run", init_from=str(source), **SETTINGS)
    assert run(tmp_path / "run", init_from=str(source), init_weights_only=True, steps=1) == 0
    assert (other / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_branches_and_further_runs(run, adapted, tmp_path):
    """A branch continues with the same adapters.

    With init_weights_only, a run takes the merged model as its weights and adds new adapters.
    """
    branch = tmp_path / "branch"
    assert run(branch, init_from=str(adapted), init_step=5, **SETTINGS) == 0
    assert same(state_of(branch), state_of(adapted)) and same(base_of(branch), base_of(adapted))
    assert run(tmp_path / "again", init_from=str(adapted), init_weights_only=True, **STILL) == 0
    np.testing.assert_array_equal(logits_of(tmp_path / "again"), logits_of(adapted))
    assert not same(base_of(tmp_path / "again"), base_of(adapted))
    with pytest.raises(UserError, match="lora.rank is 0, but .* was trained with 4: set --config.init_weights_only"):
        run(tmp_path / "no", init_from=str(adapted))


def test_through_the_published_format_and_orbax(run, adapted, tmp_path):
    """The exported model is an ordinary model without adapters.

    A run can adapt it again, from the published folder and from weights in our own format.
    """
    convert(adapted, tmp_path / "published", "huggingface")
    convert(adapted, tmp_path / "weights", "orbax")
    assert "lora" not in json.loads((tmp_path / "published" / "config.json").read_text())
    for name in ("published", "weights"):
        np.testing.assert_array_equal(logits_of(tmp_path / name), logits_of(adapted))
        assert run(tmp_path / f"from_{name}", init_from=str(tmp_path / name), **STILL) == 0
        np.testing.assert_array_equal(logits_of(tmp_path / f"from_{name}"), logits_of(adapted))
    convert(tmp_path / "from_published", tmp_path / "back", "huggingface")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("back", "published"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_damaged_or_missing_base_is_told_in_one_line(run, copy_of_adapted, source):
    (record,) = (copy_of_adapted / "frozen").glob("checkpoints/0/run/metadata")
    content = json.loads(record.read_text())
    content["fingerprint"]["params/blocks/q_proj"] ^= 1
    record.write_text(json.dumps(content))
    settings = SETTINGS | {"init_from": str(source), "steps": 12}
    for use in (lambda: run(copy_of_adapted, **settings), lambda: llada_jax.load(copy_of_adapted)):
        with pytest.raises(UserError, match="frozen cannot be restored: the content of .*q_proj is not") as found:
            use()
        assert "\n" not in str(found.value)
    shutil.rmtree(copy_of_adapted / "frozen")
    for use in (lambda: run(copy_of_adapted, **settings), lambda: llada_jax.load(copy_of_adapted)):
        with pytest.raises(UserError, match="frozen is missing: the checkpoints of .* hold adapters alone") as found:
            use()
        assert "\n" not in str(found.value)
