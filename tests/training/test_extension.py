"""Tests what a run that continues with other settings says about its learning rate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.config import Config, OptimizerConfig
from llada_jax.training.extension import effects
from llada_jax.training.optimizer import make_schedule, rate_at


def run(steps: int, schedule, peak: float = 2e-3, decay: float = 0.1) -> Config:
    config = Config(steps=steps)
    config.optimizer = OptimizerConfig(schedule=schedule, peak_learning_rate=peak, weight_decay=decay)
    return config


FRACTIONS = ((0, 0.0), (0.2, 1.0), (0.9, 1.0), (1.0, 0.15))
STEPS = ((0, 0.0), (4, 1.0), (18, 1.0), (20, 0.15))


def test_a_jump_is_told_and_how_to_avoid_it():
    (line,) = effects(run(20, FRACTIONS), run(40, FRACTIONS), 20)
    assert line.startswith("the learning rate of step 21 changes from 3.00e-04 to 2.00e-03; ")
    assert "config.optimizer.weight_decay) changes from 3.00e-05 to 2.00e-04; " in line
    assert "--config.optimizer.schedule='((0, 0), (4, 1), (18, 1), (20, 0.15))'" in line and "\n" not in line
    # The schedule that the line proposes keeps the rate.
    assert rate_at(run(40, ((0, 0), (4, 1), (18, 1), (20, 0.15))).optimizer, 40, 20) == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("now", "step", "words"),
    [
        (run(40, STEPS), 20, ["step 21 stays 3.00e-04", "stays 3.00e-05"]),
        (run(20, STEPS, peak=1e-3), 10, ["step 11 changes from 2.00e-03 to 1.00e-03"]),
        (run(20, STEPS, decay=0.2), 10, ["step 11 stays 2.00e-03", "changes from 2.00e-04 to 4.00e-04"]),
        (run(12, FRACTIONS), 10, ["step 11 changes from 2.00e-03 to 1.72e-03"]),
        (run(20, ((0, 0.0), (4, 1.0), (10, 0.0))), 12, ["to 0.00e+00", "learning rate is 0 from step 13 to step 20"]),
    ],
)  # fmt: skip
def test_what_a_change_does(now, step, words):
    text = " | ".join(effects(run(20, STEPS), now, step))
    assert all(word in text for word in words), text


def test_nothing_is_said_without_a_change_or_without_further_steps():
    assert effects(run(20, STEPS), run(20, STEPS), 5) == []
    assert effects(run(20, STEPS), run(10, STEPS), 10) == []
    # 1 and 1.0 differ in a schedule.
    assert effects(run(20, ((0, 1.0), (1, 0.5))), run(20, ((0, 1.0), (1.0, 0.5))), 5)


points = st.lists(st.tuples(st.one_of(st.integers(0, 50), st.floats(0, 1)), st.floats(0, 2)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(points, st.integers(1, 60), st.integers(0, 70))
def test_the_rate_is_the_one_of_the_train_step(found, steps, step):
    """make_schedule computes in fp32 on the device, rate_at in double precision on the host."""
    in_steps = lambda point: point[0] * steps if isinstance(point[0], float) else point[0]  # noqa: E731
    found = sorted(found, key=in_steps)
    if any(0 < in_steps(b) - in_steps(a) < 1e-3 for a, b in zip(found, found[1:], strict=False)):
        return  # fp32 cannot tell these positions apart
    if any(0 < abs(in_steps(a) - round(in_steps(a))) < 1e-3 for a in found):
        return
    config = OptimizerConfig(schedule=tuple(found), peak_learning_rate=1.0)
    wanted = float(make_schedule(config, steps)(np.int32(step)))
    assert rate_at(config, steps, step) == pytest.approx(wanted, abs=1e-4)
