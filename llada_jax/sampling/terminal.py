"""Shows the denoising of a text in a terminal, redrawing it in place while its tokens appear."""

import contextlib
import os
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

import numpy as np

from llada_jax.text.tokenizer import Tokenizer

# The ANSI SGR code (color and intensity) of each kind of text.
STYLES = {"prompt": "2", "text": "", "new": "30;42", "mask": "2", "status": "2"}
FRAME_SECONDS = 0.03  # shortest time between two frames, because a small model would be too fast to watch
TAB = 4  # cells between tab stops

Spans = list[tuple[str, str]]  # (text, a key of STYLES)
Line = list[tuple[str, str]]  # one entry per character: (the character with its combining marks, a key of STYLES)


def spans(
    tokens_T: np.ndarray,
    given_T: np.ndarray,
    new_T: np.ndarray,
    mask_id: int,
    tokenizer: Tokenizer,
    mask: str,
    continuation: bool = False,
) -> Spans:
    """Decodes a canvas and splits its text into runs of one kind each.

    Args:
      tokens_T: int32 ids, without padding.
      given_T: bool, True for the user's own tokens.
      new_T: bool, True for tokens revealed by the last step.
      mask_id: The id of MASK.
      tokenizer: The tokenizer that decodes the ids.
      mask: The text to draw for each MASK token.
      continuation: Whether the canvas continues other text, as in `Tokenizer.decode`.
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
    """Breaks the text into lines of at most `columns` cells.

    A word stays whole unless it is longer than a line, and a space that does not fit on its line is dropped. Control
    characters are replaced or dropped, so nothing in the text can move the cursor or change a color.
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
                    put("⏎", 1, style)  # makes a revealed line break visible
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
                continue  # joiners and direction marks have no width
            elif category[0] == "C" or category in ("Zl", "Zp"):
                put("\ufffd", 1, style)
            else:
                put(character, _cells(character), style)
    return lines


def harmless(text: str) -> str:
    """Returns the text in a form that can neither move the cursor nor change a color when it is printed."""
    return "\n".join("".join(character for character, _ in line) for line in lay_out([(text, "text")], 1 << 30))


def width(line: Line) -> int:
    """Returns the number of cells that the line takes in a terminal."""
    return sum(_cells(character[0]) for character, _ in line)


def _may_end_line(character: str, style: str) -> bool:
    """Returns whether a line may be broken before and after the character, because it is not part of a word."""
    return character == " " or style == "mask" or _cells(character[0]) == 2


def _cells(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def visible(lines: Sequence[Line], rows: int) -> Sequence[Line]:
    """Returns at most `rows` of the lines, among them the last one with new text, or else the first with a mask."""
    if len(lines) <= rows:
        return lines
    news = [i for i, line in enumerate(lines) if any(style == "new" for _, style in line)]
    masks = [i for i, line in enumerate(lines) if any(style == "mask" for _, style in line)]
    focus = news[-1] if news else masks[0] if masks else len(lines) - 1
    first = min(max(focus - rows // 2, 0), len(lines) - rows)
    return lines[first : first + rows]


def painted(line: Line) -> str:
    """Returns the line with its color codes, which are reset at the end of the line."""
    result, current = "", ""
    for character, style in line:
        if (code := STYLES[style]) != current:
            result += "\x1b[0m" + (f"\x1b[{code}m" if code else "")
            current = code
        result += character
    return result + ("\x1b[0m" if current else "")


def can_draw(stream: TextIO) -> bool:
    """Returns whether the stream is a terminal that can be redrawn."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and os.name != "nt"


@contextlib.contextmanager
def unechoed(stream: TextIO) -> Iterator[None]:
    """Keeps the terminal from showing what is typed, which would shift the drawing. The typed input is not lost."""
    import termios  # not available on every system; where it is missing, nothing is drawn

    before = termios.tcgetattr(stream.fileno())
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(stream.fileno(), termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(stream.fileno(), termios.TCSADRAIN, before)


class Screen:
    """An area of the terminal that is redrawn in place. Used as a context manager, it hides the cursor meanwhile."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._drawn: list[int] = []  # width of each drawn line, in cells
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
        """Draws the text and a status line. If the text is too long, only the part that changes is drawn."""
        columns, rows = self._size()
        # Leave the last column free, because terminals differ in what they do after a character there.
        columns, rows = max(columns, 10) - 1, max(rows, 4) - 1
        text = self._writable(text)
        lines = list(visible(lay_out(text, columns), rows - 1)) + lay_out([(status, "status")], columns)[:1]
        time.sleep(max(0.0, self._last + FRAME_SECONDS - time.monotonic()))
        self._last = time.monotonic()
        self._write(self._erased() + "".join(painted(line) + "\n" for line in lines))
        self._drawn = [width(line) for line in lines]

    def finish(self, text: Spans) -> None:
        """Replaces the drawing by the whole text, however long it is."""
        lines = lay_out(self._writable(text), 1 << 30)
        self._write(self._erased() + "".join(painted(line) + "\n" for line in lines))
        self._drawn = []

    def _writable(self, text: Spans) -> Spans:
        """Returns the text with escapes, such as \\u2192, for the characters that the terminal's encoding lacks."""
        if not (encoding := self._stream.encoding):  # a stand-in for a terminal
            return text
        return [(part.encode(encoding, "backslashreplace").decode(encoding), style) for part, style in text]

    def _erased(self) -> str:
        """Returns the codes that erase what is drawn."""
        columns = self._size()[0]
        # A terminal that has become narrower has wrapped the drawn lines, so that one line may take several rows.
        lines = sum(max(1, -(-cells // columns)) for cells in self._drawn)
        return (f"\x1b[{lines}F" if lines else "") + "\x1b[J"

    def _size(self) -> tuple[int, int]:
        """Returns the number of columns and of rows."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns, rows = 80, 24
        return columns or 80, rows or 24

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "ascii"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()
