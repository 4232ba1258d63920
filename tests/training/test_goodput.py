"""Tests the account of a run's time: the kinds, what a kill leaves of them, and the steps that are done again."""

import threading

import pytest

from llada_jax.training import goodput
from llada_jax.training.goodput import Device, Stopwatch, account, latest, read_lines


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


def test_every_second_counts_as_exactly_one_kind(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput.time, "time", lambda: 1000.0)
    watch = Stopwatch(began=993.0, clock=clock)  # the process is 7 seconds old
    clock.now += 3
    watch.switch("train")
    clock.now += 5
    with pytest.raises(ValueError), watch.of("checkpoint"):
        clock.now += 2
        with watch.of("evaluate"):
            clock.now += 11
        raise ValueError
    clock.now += 20
    watch.move(4, "data")
    seconds = {"startup": 10, "compile": 0, "train": 21, "data": 4, "checkpoint": 2, "evaluate": 11}
    assert watch.seconds() == seconds and sum(seconds.values()) == 7 + 41
    watch.earlier = {"seconds": {"train": 100.0, "redone": 30.0, "down": 22.0}}
    record = watch.record()
    assert record["this_start/train"] == 21 and record["goodput/train"] == 121 and record["goodput/redone"] == 30
    assert record["goodput"] == pytest.approx(121 / 200, abs=1e-4) and "goodput/compile" not in record


def line(step, time, **seconds):
    return {"step": step, "time": time} | {f"this_start/{kind}": value for kind, value in seconds.items()}


FIRST = {"began": 100.0, "startup_seconds": 5.0, "step": 0, "earlier": {}}
RECORDS = [
    line(10, 125.0, startup=6.0, compile=4.0, train=15.0),
    {"step": 15, "validation/perplexity": 3.0},
    line(20, 140.0, startup=6.0, compile=4.0, train=27.0, checkpoint=3.0),
    line(30, 160.0, startup=6.0, compile=4.0, train=45.0, checkpoint=5.0),
]


def test_steps_beyond_the_checkpoint_are_done_again():
    """The start was killed after step 30, and goes on from the checkpoint of step 20 a minute later."""
    found = account([FIRST], RECORDS, 20, began=220.0)
    assert found["start"]["step"] == 30 and found["start"]["time"] == 160.0
    expected = {"startup": 6, "compile": 4, "train": 27, "checkpoint": 5, "redone": 18, "down": 60}
    assert {kind: value for kind, value in found["seconds"].items() if value} == expected
    assert sum(expected.values()) == 220 - 100  # all of the time since the first start began
    half = account([FIRST], RECORDS, 25, began=220.0)["seconds"]
    assert half["redone"] == pytest.approx(9) and half["train"] == pytest.approx(36)
    whole = account([FIRST], RECORDS, 0, began=220.0)["seconds"]
    assert whole["redone"] == 45 and whole["train"] == 0
    assert account([FIRST], RECORDS, 30, began=220.0)["seconds"]["redone"] == 0


def test_a_start_without_a_log_line():
    second = {"began": 220.0, "startup_seconds": 8.0, "step": 20, "earlier": account([FIRST], RECORDS, 20, 220.0)}
    kept = RECORDS[:3]  # the second start has dropped the rest, and was killed before its own first line
    found = account([FIRST, second], kept, 20, began=300.0)
    assert found["start"] == {"seconds": {"startup": 8.0}, "step": 20, "time": 228.0}
    seconds = found["seconds"]
    assert seconds["startup"] == 14 and seconds["down"] == 60 + 72 and seconds["redone"] == 18
    assert sum(seconds.values()) == pytest.approx(300 - 100)
    earlier = account([FIRST, second], kept, 10, began=300.0)["seconds"]  # the checkpoint of step 20 is damaged
    assert earlier["redone"] == 18


def test_starts_of_older_versions_have_no_account():
    assert account([], [], 0, 5.0) == {} and account([{"step": 0}], RECORDS, 20, 5.0) == {}
    assert latest(FIRST, [])["step"] == 0


def test_devices_are_idle_from_the_end_of_a_step_on(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput.time, "perf_counter", clock)

    class Value:
        def __init__(self):
            self.ready = threading.Event()

        def block_until_ready(self):
            assert self.ready.wait(30)

    device, value = Device(), Value()
    clock.now = 60.0
    assert device.idle(since=57.0) == 3  # there was no step yet
    device.follow(value)
    clock.now = 70.0
    assert device.idle(since=61.0) == 0  # it still runs
    clock.now = 72.0
    value.ready.set()
    device._end.result()
    clock.now = 80.0
    assert device.idle(since=61.0) == 8 and device.idle(since=75.0) == 5
    device.close()


def test_torn_lines_are_skipped(tmp_path):
    assert read_lines(tmp_path / "none") == []
    (tmp_path / "some").write_text('{"step": 1}\n7\n{"step": 2, "lo')
    assert read_lines(tmp_path / "some") == [{"step": 1}]
