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


def main(_) -> None:
    """Draws the picture."""
    records = [json.loads(line) for name in _INPUTS.value for line in Path(name).read_text().splitlines()]
    base = records[0]["model"]
    names = list(dict.fromkeys(Path(record["set"]).name for record in records))
    with plt.rc_context({"text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
                         "axes.edgecolor": GREY, "font.size": 9, "svg.hashsalt": "llada_jax"}):  # fmt: skip
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for name, colour in zip(names, COLOURS, strict=False):
            mine = [r for r in records if Path(r["set"]).name == name]
            points = (
                sorted((0 if r["model"] == base else r["step"], r) for r in mine)
                if all("step" in r for r in mine)
                else []
            )
            steps = [step for step, _ in points]
            left.plot(
                steps, [r["nats_per_token"] for _, r in points], marker="o", markersize=3, color=colour, label=name
            )
            for key, style in (("in_format", "-"), ("stops", ":")):
                drawn = [(step, r[key]) for step, r in points if key in r]
                if drawn:
                    label = f"{name}: {'in the asked format' if key == 'in_format' else 'ends'}"
                    right.plot(*zip(*drawn, strict=True), style, marker="o", markersize=3, color=colour, label=label)
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
