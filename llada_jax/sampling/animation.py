"""Draws how texts appeared as an animated GIF, with Pillow.

A masked token takes the place of the token that will stand there in the end, so that the text does not move.
"""

import functools
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llada_jax.config import UserError
from llada_jax.sampling.recording import Record, Token
from llada_jax.sampling.terminal import Line, lay_out, width

MOST = 10  # prompts that one picture may hold, one after the other
COLUMNS, LINES = 84, 36  # the longest line, in cells; the lines that are drawn of a longer text
FRAMES, SECONDS = 120, 8  # the most frames of a text; about how long they take together
FIRST, LAST = 0.8, 3.0  # seconds: the masks alone, and the finished text
FONT, LINE, MARGIN, FOOT = 16, 24, 20, 44  # px
Color = tuple[int, int, int]
CARD, MASK, NEW, TAKEN, RAIL, BAR = (
    (17, 21, 31), (52, 60, 78), (122, 85, 24), (196, 64, 52), (35, 43, 59), (246, 183, 60)
)  # fmt: skip
GIVEN, TEXT, BRIGHT, SMALL = (143, 163, 196), (238, 242, 250), (255, 217, 143), (135, 147, 171)
# The first font that has a character draws it. Pillow looks in the folders of the system.
FONTS = ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf", "Menlo.ttc", "consola.ttf")
FURTHER = (
    "NotoSansMonoCJK-Regular.ttc", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "Hiragino Sans GB.ttc", "msgothic.ttc", "NotoEmoji-Regular.ttf", "seguiemj.ttf",
)  # fmt: skip


def require_pillow() -> None:
    """Raises UserError if Pillow is not installed."""
    if importlib.util.find_spec("PIL") is None:
        raise UserError("--save_gif needs Pillow: pip install 'llada_jax[plots]'")


def gif(records: Sequence[Record]) -> tuple[bytes, int]:
    """Returns the picture, and how many different characters have no glyph in any font that was found.

    Args:
      records: The records, at most MOST, which are drawn one after the other.
    """
    from PIL import Image

    pen, frames, seconds = _Pen(), [], []
    scenes = [_Scene(record) for record in records]
    columns = max([60, *(width(line) for scene in scenes for line in scene.lines())])
    lines = min(LINES, max(len(scene.lines()) for scene in scenes))
    for number, scene in enumerate(scenes, 1):
        total = len(scene.record.steps)
        stride = max(1, -(-total // FRAMES))
        shown = max(1, -(-total // stride))
        title = f"{number} of {len(scenes)}, " if len(scenes) > 1 else ""
        frames.append(pen.frame(scene, columns, lines, title))
        seconds.append(FIRST)
        while scene.step < total:
            scene.advance(stride)
            frames.append(pen.frame(scene, columns, lines, title))
            seconds.append(min(0.4, max(0.05, SECONDS / shown)))
        seconds[-1] = LAST
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for color in _palette() for value in color])
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    # The format counts hundredths of a second.
    durations = [round(100 * one) * 10 for one in seconds]
    drawn[0].save(file, "GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0, optimize=True)
    return file.getvalue(), len(pen.missing)


class _Scene:
    """The canvas of a record at one of its steps."""

    def __init__(self, record: Record):
        self.record, self.step = record, 0
        self.tokens, self.new, self.taken = list(record.start), set(), set()
        self._final = list(record.start)
        for changes in record.steps:
            for change in changes:
                self._final[change.position] = change.token

    def advance(self, steps: int) -> None:
        """Goes on by some steps, or to the end. What they all have put there counts as new."""
        self.new = set()
        for changes in self.record.steps[self.step : self.step + steps]:
            for change in changes:
                at, self.tokens[change.position] = change.position, change.token
                if not change.same:
                    (self.taken.add if change.token is None else self.taken.discard)(at)
                    (self.new.discard if change.token is None else self.new.add)(at)
        self.step = min(self.step + steps, len(self.record.steps))

    def lines(self) -> list[Line]:
        """Returns the lines of the text up to its end. The style of a character is its position in the canvas."""
        parts = []
        for at, (now, final) in enumerate(zip(self.tokens[: self.record.end], self._final, strict=False)):
            token: Token | None = now or final
            text = "  " if token is None else "" if token.control and self.record.start[at] else token.text
            if self.record.start[at] is None:
                text = text.replace("\n", "⏎\n")
            parts.append((text, str(at)))
        lines = lay_out(parts, COLUMNS)
        while len(lines) > 1 and not lines[-1]:
            lines.pop()
        return lines


class _Pen:
    """Draws frames, and remembers which characters no font has."""

    def __init__(self):
        self.missing: set[str] = set()
        self._fonts = _fonts()
        self._cell = round(self._fonts[0].getlength("M"))

    def frame(self, scene: _Scene, columns: int, rows: int, title: str) -> Any:
        """Returns the picture of a scene, as an RGB image of Pillow."""
        from PIL import Image, ImageDraw

        wide, below = 2 * MARGIN + columns * self._cell, MARGIN + rows * LINE + 10
        image = Image.new("RGB", (wide, below + FOOT), CARD)
        draw = ImageDraw.Draw(image)
        for row, line in enumerate(_window(scene, rows)):
            self._line(draw, scene, line, MARGIN + row * LINE)
        total, right = len(scene.record.steps), wide - MARGIN
        draw.rectangle((MARGIN, below, right, below + 2), RAIL)
        if scene.step:
            draw.rectangle((MARGIN, below, MARGIN + (right - MARGIN) * scene.step // total, below + 2), BAR)
        x = MARGIN
        legend = [("masked", MASK, None), ("just kept", NEW, None)]
        if any(change.token is None for changes in scene.record.steps for change in changes):
            legend.append(("taken back", MASK, TAKEN))
        for words, fill, edge in legend:
            draw.rectangle((x, below + 16, x + 20, below + 28), fill, edge)
            x = self._words(draw, x + 28, below + 13, words) + 22
        words = f"{title}step {scene.step} of {total}"
        self._words(draw, right - len(words) * self._cell, below + 13, words)
        return image

    def _words(self, draw: Any, x: int, y: int, words: str) -> int:
        for character in words:
            draw.text((x, y), character, SMALL, self._fonts[0])
            x += self._cell
        return x

    def _line(self, draw: Any, scene: _Scene, line: Line, y: int) -> None:
        column, boxes = 0, {}
        for character, style in line:
            cells = width([(character, style)])
            first, _ = boxes.get(int(style), (column, 0))
            boxes[int(style)] = first, column + cells
            column += cells
        for at, (first, last) in boxes.items():
            box = (MARGIN + first * self._cell, y, MARGIN + last * self._cell - 2, y + LINE - 4)
            if scene.tokens[at] is None:
                draw.rectangle(box, MASK, TAKEN if at in scene.taken else None, 2)
            elif at in scene.new:
                draw.rectangle(box, NEW)
        column = 0
        for character, style in line:
            at, cells = int(style), width([(character, style)])
            hidden = scene.tokens[at] is None or (character == "⏎" and at not in scene.new)
            if not hidden and not character.isspace():
                color = BRIGHT if at in scene.new else TEXT if scene.record.start[at] is None else GIVEN
                self._character(draw, MARGIN + column * self._cell, y, character, cells, color)
            column += cells

    def _character(self, draw: Any, x: int, y: int, character: str, cells: int, color: Color) -> None:
        font = next((one for one in self._fonts if _has(one, character[0])), None)
        if font is None:
            self.missing.add(character[0])
            draw.rectangle((x + 1, y + 4, x + cells * self._cell - 3, y + LINE - 8), None, color)
        else:
            draw.text((x, y + FONT), character, color, font, anchor="ls")


def _window(scene: _Scene, rows: int) -> list[Line]:
    """Returns the lines to draw: if there are too many, those around the first that has a masked token."""
    lines = scene.lines()
    if len(lines) <= rows:
        return lines
    masked = (i for i, line in enumerate(lines) if any(scene.tokens[int(style)] is None for _, style in line))
    focus = next(masked, len(lines) - 1)
    first = min(max(focus - rows // 2, 0), len(lines) - rows)
    return lines[first : first + rows]


def _fonts() -> list[Any]:
    """Returns the fonts that were found. Each is at least one font: Pillow's own is the last resort."""
    from PIL import ImageFont

    found, folders = [], [""]
    if (matplotlib := importlib.util.find_spec("matplotlib")) is not None:
        folders.append(str(Path(matplotlib.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf") + "/")
    for names, most in ((FONTS, 1), (FURTHER, len(FURTHER))):
        loaded = []
        for path in (folder + name for name in names for folder in folders):
            try:
                loaded.append(ImageFont.truetype(path, FONT))
            except OSError:
                continue
        found += loaded[:most]
    if not found or found[0].getname()[0] not in ("DejaVu Sans Mono", "Liberation Mono", "Menlo", "Consolas"):
        found.insert(0, ImageFont.load_default(FONT))
    return found


@functools.lru_cache(4096)
def _has(font: Any, character: str) -> bool:
    """Returns whether a font draws this character other than one that no font has."""
    try:
        return bytes(font.getmask(character)) != bytes(font.getmask("\U0010ffff"))
    except (OSError, ValueError):
        return False


def _palette() -> list[Color]:
    """Returns the colors of all frames: the areas, and the letters on them with their smooth edges."""
    colors = [CARD, MASK, NEW, TAKEN, RAIL, BAR]
    for ground, letter in ((CARD, GIVEN), (CARD, TEXT), (CARD, SMALL), (NEW, BRIGHT)):
        for part in range(1, 9):
            colors.append(tuple(round(a + (b - a) * part / 8) for a, b in zip(ground, letter, strict=True)))
    return colors
