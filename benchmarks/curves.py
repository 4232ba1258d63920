"""Plots the output of benchmarks/tuning.py: python benchmarks/curves.py --input=tuning.jsonl --output=tuning.svg

The left plot shows the bound on held-out answers given their prompts, with one line per set. The right plot shows,
before and after tuning, the share of generated answers that end and, if --format was given to tuning.py, the share that
also have that format. Step 0 is the model before tuning; it must be the first --model in the file. Needs the extra
`plots`.
"""

import json
from pathlib import Path

import matplotlib

from llada_jax.cli import entry_point, outputs, paths

matplotlib.use("svg")
import matplotlib.pyplot as plt

_INPUTS = paths.define_multi("input", None, "File of JSON lines from benchmarks/tuning.py; may repeat.", required=True)
_OUTPUT = paths.define("output", None, "Picture to write, an .svg or .png file.", required=True)

COLOURS = ("#1f6fb4", "#d9730d", "#2b8a3e", "#8f4ab8")
GREY = "#888888"  # is readable on light and dark pages
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY),
    "font.size": 9,
    "svg.hashsalt": "llada_jax",  # A fixed salt makes the same input give the same file.
}


def main() -> None:
    """Draws the picture."""
    outputs.check_file(_OUTPUT.value)
    texts = [Path(name).read_text(encoding="utf-8") for name in _INPUTS.value]
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    base = records[0]["model"]
    names = list(dict.fromkeys(Path(record["set"]).name for record in records))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        bars: list[tuple[str, float, float, str]] = []
        for i, name in enumerate(names):
            colour = COLOURS[i % len(COLOURS)]
            # Merge all records of the same step; if a key occurs twice, the last record wins. For the base model, whose
            # checkpoints all count as step 0, this is the newest checkpoint.
            points: dict[int, dict] = {}
            for r in (r for r in records if Path(r["set"]).name == name):
                step = 0 if r["model"] == base else r["step"]
                points[step] = points.get(step, {}) | r
            steps = sorted(points)
            bounds = [points[step]["nats_per_token"] for step in steps]
            left.plot(steps, bounds, marker="o", markersize=3, color=colour, label=name)
            answered = [points[step] for step in steps if "stops" in points[step]]
            for key, what in (("stops", "ends"), ("in_format", "in the asked format")):
                if answered and key in answered[-1]:
                    bars.append((f"{name}: {what}", answered[0][key], answered[-1][key], colour))
        for i, (_, before, after, colour) in enumerate(bars[::-1]):
            right.barh(i - 0.18, after, 0.32, color=colour)
            right.barh(i + 0.18, before, 0.32, color=GREY)
            for at, share in ((i + 0.18, before), (i - 0.18, after)):
                right.text(share + 0.01, at, f"{share:.0%}", va="center", fontsize=8)
        right.set_yticks(range(len(bars)), [label for label, *_ in bars[::-1]])
        left.set(xlabel="steps of tuning", ylabel="bound, nats per token of the answer", ylim=(0, None))
        left.legend(frameon=False, fontsize=8)
        right.set(xlabel="share of written answers; grey: before tuning", xlim=(0, 1.12))
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(
            _OUTPUT.value, transparent=True, metadata={"Date": None} if _OUTPUT.value.endswith("svg") else None
        )


if __name__ == "__main__":
    entry_point.run(main)
