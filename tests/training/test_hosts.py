"""Tests that the host that keeps the others waiting is named, once."""

import pytest

from llada_jax.devices import distributed
from llada_jax.training import hosts
from llada_jax.training.hosts import Hosts


@pytest.fixture
def others(monkeypatch):
    """Returns a dict with the figures of all processes but process 0, which the test runs in."""
    found = {i: {"host": f"host{i}", "data": 0.001, "idle": 0.002} for i in range(1, 4)}
    monkeypatch.setattr(distributed, "published", lambda what: {0: mine["it"], **found})
    monkeypatch.setattr(distributed, "publish", lambda what, value: mine.update(it=value))
    mine = {}
    return found


def test_one_process_has_only_its_own_wait():
    watch = Hosts()
    for data in (0.1, 0.3):
        watch.add(data, idle=0.5)
    assert watch.look(1.0) == ({"hosts/data_seconds_max": pytest.approx(0.2)}, None)
    assert watch.look(1.0)[0] == {"hosts/data_seconds_max": 0}  # it counts from the last log line on


def test_the_slowest_host_is_named_once(others):
    watch = Hosts()

    def look(late):
        others[2] |= {"data": late - 0.01, "idle": late}
        watch.add(0.001, 0.002)
        return watch.look(1.0)

    assert look(0.05)[1] is None  # a small part of the step
    assert look(0.4)[1] is None  # once is chance
    values, line = look(0.3)
    assert line.startswith(
        "process 2 (host2) keeps the others waiting: it is late by 0.3 s of a step of 1 s, 0.29 s of "
    )
    assert line.endswith("waiting for data; the others by 0.002 s")
    assert values == {
        "hosts/data_seconds_max": pytest.approx(0.29), "hosts/data_seconds_median": pytest.approx(0.001),
        "hosts/slowest": 2, "hosts/idle_seconds_max": 0.3, "hosts/idle_seconds_median_of_others": 0.002,
    }  # fmt: skip
    assert look(0.4)[1] is None  # it has been told
    assert look(0.05)[1] is None and look(0.4)[1] is None and look(0.4)[1]  # it was better in between
    others[1] |= {"idle": 0.9}
    assert look(0.4)[1] is None and "process 1 (host1)" in look(0.4)[1]


def test_all_are_late_alike(others):
    for one in others.values():
        one.update(data=0.5, idle=0.5)
    watch = Hosts()
    for _ in range(3):
        watch.add(0.4, 0.5)
        assert watch.look(1.0)[1] is None


def test_a_figure_is_published_for_the_process(monkeypatch):
    monkeypatch.setattr(hosts.platform, "node", lambda: "here")
    watch = Hosts()
    watch.add(1.0, 2.0)
    watch.look(5.0)
    assert distributed.published("hosts") == {0: {"host": "here", "data": 1.0, "idle": 2.0}}
