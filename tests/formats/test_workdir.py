"""Tests how the config.json of a training workdir is written and read."""

import pytest

from llada_jax.config import Config, UserError
from llada_jax.formats import workdir

IDENTITY = {"data": ["a1"], "weights": [], "tokenizer": "t1"}


def test_config_round_trip(tmp_path):
    config = Config(steps=7)
    config.optimizer.schedule = ((0, 0.0), (0.5, 1.0))
    workdir.write_config(tmp_path, config, IDENTITY)
    assert workdir.read_config(tmp_path) == (config, IDENTITY)
    workdir.write_config(tmp_path, Config(), IDENTITY)  # replaces the old file
    assert workdir.read_config(tmp_path) == (Config(), IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_config_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match="is not a training workdir"):
        workdir.read_config(tmp_path)
    for text in ("{", "[]", "{}", '{"config": {"stepz": 1}, "identity": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is damaged") as caught:
            workdir.read_config(tmp_path)
        assert "\n" not in str(caught.value)
