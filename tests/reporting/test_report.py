"""Tests the report of a run: what it gathers from a workdir, its text, and its page."""

import json
import re
import subprocess
import sys

import pytest
from paths import PYTHONPATH, ROOT

from llada_jax.reporting import gather, show


def records(*steps, began, skip=0.0):
    found = []
    for step in steps:
        found.append(
            {"step": step, "loss": 9 / step, "grad_norm": 1.0, "loss_t/0.00-0.50": 1.0, "loss_t/0.50-1.00": 3.0}
        )
        found[-1] |= {"this_start/startup": 5.0, "this_start/train": step - skip, "time": began + 5 + step - skip}
    return found


def write(folder, starts, lines):
    for name, some in (("starts.jsonl", starts), ("metrics.jsonl", lines)):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in some) + '{"step": 3, "torn')
    return folder


@pytest.fixture
def folder(tmp_path):
    """Returns the workdir of a run that was killed after step 30, and that goes on from step 20 with another rate."""
    config = {"steps": 100, "optimizer": {"peak_learning_rate": 4e-4, "schedule": [[0, 0.0], [5, 1.0]]}}
    other = config | {"optimizer": config["optimizer"] | {"peak_learning_rate": 2e-4}}
    same = {"startup_seconds": 5.0, "commit": "a", "hardware": {"devices": 8}}
    earlier = {
        "seconds": {"startup": 5.0, "train": 20.0, "redone": 10.0, "down": 65.0},
        "start": {"seconds": {"startup": 5.0, "train": 30.0}, "step": 30, "time": 135.0},
    }
    starts = [
        same | {"began": 100.0, "step": 0, "config": config, "earlier": {}},
        same | {"began": 200.0, "step": 20, "config": other, "earlier": earlier},
    ]
    lines = [*records(10, 20, began=100.0), *records(30, 40, began=200.0, skip=20)]
    lines[-1] |= {"validation/bits_per_byte": 1.25, "spike/text": "step 40: a spike", "loss": None}
    (tmp_path / "samples.txt").write_text("--- step 20\ncompletion of 'x':\n  | y\n--- step 40\n</script>\n")
    return write(tmp_path, starts, lines)


def test_what_is_gathered(folder):
    found = gather.gather(folder)
    assert (found["step"], found["steps"]) == (40, 100)
    assert found["seconds"] == {"startup": 10, "train": 40, "redone": 10, "down": 65} and found["goodput"] == 40 / 125
    first, second = found["starts"]
    assert first["began"] == "1970-01-01T00:01:40+00:00" and (first["step"], first["to"]) == (0, 30)
    assert first["seconds"] == {"startup": 5, "train": 20, "redone": 10, "down": 65} and first["changes"] == {}
    assert second["seconds"] == {"startup": 5, "train": 20} and (second["step"], second["to"]) == (20, 40)
    assert second["changes"] == {"config.optimizer.peak_learning_rate": [4e-4, 2e-4]}
    curves = {one["title"]: one["series"] for one in found["curves"]}
    assert [p[:2] for p in curves["Loss and validation bound"][0]["points"]] == [[10, 0.9], [20, 0.45], [30, 0.3]]
    assert [one["name"] for one in curves["Loss by mask ratio"]] == ["0.00-0.50", "0.50-1.00"]
    assert curves["Validation bound"][0]["points"] == [[40, 1.25, 1.25, 1.25]] and "Speed" not in curves
    assert found["spikes"] == [{"step": 40, "text": "step 40: a spike"}]
    assert found["samples"] == [{"step": 20, "text": "completion of 'x':\n  | y"}, {"step": 40, "text": "</script>"}]


def test_long_curves_are_averaged(tmp_path):
    lines = [{"step": i, "loss": float(i % 2)} for i in range(1, 5001)]
    ((curve,),) = (chart["series"] for chart in gather._curves(lines))
    assert len(curve["points"]) == 1000 and curve["points"][0] == [5, 0.6, 0.0, 1.0] and curve["points"][-1][0] == 5000


def test_the_page_needs_nothing_else(folder):
    page = show.page(gather.gather(folder))
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<link|src=", page)
    assert page.count("</script>") == 1  # a sample cannot end the script
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data["samples"][1]["text"] == "</script>" and set(data["seconds"]) <= set(data["kinds"])


def test_starts_of_older_versions(folder):
    config = {"steps": 100}
    old = [{"time": "2026-01-01T00:00:00+00:00", "step": step, "config": config} for step in (0, 20)]
    found = gather.gather(write(folder, old, [{"step": 10, "loss": 1.0}]))
    assert [one["seconds"] for one in found["starts"]] == [{}, {}] and found["seconds"] == {}
    assert "2 starts" in show.text(found) and show.page(found)


def test_the_command(folder, tmp_path):
    def report(*flags):
        return subprocess.run(
            [sys.executable, "-m", "llada_jax.report", *flags], cwd=ROOT, env={"PYTHONPATH": PYTHONPATH},
            capture_output=True, text=True,
        )  # fmt: skip

    done = report(f"--workdir={folder}", f"--output={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert "goodput 32.0% of 0:02:05: startup 10.0 s, train 40.0 s, redone 10.0 s, down 0:01:05" in done.stdout
    assert "config.optimizer.peak_learning_rate: 0.0004 -> 0.0002" in done.stdout and "step 40: a spike" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads(report(f"--workdir={folder}", "--json").stdout)["step"] == 40
    missing = report(f"--workdir={tmp_path / 'none'}")
    assert missing.returncode == 2 and "has no starts.jsonl" in missing.stderr
