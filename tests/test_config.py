"""Tests the config tree: its JSON round trip, the names of settings, differences, and the files under configs/."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from llada_jax import config as configs
from llada_jax.config import Config, ModelConfig, SamplerConfig
from llada_jax.training.config_check import validate
from llada_jax.training.optimizer import schedule_points

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def load(path: Path) -> Config:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def unusual() -> Config:
    """Returns a config in which nearly every group differs from its default."""
    c = Config(seed=7, steps=123, init_step=None, report=True)
    c.model = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, mask_id=9, vocab_size=128, tied_embeddings=True)
    c.compute.remat = "dots"
    c.diffusion.eps = 0.01
    c.data.weights = (0.25, 0.75)
    c.data.path = "a,b"
    c.mesh.tensor = 2
    c.optimizer.schedule = ((0, 0.0), (10, 1.0), (0.5, 1.0), (0.5, 0.25), (1.0, 0.0))
    c.checkpoint.keep = 1
    c.validation.samples = 3
    c.logging.buckets = 4
    c.sampling.prompts = ("a", "b [MASK]")
    c.profile.steps = 2
    return c


def test_round_trip_through_json():
    config = unusual()
    back = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    assert back == config
    # The types of positions must survive: 1 and 1.0 are equal in Python, but in a schedule 1 is a step, 1.0 a fraction.
    assert [type(p) for p, _ in back.optimizer.schedule] == [int, int, float, float, float]
    assert schedule_points(back.optimizer, 100) == schedule_points(config.optimizer, 100)
    assert isinstance(back.data.weights, tuple) and isinstance(back.sampling.prompts, tuple)
    hash(back.model), hash(back.compute)  # static data of jitted functions
    validate(back)


def test_from_dict_fills_in_defaults_of_older_records():
    assert configs.from_dict({"steps": 5, "model": {"layers": 3}}) == Config(steps=5, model=ModelConfig(layers=3))


@pytest.mark.parametrize("record", [{"stepz": 1}, {"model": {"layer": 1}}, {"model": {"layers": 1}, "a": {}}])
def test_from_dict_refuses_an_unknown_key(record):
    with pytest.raises(TypeError, match="unknown setting '(stepz|layer|a)'"):
        configs.from_dict(record)


def test_leaves_name_every_setting_once():
    names = [name for name, _ in configs.leaves(Config())]
    assert len(names) == len(set(names))
    assert {"seed", "steps", "model.mask_id", "optimizer.schedule", "mesh.fsdp", "sampling.prompts"} <= set(names)

    def count(node):
        values = [getattr(node, field.name) for field in dataclasses.fields(node)]
        return sum(count(value) if dataclasses.is_dataclass(value) else 1 for value in values)

    assert len(names) == count(Config())


def test_differences_name_old_and_new():
    old, new = unusual(), unusual()
    assert configs.differences(old, new) == {}
    new.steps, new.optimizer.schedule, new.model.mask_id = 200, ((0, 1.0),), None
    assert configs.differences(old, new) == {
        "steps": (123, 200),
        "optimizer.schedule": (old.optimizer.schedule, ((0, 1.0),)),
        "model.mask_id": (9, None),
    }


def test_a_fraction_is_not_a_step():
    """(1.0, x) is the end of the run and (1, x) its first step, so a resumed run must notice the difference."""
    old, new = Config(), Config()
    old.optimizer.schedule, new.optimizer.schedule = ((1, 1.0),), ((1.0, 1.0),)
    assert "optimizer.schedule" in configs.differences(old, new)
    new.optimizer.schedule, new.model.rope_theta = old.optimizer.schedule, 500_000
    assert configs.differences(old, new) == {}  # but 500000 and 500000.0 are the same value


def test_configs_do_not_share_their_groups():
    one, two = Config(), Config()
    one.model.layers = 1
    assert two.model.layers == 32


def test_attributes_are_closed():
    with pytest.raises(AttributeError):
        Config().stepz = 3
    with pytest.raises(AttributeError):
        Config().model.layer = 3
    with pytest.raises(AttributeError):
        SamplerConfig().steps = 3
    assert hash(SamplerConfig(steps=3)) != hash(SamplerConfig(steps=4))


def test_head_width():
    assert ModelConfig(width=96, heads=4).head_width == 24


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_file_is_valid(path):
    config = load(path)
    validate(config)
    points = schedule_points(config.optimizer, config.steps)
    assert points[-1][0] <= config.steps
    assert load(path) == config and load(path) is not config
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(config)))) == config


def test_there_are_config_files():
    assert "quickstart" in {path.stem for path in FILES}
