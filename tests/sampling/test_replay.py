"""Tests the page and the moving picture that show how texts appeared."""

import base64
import dataclasses
import importlib.util
import io
import json
import re
import shutil
import subprocess

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


# What the browser does with the page: it goes through all steps and back, by slider and keys, and tells what it shows.
SCRIPT = """<script>
const key = (name, on) => on.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const shown = () => sample.live.map(at => {
  const { className, innerText } = sample.spans[at];
  return [className.split(" ").slice(1).sort().join(" "), innerText];
});
pause();
const states = [];
for (let i = 0; i <= sample.total; i++) { slider.value = i; slider.oninput(); states.push(shown()); }
const back = [];
for (let i = sample.total; i >= 0; i--) { back.unshift(shown()); key("ArrowLeft", document.body); }
slider.value = 3; slider.oninput();
key("Home", canvas);
const told = { states, back, tip: tip.innerText, said: byId("said").textContent };
told.label = canvas.getAttribute("aria-label");
key("ArrowRight", canvas);
key("Escape", canvas);
byId("color").value = "sure"; byId("color").onchange();
byId("all").open = true; list();
Object.assign(told, { closed: tip.style.display, color: sample.spans[4].style.getPropertyValue("--at"),
  list: [...byId("list").children].map(line => line.innerText), finished: byId("finished").textContent });
document.body.replaceChildren(Object.assign(document.createElement("pre"),
  { id: "told", textContent: btoa(unescape(encodeURIComponent(JSON.stringify(told)))) }));
</script></body>"""


@pytest.mark.slow
def test_a_browser_shows_what_happened(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    record = made_up()
    page = tmp_path / "page.html"
    page.write_text(replay.page([record], {}).replace("</body>", SCRIPT))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    told = json.loads(base64.b64decode(re.search('<pre id="told">(.*?)</pre>', done.stdout)[1]))
    assert told["back"] == told["states"]
    names = [[name for name, _ in state] for state in told["states"]]
    assert names == [
        ["mask", "mask", "mask", "mask", "control mask"],
        ["new text", "mask", "mask", "new text", "control mask"],
        ["mask taken", "new text", "mask", "text", "control mask"],
        ["again new text", "text", "new text", "text", "control mask"],
        ["again text", "text", "text", "text", "control mask"],
        ["again text", "text", "again new text", "text", "control new text unknown"],
    ]
    for state, tokens in zip(told["states"], replayed.texts(record), strict=True):
        for (name, text), token in zip(state, tokens[1:], strict=True):
            if "mask" not in name:
                assert text.replace("⏎\n", "\n").strip() == harmless(token).strip()
    assert (
        told["tip"].split()
        == (
            "two⏎ position 2 kept in step 3 with 50.0 % ␣one 75.0 % two⏎ 20.0 % (part of a character) 0.0 % </s> 0.0 % "
            "at this position: step 1: ␣one, 75.0 % step 2: taken back step 3: two⏎, 50.0 %"
        )
        .replace("(part of a character)", harmless(NEXT.text, True))
        .split()
    )
    assert told["said"] == told["tip"] and "[1 masked]" in told["label"] and told["closed"] == "none"
    assert float(told["color"]) == 1 and told["finished"] == "a <b>\n"
    assert told["list"][1:4] == [
        "taken back at 2; two⏎ at 3 (30.0 %)",
        "two⏎ at 2 (50.0 %); ␣one at 4 (12.5 %)",
        "",
    ]


def harmless(text: str, named: bool = False) -> str:
    """Returns what the page shows of a text."""
    if named:
        text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return text.replace("\x07", "\ufffd").replace("\u2028", "↵")


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
