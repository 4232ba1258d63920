"""Tests how the beginning of a run is decided, and which settings must agree with its source or may differ."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import pytest
import tiny
from paths import PARITY, PYTHONPATH

from llada_jax.config import Config, LoraConfig, ModelConfig, UserError, leaves
from llada_jax.data.sets import PreparedSets
from llada_jax.formats import huggingface, workdir
from llada_jax.formats.conversion import convert
from llada_jax.training import start
from llada_jax.training.start import Kind, Start

IDENTITY = {"data": ["a1"], "weights": [], "tokenizer": "t1"}


def test_identity_is_content():
    config = Config()
    config.data.weights = (0.5, 0.5)
    manifests = [types.SimpleNamespace(sha256="a"), types.SimpleNamespace(sha256="b")]
    identity = PreparedSets(["x", "y"], manifests, types.SimpleNamespace(sha256="t"), "x/tokenizer").identity(config)
    assert identity == {"data": ["a", "b"], "weights": [0.5, 0.5], "tokenizer": "t"}
    json.dumps(identity)


def changed(name, value):
    config = Config()
    *groups, leaf = name.split(".")
    node = config
    for group in groups:
        node = getattr(node, group)
    assert getattr(node, leaf) != value
    setattr(node, leaf, value)
    return config


def check(new, identity=IDENTITY, before=IDENTITY, kind=Kind.RESUMED):
    sets = types.SimpleNamespace(identity=lambda config: identity, template_sha256=None)
    return Start(kind, "runs/old", config=Config(), identity=before).check(new, sets)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mesh.tensor", 2), ("accumulation", 2), ("optimizer.schedule", ((0, 1.0),)), ("steps", 5),
        ("logging.every", 3),
        ("optimizer.peak_learning_rate", 1e-3), ("compute.dtype", "float32"), ("checkpoint.every", 10),
        ("validation.rows", 3), ("data.path", "elsewhere/same"), ("sampling.every", 5),
    ],
)  # fmt: skip
def test_a_resume_may_change(name, value):
    before = dict(leaves(Config()))[name]
    assert check(changed(name, value)) == {name: (before, value)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1), ("batch_size", 16), ("sequence_length", 128), ("model.layers", 2), ("model.rope_theta", 1e4),
        ("model.tied_embeddings", True), ("model.mask_id", 5), ("diffusion.eps", 0.1),
        ("diffusion.t_sampling", "independent"), ("diffusion.random_length_every", 0),
        ("diffusion.loss_weight", "count"), ("diffusion.complementary", True), ("diffusion.t_range", (0.1, 0.9)),
        ("optimizer.name", "muon"),
    ],
)  # fmt: skip
def test_a_resume_may_not_change(name, value):
    shown = re.escape(str(value))
    with pytest.raises(UserError, match=rf"^config\.{name} is {shown}, but runs/old was trained with .*: take another"):
        check(changed(name, value))


@pytest.mark.parametrize("name", IDENTITY)
def test_data_and_tokenizer_stay_what_they_are(name):
    with pytest.raises(
        UserError, match=rf"^the {name} differs from that of runs/old .*: take another --workdir, or set it back$"
    ):
        check(Config(), IDENTITY | {name: ["other"]})
    with pytest.raises(UserError, match=rf"^the {name} differs"):  # an old record may lack this entry
        check(Config(), before={k: v for k, v in IDENTITY.items() if k != name})


def test_nothing_changed():
    assert check(Config()) == {}


@pytest.mark.parametrize("name", ["init_from", "init_step", "init_weights_only"])
def test_only_a_branch_may_have_another_origin(name):
    """A resumed run keeps its init_from, but the init_from of a branch necessarily differs from that of its parent."""
    value = {"init_from": "runs/x", "init_step": 3, "init_weights_only": True}[name]
    with pytest.raises(UserError, match=rf"config\.{name} is .*, but runs/old was started with"):
        check(changed(name, value))
    assert name in check(changed(name, value), kind=Kind.BRANCHED)


def test_before_there_is_data_only_settings_are_compared():
    """Without data, `check` compares the settings and takes from the source what the tokenizer would decide.

    This finds a difference before the data is prepared, which may take hours.
    """
    model = ModelConfig(vocab_size=512, mask_id=500, token_count=501)
    begin = Start(Kind.BRANCHED, "runs/old", 3, Config(model=model), IDENTITY)
    assert begin.check(Config()) == {}
    with pytest.raises(UserError, match="config.model.layers is 2, but runs/old was trained with 32: set --"):
        begin.check(Config(model=ModelConfig(layers=2)))
    weights = Start(Kind.WEIGHTS, "folder", config=Config(model=model))
    with pytest.raises(UserError, match="config.model.layers is 2, but folder has 32: its weights do not fit"):
        weights.check(Config(model=ModelConfig(layers=2)))


def test_the_architecture_of_the_source():
    found = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, feed_forward=24, vocab_size=512, mask_id=511)
    begin = Start(Kind.WEIGHTS, "folder", config=Config(model=found))
    assert begin.architecture(ModelConfig(layers=0)) == found
    lora = LoraConfig(rank=4)
    assert begin.architecture(ModelConfig(layers=0, lora=lora)) == dataclasses.replace(found, lora=lora)
    assert begin.architecture(ModelConfig(layers=3)).layers == 3  # `check` reports that it does not fit
    with pytest.raises(UserError, match="config.model.width is 32, but config.model.layers=0 takes .* of folder"):
        begin.architecture(ModelConfig(layers=0, width=32))


def init_from(folder, **settings) -> Config:
    config = tiny.get_config()
    config.init_from = str(folder)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def test_every_beginning(reference, tmp_path):
    """The files on the disk and the settings decide the kind of beginning, without reading an array."""
    assert start.decide(tiny.get_config(), tmp_path / "new").kind is Kind.NEW

    resumed = start.decide(tiny.get_config(), reference)
    assert (resumed.kind, resumed.source, resumed.step, resumed.resumes) == (Kind.RESUMED, str(reference), None, True)
    assert resumed.earlier == workdir.read_config(reference)[0] and resumed.identity["tokenizer"]

    branched = start.decide(init_from(reference, init_step=10), tmp_path / "new")
    assert (branched.kind, branched.step, branched.earlier) == (Kind.BRANCHED, 10, None)
    alone = start.decide(init_from(reference, init_weights_only=True), tmp_path / "new")
    assert (alone.kind, alone.step) == (Kind.WEIGHTS, 20)
    adapted = init_from(reference)
    adapted.model.lora.rank = 2
    assert start.decide(adapted, tmp_path / "new").kind is Kind.WEIGHTS

    convert(reference, tmp_path / "orbax", "orbax")
    written = start.decide(init_from(tmp_path / "orbax"), tmp_path / "new")
    assert (written.kind, written.step) == (Kind.WEIGHTS, 20)
    with pytest.raises(UserError, match="holds only weights, not a run that can be resumed"):
        start.decide(tiny.get_config(), tmp_path / "orbax")

    published = start.decide(init_from(PARITY / "gqa"), tmp_path / "new")
    assert (published.kind, published.step) == (Kind.WEIGHTS, None)
    assert published.config.model == huggingface.inspect(PARITY / "gqa").config
    with pytest.raises(UserError, match="config.init_step=3: .* is a published folder and has no steps"):
        start.decide(init_from(PARITY / "gqa", init_step=3), tmp_path / "new")
    with pytest.raises(UserError, match="config.init_from=.*missing is not a folder"):
        start.decide(init_from(tmp_path / "missing"), tmp_path / "new")


def test_deciding_starts_no_backend():
    """A process of several that starts a backend waits for all others, and they wait for its decision."""
    program = f"""
import sys, tiny
from pathlib import Path
from jax._src import xla_bridge
from llada_jax.training import start
config = tiny.get_config()
config.init_from = {str(PARITY / "gqa")!r}
assert start.decide(config, Path("nowhere")).config.model.vocab_size == 512
assert not xla_bridge._backends
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
