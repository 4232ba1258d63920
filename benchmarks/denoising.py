r"""Draws how a model fills in masked tokens, as a picture that moves: python benchmarks/denoising.py --model=DIR

    python benchmarks/denoising.py --model=runs/quickstart --prompt="class Queue:" --output=docs/denoising.svg \
        --gen_length=48 --block_length=16 --temperature=0.8

The picture is one .svg file without scripts, fonts or other files. It moves by CSS; where CSS animation is not
supported, or not wanted (prefers-reduced-motion), it shows the finished text. The flags are those of llada_jax.sample.

It is drawn from the same record as the page of llada_jax.sample --save_html, so it shows exactly what the sampler does.
Tokens from the first EOS on are not drawn.
"""

import dataclasses
from xml.sax.saxutils import escape

import jax
from absl import flags

from llada_jax.cli import entry_point, model_flags, outputs, paths, sampler_flags
from llada_jax.config import UserError
from llada_jax.loading import load_with_tokenizer
from llada_jax.sampling.recording import Recorder, Token
from llada_jax.sampling.settings import check_settings
from llada_jax.sampling.terminal import harmless
from llada_jax.sampling.text_completion import Options
from llada_jax.text.tokenizer import Tokenizer

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(sampler_flags)
_PROMPT = flags.DEFINE_string("prompt", None, "A text to continue, or to fill in at [MASK].", required=True)
_OUTPUT = paths.define("output", None, "The .svg file to write.", required=True)
_SECONDS = flags.DEFINE_float("seconds", 6.0, "How long the picture takes from the masks to the next masks.")

# Parts of the whole duration: the masks alone, the reverse steps, then the finished text, and at last the way back.
FIRST, LAST, BACK = 0.08, 0.60, 0.97
FADE, GLOW = 0.012, 0.07  # how long a token takes to appear; how long it stays highlighted, and then fades
FONT, CELL, LINE = 16, 9.6, 25  # px: the size of the font, the width of a character, the height of a line
MARGIN, FOOT = 28, 46  # px: around the text, and below it for the legend
COLUMNS = 84  # the longest line, in characters
STYLE = """
  text { font: 16px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }
  .card { fill: #11151f }
  .edge { fill: none; stroke: #2b3345 }
  .given { fill: #8fa3c4 }
  .text { fill: #eef2fa }
  .mask { fill: #434d62; opacity: 0 }
  .new { fill: #7a5518; opacity: 0 }
  .small { font-size: 12.5px; fill: #8793ab }
  .count { opacity: 0 }
  .rail { fill: #232b3b }
  .bar { fill: #f6b73c; transform-origin: 0 0 }
  @media (prefers-reduced-motion: reduce) { * { animation: none !important } }
"""


@dataclasses.dataclass
class Piece:
    """A part of a token's text that lies on one line."""

    line: int
    column: int
    text: str  # "" = a line break, which is drawn as a box of one cell while it is masked
    step: int  # the reverse step that revealed the token; 0 = the token was given


def denoise(model, tokenizer: Tokenizer, text: str, options: Options, seed: int) -> list[tuple[Token, int]]:
    """Returns the tokens up to the end of the text, each with the step that revealed it (0 = given)."""
    recorder = Recorder(model, tokenizer, [text], options)
    recorder.complete(jax.random.key(seed), batch_size=1)
    record = recorder.records[0]
    found = [(token, 0) for token in record.start]
    for step, changes in enumerate(record.steps, 1):
        for change in changes:
            found[change.position] = change.token, found[change.position][1] if change.same else step
    return [(token, step) for token, step in found[: record.end] if not token.control]


def lay_out(tokens: list[tuple[Token, int]]) -> list[Piece]:
    """Returns the parts of all tokens with their places. A token that ends in the middle of a character has no text."""
    pieces, line, column = [], 0, 0
    for token, step in tokens:
        for at, part in enumerate(harmless(token.text).split("\n")):
            if at:
                pieces.append(Piece(line, column, "", step))
                line, column = line + 1, 0
            if column and column + len(part) > COLUMNS:
                part, line, column = part.lstrip(" "), line + 1, 0
            while part:
                pieces.append(Piece(line, column, part[:COLUMNS], step))
                column += len(part[:COLUMNS])
                if part := part[COLUMNS:]:
                    line, column = line + 1, 0
    while pieces and not pieces[-1].text.strip():  # nothing visible is left at the end
        pieces.pop()
    return pieces


def moment(step: int, last: int) -> float:
    """Returns when a step happens, as a part of the whole duration."""
    return FIRST + (LAST - FIRST) * (step - 1) / max(last - 1, 1)


def keyframes(name: str, *points: tuple[float, str]) -> str:
    """Returns a CSS animation from (part of the duration, declarations) pairs."""
    body = " ".join(f"{100 * at:.4g}% {{ {what} }}" for at, what in points)
    return f"  @keyframes {name} {{ {body} }}\n"


def animations(last: int, seconds: float) -> str:
    """Returns the CSS that moves the picture: for each step, what becomes of its masks, its text and its number."""
    rules, timing = [], f"{seconds:g}s linear infinite"
    shown, hidden, bright, plain = "opacity: 1", "opacity: 0", "fill: #ffd98f", "fill: #eef2fa"
    for step in range(1, last + 1):
        at = moment(step, last)
        until = moment(step + 1, last) if step < last else BACK
        rules += [
            keyframes(f"m{step}", (0, shown), (at, shown), (at + FADE, hidden), (BACK, hidden), (1, shown)),
            keyframes(
                f"t{step}", (0, hidden), (at, f"{hidden}; {bright}"), (at + FADE, f"{shown}; {bright}"),
                (at + GLOW, f"{shown}; {bright}"), (at + 2 * GLOW, f"{shown}; {plain}"), (BACK, shown), (1, hidden),
            ),
            keyframes(
                f"n{step}", (0, hidden), (at, hidden), (at + FADE, shown), (at + GLOW, shown), (at + 2 * GLOW, hidden),
                (1, hidden),
            ),
            keyframes(f"c{step}", (0, hidden), (at, hidden), (at + 1e-4, shown), (until, shown),
                      (until + 1e-4, hidden), (1, hidden)),
            f"  .s{step} .mask {{ animation: m{step} {timing} }} .s{step} .text {{ animation: t{step} {timing} }}\n",
            f"  .s{step} .new {{ animation: n{step} {timing} }} .c{step} {{ animation: c{step} {timing} }}\n",
        ]  # fmt: skip
    full, empty = "transform: scaleX(1)", "transform: scaleX(0)"
    rules.append(keyframes("b", (0, empty), (FIRST, empty), (LAST, full), (BACK, full), (1, empty)))
    rules.append(f"  .bar {{ animation: b {timing} }}\n")
    rules.append("  .end { animation: e 1s infinite } @keyframes e { 0%, 100% { opacity: 0 } }\n")
    return "".join(rules)


def draw_piece(piece: Piece, top: float) -> str:
    """Returns the elements of one piece: its mask, its highlight, and its text."""
    y = top + piece.line * LINE
    cells = max(len(piece.text), 1)
    words = piece.text.strip()
    x = MARGIN + (piece.column + len(piece.text) - len(piece.text.lstrip())) * CELL
    fit = f'x="{x:.1f}" y="{y + 17:.1f}" textLength="{len(words) * CELL:.1f}" lengthAdjust="spacingAndGlyphs"'
    if not piece.step:
        return f'<text class="given" {fit}>{escape(words)}</text>' if words else ""
    box = (
        f'x="{MARGIN + piece.column * CELL + 0.8:.1f}" y="{y:.1f}" width="{cells * CELL - 1.6:.1f}" '
        f'height="{LINE - 3}" rx="4"'
    )
    text = f'<text class="text" {fit}>{escape(words)}</text>' if words else ""
    return f'<g class="s{piece.step}"><rect class="mask" {box}/><rect class="new" {box}/>{text}</g>'


def picture(pieces: list[Piece], last: int, finished: str, seconds: float) -> str:
    """Returns the .svg file.

    Args:
      pieces: The parts of all tokens.
      last: The number of the last reverse step.
      finished: The finished text, for readers who cannot see the picture.
      seconds: The whole duration.
    """
    lines = max(piece.line for piece in pieces) + 1
    columns = max(max(piece.column + max(len(piece.text), 1) for piece in pieces), 64)
    width, below = round(2 * MARGIN + columns * CELL), MARGIN + lines * LINE + 14
    height = below + FOOT
    y, right = below + 27, width - MARGIN
    counts = "".join(
        f'<text class="small count c{step}" text-anchor="end" x="{right}" y="{y}">step {step} of {last}</text>'
        for step in range(1, last + 1)
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">',
        f"<title>A masked diffusion language model writes</title><desc>{escape(finished)}</desc>",
        f"<style>{STYLE}{animations(last, seconds)}</style>",
        f'<rect class="card" width="{width}" height="{height}" rx="12"/>',
        f'<rect class="edge" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="11.5"/>',
        *(draw_piece(piece, MARGIN) for piece in pieces),
        f'<rect class="rail" x="{MARGIN}" y="{below}" width="{right - MARGIN}" height="3" rx="1.5"/>',
        f'<g transform="translate({MARGIN} {below})">'
        f'<rect class="bar" width="{right - MARGIN}" height="3" rx="1.5"/></g>',
        f'<rect x="{MARGIN}" y="{y - 11}" width="22" height="13" rx="3" fill="#434d62"/>',
        f'<text class="small" x="{MARGIN + 30}" y="{y}">masked</text>',
        f'<rect x="{MARGIN + 100}" y="{y - 11}" width="22" height="13" rx="3" fill="#7a5518"/>',
        f'<text class="small" x="{MARGIN + 130}" y="{y}">just kept</text>',
        f'<text class="small end" text-anchor="end" x="{right}" y="{y}">{last} steps</text>',
        counts,
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Draws the picture that the flags ask for."""
    settings = sampler_flags.given()
    seed = settings.pop("seed", 0)
    options = Options(**settings)
    check_settings(options.sampler(0, 64 if options.gen_length is None else options.gen_length))
    output = outputs.check_file(_OUTPUT.value)
    if _SECONDS.value <= 0:
        raise UserError(f"--seconds={_SECONDS.value}: it must be positive")
    model, tokenizer = load_with_tokenizer(model_flags.model(), step=model_flags.STEP.value)
    tokens = denoise(model, tokenizer, _PROMPT.value, options, seed)
    pieces, last = lay_out(tokens), max((step for _, step in tokens), default=0)
    if not last or not pieces:
        raise UserError("nothing was filled in: take another prompt or a larger --gen_length")
    text = harmless("".join(token.text for token, _ in tokens))
    outputs.write_text(output, picture(pieces, last, text, _SECONDS.value))


if __name__ == "__main__":
    entry_point.run(main)
