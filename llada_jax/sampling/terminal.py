"""Denoising as one sees it: a text in a terminal, redrawn in place while its tokens appear."""

import contextlib
import os
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

import numpy as np

from llada_jax.text.tokenizer import Tokenizer

# SGR codes by the kind of text.
STYLES = {"prompt": "2", "text": "", "new": "30;42", "mask": "2", "status": "2"}
FRAME_SECONDS = 0.03  # a small model would be too fast to watch
TAB = 4

Spans = list[tuple[str, str]]  # text, a key of STYLES
Line = list[tuple[str, str]]  # one entry per character: it (with what combines with it), a key of STYLES


def spans(
    tokens_T: np.ndarray,
    given_T: np.ndarray,
    new_T: np.ndarray,
    mask_id: int,
    tokenizer: Tokenizer,
    mask: str,
    continuation: bool = False,
) -> Spans:
    """The text of a canvas in runs of one kind.

    Args:
      tokens_T: int32 ids, without padding.
      given_T: bool, the user's own tokens.
      new_T: bool, revealed by the last step.
      mask_id: drawn as `mask`, one each.
      continuation: the canvas goes on where other text ended, as in `Tokenizer.decode`.
    """
    result: Spans = []
    run: list[int] = []

    def kind(i: int) -> str:
        if tokens_T[i] == mask_id:
            return "mask"
        return "new" if new_T[i] else "prompt" if given_T[i] else "text"

    for i, token in enumerate(tokens_T.tolist()):
        run.append(token)
        if i + 1 < len(tokens_T) and kind(i + 1) == kind(i):
            continue
        if kind(i) == "mask":
            result.append((mask * len(run), "mask"))
        else:
            result.append((tokenizer.decode(run, skip_special=True, continuation=continuation), kind(i)))
        run, continuation = [], True
    return result


def lay_out(text: Iterable[tuple[str, str]], columns: int) -> list[Line]:
    """Lines of at most `columns` cells, words whole unless they are longer, a space between two lines left out.

    Nothing in the text can move the cursor or change its colour.
    """
    lines: list[Line] = [[]]
    used = 0

    def put(character: str, cells: int, style: str) -> None:
        nonlocal used
        if used + cells > columns:
            end = len(lines[-1])
            while end and not _may_end_line(*lines[-1][end - 1]) and not _may_end_line(character, style):
                end -= 1
            moved = lines[-1][end:] if end else []
            del lines[-1][len(lines[-1]) - len(moved) :]
            lines.append(moved)
            used = width(moved)
            if character == " ":
                return
        lines[-1].append((character, style))
        used += cells

    for part, style in text:
        for character in part:
            category = unicodedata.category(character)
            if character == "\n":
                if style == "new":
                    put("⏎", 1, style)  # a revealed line break is seen too
                lines.append([])
                used = 0
            elif character == "\t":
                for _ in range(TAB - used % TAB):
                    put(" ", 1, style)
            elif category in ("Mn", "Me"):
                if lines[-1]:
                    before, before_style = lines[-1][-1]
                    lines[-1][-1] = before + character, before_style
            elif category == "Cf" or character == "\r":
                continue  # joiners, writing directions: of no width
            elif category[0] == "C" or category in ("Zl", "Zp"):
                put("\ufffd", 1, style)
            else:
                put(character, _cells(character), style)
    return lines


def harmless(text: str) -> str:
    """The text to print in a terminal, in which it can neither move the cursor nor change a colour."""
    return "\n".join("".join(character for character, _ in line) for line in lay_out([(text, "text")], 1 << 30))


def width(line: Line) -> int:
    """Cells that the line takes in a terminal."""
    return sum(_cells(character[0]) for character, _ in line)


def _may_end_line(character: str, style: str) -> bool:
    """True of what is no part of a word: between it and what stands before or after it a line may be broken."""
    return character == " " or style == "mask" or _cells(character[0]) == 2


def _cells(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def visible(lines: Sequence[Line], rows: int) -> Sequence[Line]:
    """At most `rows` of the lines, such that the last news, or else the first mask, is among them."""
    if len(lines) <= rows:
        return lines
    news = [i for i, line in enumerate(lines) if any(style == "new" for _, style in line)]
    masks = [i for i, line in enumerate(lines) if any(style == "mask" for _, style in line)]
    focus = news[-1] if news else masks[0] if masks else len(lines) - 1
    first = min(max(focus - rows // 2, 0), len(lines) - rows)
    return lines[first : first + rows]


def painted(line: Line) -> str:
    """The line with its colours, which end where it ends."""
    result, current = "", ""
    for character, style in line:
        if (code := STYLES[style]) != current:
            result += "\x1b[0m" + (f"\x1b[{code}m" if code else "")
            current = code
        result += character
    return result + ("\x1b[0m" if current else "")


def can_draw(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can be redrawn."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and os.name != "nt"


@contextlib.contextmanager
def unechoed(stream: TextIO) -> Iterator[None]:
    """Within it the terminal does not show what is typed, which would shift what is drawn; it is not lost."""
    import termios  # not on every system; where it is not, nothing is drawn

    before = termios.tcgetattr(stream.fileno())
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(stream.fileno(), termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(stream.fileno(), termios.TCSADRAIN, before)


class Screen:
    """A place in the terminal that is drawn over and over; a context manager that leaves the cursor visible."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._drawn: list[int] = []  # widths of the lines, cells
        self._last = 0.0
        try:
            "░".encode(stream.encoding or "ascii")
            self.mask = "░"
        except UnicodeEncodeError:
            self.mask = "_"

    def __enter__(self) -> "Screen":
        self._write("\x1b[?25l")
        return self

    def __exit__(self, *exception: object) -> None:
        self._write("\x1b[?25h")

    def draw(self, text: Spans, status: str) -> None:
        """Draws the text, the part of it where something happens if it is too long, and a status line."""
        columns, rows = self._size()
        # The last column stays free: terminals differ in what they do after it.
        columns, rows = max(columns, 10) - 1, max(rows, 4) - 1
        lines = list(visible(lay_out(text, columns), rows - 1)) + lay_out([(status, "status")], columns)[:1]
        time.sleep(max(0.0, self._last + FRAME_SECONDS - time.monotonic()))
        self._last = time.monotonic()
        self._write(self._erased() + "".join(painted(line) + "\n" for line in lines))
        self._drawn = [width(line) for line in lines]

    def finish(self, text: Spans) -> None:
        """Replaces what was drawn by the whole text, however long."""
        self._write(self._erased() + "".join(painted(line) + "\n" for line in lay_out(text, 1 << 30)))
        self._drawn = []

    def _erased(self) -> str:
        columns = self._size()[0]
        # A terminal that has become narrower breaks the lines in it anew.
        lines = sum(max(1, -(-cells // columns)) for cells in self._drawn)
        return (f"\x1b[{lines}F" if lines else "") + "\x1b[J"

    def _size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns, rows = 80, 24
        return columns or 80, rows or 24

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "ascii"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()
