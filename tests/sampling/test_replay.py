"""Tests the page and the moving picture that show how texts appeared."""

import dataclasses
import importlib.util
import io
import re

import pytest
import replayed

from llada_jax.config import UserError
from llada_jax.sampling import keeping, replay
from llada_jax.sampling.recording import Change, Record, Token

HOSTILE = "</script><!--<script>\u2028&amp;\"'\\ \ud83d\n\t漢字 é😀 \x07"
NEXT = Token(7, HOSTILE)


def made_up() -> Record:
    """Returns a record in which tokens are taken back, replaced and completed, and nothing is predicted at the end."""
    one, two, end = Token(5, " one"), Token(6, "two\n"), Token(2, "</s>", control=True)
    likely = ((one, 0.75), (two, 0.2), (NEXT, 0.00004), (end, 0.0))
    steps = [
        [Change(1, one, 0.75, likely), Change(4, two, 1.0, likely)],
        [Change(1, None), Change(2, two, 0.3, likely)],
        [Change(1, two, 0.5, likely), Change(3, one, 0.125, likely), Change(4, NEXT, same=True)],
        [],
        [Change(3, NEXT, 0.6, likely), Change(5, end)],
    ]
    return Record(HOSTILE, {"steps": 5, "remasking": "<b>"}, [NEXT, *[None] * 5], steps, "a <b>\n", 5)


def test_the_page_holds_what_happened_and_needs_nothing_else():
    records = [dataclasses.replace(made_up(), steps=[]), made_up()]
    page = replay.page(records, {"model": "<b>", "seed": 0})
    assert not re.search(r"https?://|<link|src=|import ", page)
    data = replayed.data(page)
    assert data["settings"] == {"model": "<b>", "seed": "0"} and data["alternatives"] == 4
    for record, sample in zip(records, data["samples"], strict=True):
        shown = [[token and (token.id, token.text) for token in state] for state in replayed.tokens(record)]
        assert replayed.played(data, sample) == shown
        kept = [change for step in record.steps for change in step if change.probability is not None]
        assert [sure / 1e4 for sure in sample["sure"] if sure >= 0] == pytest.approx(
            [change.probability for change in kept], abs=5e-5
        )
        likely = [(token.id, probability) for change in kept for token, probability in change.likely]
        assert [data["tokens"]["id"][i] for i in sample["likely"]] == [i for i, _ in likely]
        assert [sure / 1e4 for sure in sample["likely_sure"]] == pytest.approx([p for _, p in likely], abs=5e-5)
        assert (sample["prompt"], sample["completion"], sample["end"]) == (record.prompt, record.completion, record.end)
    assert data["samples"][1]["sure"] == [7500, 10000, -1, 3000, 5000, 1250, -1, 6000, -1]
    assert data["samples"][1]["settings"] == {"steps": "5", "remasking": "<b>"}


def test_no_text_can_leave_the_data_of_the_page():
    page = replay.page([made_up()], {"model": HOSTILE})
    (line,) = [line for line in page.split("\n") if line.startswith("const data = ")]
    assert "<" not in line and line.isascii()
    assert page.count("</script>") == page.count("<script>") == 1
    assert replayed.data(page)["samples"][0]["prompt"] == HOSTILE


def test_a_long_text_makes_a_small_page():
    """1,024 tokens in 512 steps, each with its alternatives."""
    words = [Token(i, f" word{i}") for i in range(1000)]
    changes = [
        Change(at, words[at * 7 % 1000], 0.5, tuple((words[(at * n) % 1000], 0.1) for n in range(1, 5)))
        for at in range(1024)
    ]
    record = Record("", {}, [None] * 1024, [changes[2 * i : 2 * i + 2] for i in range(512)], "x", 1024)
    assert len(replay.page([record], {})) < 120_000


def test_the_picture_moves(loaded):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    from llada_jax.sampling import animation

    record = made_up()
    content, missing = animation.gif([record, dataclasses.replace(record, steps=[], end=1)])
    image = image_module.open(io.BytesIO(content))
    assert image.n_frames == 6 + 1 and image.info["loop"] == 0 and missing >= 1  # no font has U+D83D
    frames, durations = [], []
    for number in range(image.n_frames):
        image.seek(number)
        frames.append(image.convert("RGB"))
        durations.append(image.info["duration"])
    assert len({frame.size for frame in frames}) == 1
    assert durations[0] == 800 and durations[5] == 3000 and all(40 <= one <= 400 for one in durations[1:5])
    taken = [sum(count for count, color in frame.getcolors() if color == animation.TAKEN) for frame in frames]
    assert taken[2] > taken[1] == taken[3] > taken[6] == 0  # in the legend of the first record, and where it happens


def test_what_cannot_be_kept_is_found_before(tmp_path, monkeypatch):
    wanted = {"save_html": str(tmp_path / "a.html"), "save_gif": None}
    assert keeping.check(wanted, None, 200) == {"save_html": tmp_path / "a.html"}
    with pytest.raises(UserError, match="--save_html=.* holds at most 200 prompts, but there are 201"):
        keeping.check(wanted, None, 201)
    with pytest.raises(UserError, match="--save_html=.* and --output name the same file"):
        keeping.check(wanted, tmp_path / "a.html", 1)
    with pytest.raises(UserError, match="there is no folder"):
        keeping.check({"save_html": str(tmp_path / "no" / "a.html")}, None, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--save_gif needs Pillow: pip install"):
        keeping.check({"save_gif": str(tmp_path / "a.gif")}, None, 1)
