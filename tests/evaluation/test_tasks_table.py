"""Tests what benchmarks/tasks_table.py makes of the lines of benchmarks/tasks.py."""

import json
import sys

import pytest
from experiments import imported


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'llada_jax[plots]'")
    return imported("tasks_table")


SCHEDULE = {"commit": "schedule", "steps": 24, "block_length": 24, "cache": "none"}
THRESHOLD = {"commit": "threshold", "block_length": 8, "cache": "dual", "length": "append"}


def line(varied, task, batch, correct, passes, seconds):
    work = {"problems": 100, "correct": correct, "right": 0.9, "tokens": 2400, "passes": passes}
    return varied | {"task": task, "batch": batch, "gen_length": 24, "seconds": seconds, "cpu_seconds": 9.0} | work


LINES = [
    line(SCHEDULE, task, batch, correct, 2400, seconds)
    for task, correct in (("add", 50), ("sort", 90))
    for batch, seconds in enumerate((4.0, 8.0, 100.0))
]
LINES += [line(SCHEDULE | {"cache": "dual"}, task, 0, 80, 2400, 2.0) for task in ("add", "sort")]
LINES += [line(THRESHOLD, task, 0, 100, 400, 1.0) for task in ("add", "sort")]


def printed(table, monkeypatch, capsys, tmp_path, *flags):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))
    monkeypatch.setattr(sys, "argv", ["tasks_table.py", f"--input={tmp_path / 'lines.jsonl'}", *flags])
    table.main()
    return capsys.readouterr().out.splitlines()[2:]


def test_a_row_for_each_setting(table, monkeypatch, capsys, tmp_path):
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    for picture in pictures:
        rows = printed(table, monkeypatch, capsys, tmp_path, f"--output={picture}")
    # The speed is a ratio of medians over the batches: 300 tokens per second are the exact sampler's.
    assert rows == [
        "| schedule, 1 per step | none | 24 | 50.0 % (44.4 to 55.6) | 90 % | 1.00 | 1.00 "
        "| 90.0 % (86.1 to 92.9) | 90 % | 1.00 | 1.00 |",
        "| schedule, 1 per step | dual | 24 | 80.0 % (71.1 to 86.7) | 90 % | 1.00 | 4.00 "
        "| 80.0 % (71.1 to 86.7) | 90 % | 1.00 | 4.00 |",
        "| threshold, append | dual | 8 | 100.0 % (96.3 to 100.0) | 90 % | 6.00 | 8.00 "
        "| 100.0 % (96.3 to 100.0) | 90 % | 6.00 | 8.00 |",
    ]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_the_compact_table_has_the_caches_beside_each_other(table, monkeypatch, capsys, tmp_path):
    rows = printed(table, monkeypatch, capsys, tmp_path, "--compact", "--clock=cpu_seconds")
    assert rows == [
        "| schedule, 1 per step | 24 | 1.0, 1.0 | 50.0, 90.0 | 1.0, 1.0 | 80.0, 80.0 | 1.0, 1.0 |",
        "| threshold, append | 8 | 6.0, 6.0 |  |  | 100.0, 100.0 | 1.0, 1.0 |",
    ]
