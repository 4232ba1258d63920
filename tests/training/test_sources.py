"""Tests what a run can start from, and what may change when a run is resumed."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from runs import state_of, terminate, when_done

from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.data.prepare.prepare_text import prepare
from llada_jax.formats import workdir
from llada_jax.formats.conversion import convert

# Branches


def test_a_branch_goes_on_where_its_parent_was(run, reference, tmp_path):
    folder = tmp_path / "branch"
    assert run(folder, init_from=str(reference), init_step=10, checkpoint__keep=5) == 0
    ours = {record["step"]: record for record in tiny.records(folder)}
    theirs = {record["step"]: record for record in tiny.records(reference)}
    assert ours.keys() == {12, 14, 15, 18, 20}
    for step in (14, 15, 18, 20):  # the line of step 12 covers only the steps since the branch
        assert ours[step] == theirs[step]
    assert state_of(folder).keys() == state_of(reference).keys()
    assert all(value.tobytes() == state_of(reference)[name].tobytes() for name, value in state_of(folder).items())


def test_a_branch_may_have_another_learning_rate_and_more_steps(run, reference, tmp_path, capfd):
    folder = tmp_path / "branch"
    settings = {"init_from": str(reference), "init_step": 15, "steps": 24}
    settings |= {"optimizer__peak_learning_rate": 1e-4, "optimizer__schedule": ((0, 1.0), (24, 0.0))}
    with when_done(19, terminate):
        assert run(folder, **settings) == entry_point.PREEMPTED
    errors = capfd.readouterr().err
    assert f"branching from {reference} at step 15" in errors and "  config.steps: 20 -> 24\n" in errors
    assert "  the learning rate of step 16 changes from 9.75e-04 to 3.33e-05; " in errors
    assert "config.init_from" not in errors
    shutil.rmtree(folder / "checkpoints" / "15", ignore_errors=True)
    assert run(folder, **settings) == 0  # resumes from its own checkpoint instead of branching again
    assert f"resuming {folder} at step 19" in capfd.readouterr().err
    rates = {r["step"]: r["learning_rate"] for r in tiny.records(folder) if "learning_rate" in r}
    assert rates == pytest.approx({18: 1e-4 * 6 / 24, 21: 1e-4 * 3 / 24, 24: 0.0})
    with pytest.raises(UserError, match="config.init_step is 10, but .* was started with 15"):
        run(folder, **{**settings, "init_step": 10})


def test_weights_only(run, reference, tmp_path):
    folder = tmp_path / "run"
    settings = {"init_from": str(reference), "init_weights_only": True, "seed": 5, "optimizer__peak_learning_rate": 0.0}
    settings["compute__dtype"] = "bfloat16"  # the weights that are trained stay fp32
    assert run(folder, steps=2, batch_size=4, **settings) == 0
    ours, theirs = state_of(folder), state_of(reference)
    assert ours[".step"] == 2
    for name, value in ours.items():
        if name.startswith(".params"):
            assert value.tobytes() == theirs[name].tobytes()


def publish(source: Path, target: Path, **changes) -> None:
    """Writes the model of a workdir as a published folder, and then changes fields of its config.json."""
    convert(source, target, "huggingface")
    fields = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(fields))


def test_a_published_folder(run, reference, tmp_path, capfd):
    publish(reference, tmp_path / "published")
    settings = {"init_from": str(tmp_path / "published"), "optimizer__peak_learning_rate": 0.0, "steps": 1}
    assert run(tmp_path / "run", 2, **settings) == 0  # as in test_weights_alone, which shares the compiled programs
    assert f"starting from the weights of {tmp_path / 'published'}" in capfd.readouterr().err
    ours, theirs = state_of(tmp_path / "run"), state_of(reference)
    for name, value in ours.items():
        if name.startswith(".params"):
            assert value.tobytes() == theirs[name].tobytes(), name


def test_what_is_tuned_from_a_published_folder_keeps_what_is_its_own(run, reference, tmp_path):
    """Exporting gives back the folder's own config fields, code and licence.

    This holds for a run that starts from the folder, for a run that starts from that run, and for weights in our own
    format.
    """
    own = {"something": [1], "max_sequence_length": 64, "auto_map": {"AutoModel": "code.Model"}, "pad_token_id": 5}
    publish(reference, tmp_path / "published", **own)
    fields = json.loads((tmp_path / "published" / "config.json").read_text())
    (tmp_path / "published" / "code.py").write_text("pass")
    (tmp_path / "published" / "additional").mkdir()
    (tmp_path / "published" / "additional" / "LICENSE").write_text("MIT")
    assert run(tmp_path / "run", init_from=str(tmp_path / "published"), steps=1) == 0
    assert run(tmp_path / "again", init_from=str(tmp_path / "run"), init_weights_only=True, steps=1) == 0
    convert(tmp_path / "again", tmp_path / "ours", "orbax")
    for i, source in enumerate(("run", "again", "ours")):
        out = tmp_path / f"out_{i}"
        convert(tmp_path / source, out, "huggingface")
        assert json.loads((out / "config.json").read_text()) == fields, source
        assert (out / "code.py").read_text() == "pass" and (out / "additional" / "LICENSE").read_text() == "MIT"
        assert (out / "tokenizer.model").read_bytes() == (reference / "tokenizer" / "tokenizer.model").read_bytes()
    short = fields | {"max_sequence_length": 16}
    (tmp_path / "run" / "published" / "config.json").write_text(json.dumps(short))
    convert(tmp_path / "run", tmp_path / "longer", "huggingface")
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["max_sequence_length"] == 32


def test_weights_alone(run, reference, tmp_path, capfd):
    """Weights in our own format, as `convert` writes them: a run can start from them, but cannot be resumed there."""
    weights = tmp_path / "weights"
    convert(reference, weights, "orbax", step=10)
    settings = {"optimizer__peak_learning_rate": 0.0, "steps": 1}
    assert run(tmp_path / "run", 2, init_from=str(weights), **settings) == 0
    convert(tmp_path / "run", tmp_path / "back", "orbax")
    assert f"starting from the weights of {weights} at step 10" in capfd.readouterr().err
    ours, theirs = state_of(tmp_path / "run"), state_of(reference, 10)
    for name, value in ours.items():
        if name.startswith(".params"):
            assert value.tobytes() == theirs[name].tobytes(), name
    with pytest.raises(UserError, match="holds only weights, not a run that can be resumed: take another --workdir"):
        run(weights)
    assert workdir.steps_in(weights) == [10]


def test_a_source_that_does_not_fit_is_refused_before_text_is_prepared(run, reference, corpus, tmp_path):
    publish(reference, tmp_path / "published")
    publish(reference, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 100)
    published, workdir_of = {"init_from": str(tmp_path / "published")}, {"init_from": str(reference)}
    cases = [
        ({**published, "model__layers": 3}, "config.model.layers is 3, but .* has 2: its weights do not fit"),
        ({**published, "model__tied_embeddings": True}, "config.model.tied_embeddings is True, but .* has False"),
        ({"init_from": str(tmp_path / "damaged")}, "model.safetensors is truncated"),
        ({**workdir_of, "model__layers": 3}, "config.model.layers is 3, but .* was trained with 2"),
        ({**workdir_of, "seed": 1}, "config.seed is 1"),
        ({**workdir_of, "init_weights_only": True, "model__kv_heads": 2}, "config.model.kv_heads is 2, but .* has 4"),
    ]
    for i, (settings, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            run(tmp_path / f"run_{i}", data__path="", data__input=corpus, **settings)
        assert not (tmp_path / f"run_{i}" / "data").exists()


def test_another_tokenizer_than_the_weights_know(run, reference, tmp_path, corpus):
    publish(reference, tmp_path / "published")
    prepare([corpus], tmp_path / "other", train_tokenizer=316, sequence_length=32, workers=1, progress=False)
    settings = {"data__path": str(tmp_path / "other"), "init_from": str(tmp_path / "published")}
    ids = workdir.read_config(reference)[0].model
    assert ids.vocab_size == 384
    with pytest.raises(UserError, match="the tokenizer differs from that of"):
        run(tmp_path / "run", model__vocab_size=384, **settings)


def test_sources_that_do_not_fit(run, reference, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    publish(reference, tmp_path / "published", mask_token_id=7)
    cases = [
        ({"init_from": str(tmp_path / "nowhere")}, "config.init_from=.*nowhere is not a folder"),
        ({"init_from": str(tmp_path)}, "config.init_from=.* has no model: it has neither checkpoints/"),
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
        ({"init_from": str(tmp_path / "published"), "init_step": 3}, "is a published folder and has no steps"),
    ]
    for i, (settings, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            run(tmp_path / f"run_{i}", **settings)
        assert workdir.steps_in(tmp_path / f"run_{i}") == []


# Changes that a resume refuses and allows


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": 1}, "config.seed is 1, but .* was trained with 0"),
        ({"batch_size": 16}, "config.batch_size is 16, but .* was trained with 8"),
        ({"model__layers": 3}, "config.model.layers is 3, but .* was trained with 2"),
        ({"model__kv_heads": 2}, "config.model.kv_heads is 2, but .* was trained with 4"),
        ({"model__tied_embeddings": True}, "config.model.tied_embeddings is True"),
        ({"diffusion__t_sampling": "independent"}, "config.diffusion.t_sampling is independent"),
        ({"optimizer__state_dtype": "bfloat16"}, "config.optimizer.state_dtype is bfloat16"),
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
    assert "  the learning rate of step 11 changes from 1.82e-03 to 5.00e-04; the weight decay of this step" in errors
    assert workdir.steps_in(folder) == [16]
    written = tiny.records(folder)
    assert [record["step"] for record in written if record["step"] > 10] == [12, 14, 15, 16]
    assert written[-1]["learning_rate"] == pytest.approx(5e-4)
    assert workdir.read_config(folder)[0].steps == 16
