"""Draws what benchmarks/tuning.py printed: python benchmarks/curves.py --input=tuning.jsonl --output=tuning.svg

Left, the bound on held-out answers given their prompts, a line for each set; right, the share of written answers that
end in the asked format, where --format was given, and that end at all. Step 0 is the model that was tuned: it has to be
the first --model in the file. Needs the extra `plots`.
"""

import json
from pathlib import Path

import matplotlib
from absl import app, flags

matplotlib.use("svg")
import matplotlib.pyplot as plt

_INPUTS = flags.DEFINE_multi_string("input", None, "Files of JSON lines.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Picture to write: .svg or .png.", required=True)

COLOURS = ("#1f6fb4", "#d9730d", "#2b8a3e", "#8f4ab8")
GREY = "#888888"  # reads on light and dark pages
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY),
    "font.size": 9,
    "svg.hashsalt": "llada_jax",  # the same file from the same lines
}


def main(_) -> None:
    """Draws the picture."""
    records = [json.loads(line) for name in _INPUTS.value for line in Path(name).read_text().splitlines()]
    base = records[0]["model"]
    names = list(dict.fromkeys(Path(record["set"]).name for record in records))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for i, name in enumerate(names):
            colour = COLOURS[i % len(COLOURS)]
            # Lines on one step complete each other, the last one counts; of the base it is its newest checkpoint's.
            points: dict[int, dict] = {}
            for r in (r for r in records if Path(r["set"]).name == name):
                step = 0 if r["model"] == base else r["step"]
                points[step] = points.get(step, {}) | r
            steps = sorted(points)
            bounds = [points[step]["nats_per_token"] for step in steps]
            left.plot(steps, bounds, marker="o", markersize=3, color=colour, label=name)
            for key, what, line in (("in_format", "ends in the asked format", "-"), ("stops", "ends", ":")):
                drawn = [(step, points[step][key]) for step in steps if key in points[step]]
                if drawn:
                    shares = tuple(zip(*drawn, strict=True))
                    right.plot(*shares, line, marker="o", markersize=3, color=colour, label=f"{name}: {what}")
        left.set(xlabel="steps of tuning", ylabel="bound, nats per token of the answer", ylim=(0, None))
        right.set(xlabel="steps of tuning", ylabel="share of written answers", ylim=(-0.03, 1.03))
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(
            _OUTPUT.value, transparent=True, metadata={"Date": None} if _OUTPUT.value.endswith("svg") else None
        )


if __name__ == "__main__":
    app.run(main)
