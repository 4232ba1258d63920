"""Tests how the denoising is drawn in a terminal."""

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.sampling import terminal


def text_of(line):
    return "".join(character for character, _ in line)


def test_lines_fit_the_terminal():
    lines = terminal.lay_out([("ab\tc", "text"), ("漢字漢", "new"), ("e\u0301f\ng", "text")], 8)
    assert [text_of(line) for line in lines] == ["ab  c漢", "字漢e\u0301f", "g"]
    assert terminal.lay_out([("x" * 17, "text")], 8)[2] == [("x", "text")]
    hostile = terminal.lay_out([("a\x1b[2Jb\r\x07\u202ec", "text")], 20)
    assert [text_of(line) for line in hostile] == ["a\ufffd[2Jb\ufffdc"]


def test_what_happens_is_visible():
    lines = [[(str(i), "new" if i == 30 else "text")] for i in range(50)]
    shown = [text_of(line) for line in terminal.visible(lines, 10)]
    assert len(shown) == 10 and "30" in shown
    assert terminal.visible(lines[:10], 10) == lines[:10]
    masks = [[(str(i), "mask" if i > 5 else "text")] for i in range(50)]
    assert "6" in [text_of(line) for line in terminal.visible(masks, 10)]


def test_spans_say_what_is_what(loaded):
    _, tokenizer = loaded
    ids = tokenizer.encode("def main(x)")
    tokens_T = np.array([*ids, 511, 511, *tokenizer.encode(" return"), tokenizer.eos_id])
    given_T = np.arange(len(tokens_T)) < len(ids)
    new_T = np.arange(len(tokens_T)) == len(ids) + 2
    drawn = terminal.spans(tokens_T, given_T, new_T, 511, tokenizer, "░")
    assert drawn[:2] == [("def main(x)", "prompt"), ("░░", "mask")] and drawn[2][1] == "new"
    assert "".join(text for text, _ in drawn) == "def main(x)░░ return"


def test_a_frame_replaces_the_one_before():
    class Stream(io.StringIO):
        encoding = "ascii"

        def fileno(self):
            raise OSError

    with terminal.Screen(stream := Stream()) as screen:
        assert screen.mask == "_"
        screen.draw([("a\nb\nc", "text"), ("_", "mask")], "step 1")
        stream.truncate(0)
        screen.draw([("d", "new")], "step 2")
        assert stream.getvalue().lstrip("\0").startswith("\x1b[4F\x1b[J\x1b[0m\x1b[30;42md\x1b[0m\n")
        screen.finish([("done é", "text")])
    # What the encoding lacks is not lost.
    assert stream.getvalue().endswith("\x1b[2F\x1b[Jdone \\xe9\n\x1b[?25h")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ([("one two three", "text")], ["one two ", "three"]),
        # The space is dropped, and no word is split.
        ([("one tw", "text"), ("o,", "new"), (" three", "text")], ["one two,", "three"]),
        ([("one two  three", "text")], ["one two ", "three"]),
        ([("one " + "x" * 20, "text")], ["one ", "x" * 8, "x" * 8, "x" * 4]),
        ([("one two", "text"), ("░" * 10, "mask"), ("word", "text")], ["one two░", "░" * 8, "░word"]),
        ([("ab░", "text"), ("░" * 3, "mask"), ("word", "text")], ["ab░░░░", "word"]),
        ([("one 漢字漢字", "text")], ["one 漢字", "漢字"]),
        ([("a 漢字word x", "text")], ["a 漢字", "word x"]),
        ([("one tw\u0301oooo", "text")], ["one ", "tw\u0301oooo"]),
        ([("one two\nx", "new")], ["one two⏎", "x"]),
        ([("two   \tx", "text")], ["two     ", "x"]),
    ],
)
def test_lines_are_broken_between_words(text, lines):
    laid_out = terminal.lay_out(text, 8)
    assert ["".join(character for character, _ in line) for line in laid_out] == lines
    assert max(map(terminal.width, laid_out)) <= 8


def test_lines_broken_anew_by_a_narrower_terminal_are_erased_too(monkeypatch):
    class Stream(io.StringIO):
        def fileno(self):
            return 2

    monkeypatch.setattr(os, "get_terminal_size", lambda _: size)
    size = 20, 10
    with terminal.Screen(stream := Stream()) as screen:
        screen.draw([("漢" * 9 + "\n\n" + "x" * 30, "text")], "status")
        size = 9, 10
        stream.seek(0), stream.truncate()
        screen.draw([("x", "text")], "status")
        # The drawn lines have 18, 0, 19, 11 and 6 cells, and the terminal now has 9 columns.
        assert stream.getvalue().startswith(f"\x1b[{2 + 1 + 3 + 2 + 1}F\x1b[J")


class Window(io.TextIOWrapper):
    """A terminal of some encoding."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, newline="")

    def fileno(self):
        return 2

    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


TEXTS = st.lists(st.tuples(st.text(max_size=12), st.sampled_from(sorted(terminal.STYLES))), max_size=4)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.sampled_from(["ascii", "latin-1", "utf-8", "shift_jis"]), st.integers(0, 30), st.integers(0, 9))
def test_any_text_is_drawn_in_any_terminal(text, encoding, columns, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "get_terminal_size", lambda _: (columns, rows))
        patch.setattr(terminal, "FRAME_SECONDS", 0)
        with terminal.Screen(window := Window(encoding)) as screen:
            screen.draw(text, "status")
            screen.draw(text[:1], "status")
            screen.finish(text)
    assert window.shown().endswith("\x1b[?25h")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_finished_text_is_not_lost(encoding):
    with terminal.Screen(window := Window(encoding)) as screen:
        screen.finish([("né → 漢", "text")])
    wanted = {"ascii": r"n\xe9 \u2192 \u6f22", "latin-1": "né \\u2192 \\u6f22", "utf-8": "né → 漢"}[encoding]
    assert wanted in window.shown()
