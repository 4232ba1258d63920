"""Tests that config.minutes decides the number of steps once, from what the parts of a run take by a clock."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import tiny
from runs import assert_same_run

from llada_jax import train
from llada_jax.cli import entry_point
from llada_jax.config import Config, UserError
from llada_jax.training import config_check, minutes
from llada_jax.training.minutes import Costs

SCHEDULE = ((0, 0.0), (0.2, 1.0), (1.0, 0.1))
ONE_MINUTE = {"minutes": 1.0, "optimizer__schedule": SCHEDULE}


@pytest.fixture
def ticking(monkeypatch):
    """Makes every look at the clock take one second."""
    ticks = itertools.count()
    monkeypatch.setattr(minutes, "now", lambda: float(next(ticks)))


def steps_of(folder) -> int:
    return json.loads((folder / "config.json").read_text())["config"]["steps"]


def test_decided_once_and_kept(run, ticking, monkeypatch, tmp_path, capsys):
    """A run of one minute by a fake clock, the same number of steps given as config.steps, and a resume.

    By the clock, everything that is timed takes 1 s. The clock is read once at the start, twice for each of:
    making the state, validation, the samples, a checkpoint, and 2 + 5 steps; and once for the decision. Making the
    state once more takes 1 s. So 60 - 24 s are left. Then n steps take 1 + n s, and 1 s for each validation (every 7
    steps), sample (9) and checkpoint (5), of which one each is at the end. For n = 23 these are 24 + 4 + 3 + 5 s, and
    for n = 24 a second more.
    """
    (tmp_path / "run" / "trial").mkdir(parents=True)  # a user's folder
    (tmp_path / "run" / "trial" / "notes").touch()
    (tmp_path / "run" / ".trial-killed").mkdir()
    assert run(tmp_path / "run", **ONE_MINUTE) == entry_point.FINISHED
    assert "config.minutes=1: 23 steps of 1 s, after 24 s before the first; 12 s are for" in capsys.readouterr().err
    assert steps_of(tmp_path / "run") == 23 and not [*(tmp_path / "run").glob(".trial*")]
    assert (tmp_path / "run" / "trial" / "notes").exists()

    assert run(tmp_path / "steps", steps=23, optimizer__schedule=SCHEDULE) == entry_point.FINISHED
    assert_same_run(tmp_path / "run", tmp_path / "steps")

    monkeypatch.setattr(minutes, "measure", lambda *_: pytest.fail("the number was decided before"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "23")
    assert run(tmp_path / "run", **ONE_MINUTE) == entry_point.FINISHED
    assert_same_run(tmp_path / "run", tmp_path / "steps")

    with pytest.raises(UserError, match=r"^config\.minutes is 2, but .* started with minutes=1, and has 23 steps: set"):
        run(tmp_path / "run", **ONE_MINUTE | {"minutes": 2.0})
    with pytest.raises(UserError, match=r"^config\.minutes is 1, but .* started with steps=23, and has 23 steps: set"):
        run(tmp_path / "steps", **ONE_MINUTE)
    with pytest.raises(UserError, match=r"^config\.minutes=1 counts steps from 0, .* or --config\.init_weights_only$"):
        run(tmp_path / "branch", init_from=str(tmp_path / "run"), **ONE_MINUTE)


def test_most_steps():
    """The number is the largest that fits, as found by trying all numbers."""
    pick = random.Random(0)
    for _ in range(200):
        config = Config()
        for section in (config.validation, config.sampling):
            section.every = pick.choice((0, 1, 3, 10))
        config.checkpoint.every = pick.choice((1, 4, 50))
        costs = Costs(*(pick.choice((0.0, 0.3, 2.0)) for _ in range(5)))
        costs = Costs(costs.compilation, pick.choice((0.1, 1.0)), costs.validation, costs.samples, costs.save)
        seconds = pick.uniform(0, 30)
        fitting = [n for n in range(1, 400) if costs.of_run(config, n) <= seconds]
        assert minutes.most_steps(config, costs, seconds) == max(fitting, default=0)


def test_what_is_due_at_the_last_step_is_counted_once():
    """The formula of `Costs` is compared with the loop's own rule, step by step."""
    config = Config()
    config.validation.every, config.sampling.every, config.checkpoint.every = 4, 0, 3
    for steps in range(1, 30):
        due = [sum(s % every == 0 if every else False for s in range(1, steps)) + 1 for every in (4, 0, 3)]
        assert np.dot(due, (1.0, 10.0, 100.0)) == Costs(0, 0, 1.0, 10.0, 100.0).between_steps(config, steps)


def test_the_first_process_decides(monkeypatch):
    monkeypatch.setattr(minutes.distributed, "first_decides", lambda what, decide: 7)
    assert minutes.decide(Config(minutes=1), 40.0, Costs(1.0, 1.0)) == 7


def test_no_time_for_a_step():
    with pytest.raises(UserError, match=r"^config\.minutes=1 is too short: 55 s are gone, and .* take 14 s more; set"):
        minutes.decide(Config(minutes=1), 5.0, Costs(3.0, 1.0, 2.0, 4.0, 4.0))


def test_schedules_need_fractions():
    config = tiny.get_config()
    config.data.input, config.minutes = "stdlib", 2
    with pytest.raises(
        UserError, match=r"^config\.optimizer\.schedule=.* counts steps \(position 4\), but config\.min"
    ):
        config_check.validate(config)
    config.optimizer.schedule = SCHEDULE
    config_check.validate(config)


def test_steps_on_the_command_line():
    """They take the place of minutes in the config file; both on the command line contradict each other."""
    config = Config(minutes=5, steps=30)
    train._choose_length(config, {"minutes": 5})
    assert config.minutes == 5
    with pytest.raises(UserError, match=r"^--config\.steps=30 and --config\.minutes=5 both set the length of the run"):
        train._choose_length(config, {"minutes": 5, "steps": 30})
    train._choose_length(config, {"steps": 30})
    assert config.minutes == 0 and config.steps == 30
