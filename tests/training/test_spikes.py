"""Tests which steps count as spikes, and what is said of them."""

import json
import math
import shlex

import numpy as np
import tiny

from llada_jax.config import Config
from llada_jax.data.sets import open_training
from llada_jax.training import loop, spikes
from llada_jax.training.spikes import HISTORY, LEAST, QUIET, Spikes


def values(loss=2.0, grad_norm=1.0, skipped=0):
    return {"loss": np.float32(loss), "grad_norm": np.float32(grad_norm), "skipped": np.int32(skipped)}


def told(watch, steps, **options):
    return [step for step in steps if watch.look(step, values(**options))]


def test_far_above_the_steps_before(rng):
    watch = Spikes()
    for step in range(1, 200):  # a curve with the usual noise has no spike
        assert watch.look(step, values(2 + rng.normal(0, 0.2), rng.lognormal(0, 0.3))) is None
    assert told(watch, [200], loss=3.5, grad_norm=3.5) == []
    found = watch.look(201, values(grad_norm=40))
    assert found["spike/text"].startswith("step 201: the gradient norm is 40, ") and found["spike/times"] > 30
    assert found["spike/text"].endswith(f"{HISTORY} steps before ({40 / found['spike/times']:.4g})")
    wild = [values(loss=90 if step % 10 == 1 else 2) for step in range(202, 202 + QUIET)]
    assert [i for i, one in enumerate(wild, 202) if watch.look(i, one)] == [201 + QUIET]  # at most one in QUIET steps
    assert all(len(watch.sums[name]) == HISTORY for name in ("loss", "grad_norm"))


def test_a_noisy_curve_needs_more(rng):
    """Values that are often several times their median are the usual ones of this run."""
    watch = Spikes()
    usual = [float(x) for x in rng.choice([0.2, 1.0, 1.8, 5.0], 100, p=[0.3, 0.2, 0.3, 0.2])]
    assert [step for step, x in enumerate(usual) if watch.look(step, values(grad_norm=x))] == []
    assert watch.look(500, values(grad_norm=5)) is None and watch.look(501, values(grad_norm=80))


def test_a_few_wild_values_do_not_hide_the_next(rng):
    watch = Spikes()
    assert told(watch, range(LEAST), loss=2 + rng.normal(0, 0.1)) == []
    assert told(watch, [100], loss=1e6) == [100] and told(watch, [101 + QUIET], loss=1e3) == [101 + QUIET]


def test_it_needs_steps_to_compare_with():
    watch = Spikes()
    assert told(watch, range(LEAST - 1)) == [] and told(watch, [LEAST - 1], loss=99) == []
    assert told(watch, [LEAST], loss=99) == [LEAST]


def test_a_step_that_is_not_finite():
    watch = Spikes()
    found = watch.look(3, values(math.nan, math.inf, skipped=1))
    assert found == {"spike/text": "step 3: the loss or the gradients are not finite; the step is skipped"}
    assert watch.sums["loss"] == []  # it does not count among the steps that later ones are compared with


def test_a_resumed_run_says_the_same(rng):
    whole = Spikes()
    steps = [values(2, rng.lognormal(0, 0.2)) for _ in range(60)] + [values(2, 99), *[values()] * 9, values(99)]
    for step, one in enumerate(steps[:50]):
        whole.look(step, one)
    other = Spikes(json.loads(json.dumps(whole.sums)))
    for step, one in enumerate(steps[50:], 50):
        assert whole.look(step, one) == other.look(step, one)
    assert whole.sums == other.sums and whole.sums["told"] == 60


def test_the_command_branches_before_the_spike(tmp_path):
    config = Config(steps=70, minutes=5)
    argv = [
        "/x/llada_jax/train.py",
        "--config=c.py",
        "--workdir",
        "runs/a b",
        "--config.init_step=3",
        "--config.seed=5",
    ]
    words = shlex.split(spikes.command(config, tmp_path / "a b", 60, 64, argv))
    assert words[:5] == ["python", "-m", "llada_jax.train", "--config=c.py", "--config.seed=5"]
    assert words[5:] == [
        f"--workdir={tmp_path / 'a b'}-before-64", f"--config.init_from={tmp_path / 'a b'}", "--config.init_step=60",
        "--config.optimizer.peak_learning_rate=0.0002", "--config.minutes=0", "--config.steps=70",
    ]  # fmt: skip


def test_a_planted_spike_is_told_with_its_rows(run, prepared, tmp_path, capfd, monkeypatch):
    read, seen = loop.metrics.fetch, []

    def planted(found):
        got = read(found)
        seen.append(float(got["grad_norm"]))
        return got | {"grad_norm": np.float32(500)} if len(seen) == 13 else got

    monkeypatch.setattr(loop.metrics, "fetch", planted)
    monkeypatch.setattr(spikes, "LEAST", 8)
    assert run(tmp_path / "run", validation__rows=0, sampling__prompts=()) == 0
    (line,) = [one for one in capfd.readouterr().err.splitlines() if "gradient norm" in one]
    assert line.startswith(
        f"step 13: the gradient norm is 500, {500 / np.median(seen[:12]):.1f} times the median of the "
    )
    assert "--config.init_step=10" in line and f"{prepared}/train-" in line
    (record,) = [one for one in tiny.records(tmp_path / "run") if "spike/rows" in one]
    assert record["step"] == 13
    config = tiny.get_config()
    config.model.vocab_size = 384
    assert record["spike/rows"] == open_training(config, [prepared]).origins(12)  # the 13th step
