"""Makes a table and a picture of the output of benchmarks/reversal.py.

    python benchmarks/reversal_table.py --input=reversal.jsonl --output=benchmarks/reversal.svg > table.md

The table goes to stdout, as Markdown: the share of right answers over all seeds, with its 95 % interval (see
`interval`), and the lowest and the highest share of a single seed. The picture shows the same, with a panel for each
task; each point is a seed. It needs the extra `plots`.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import scipy.stats

from llada_jax.cli.paths import expanded_path

matplotlib.use("svg")
import matplotlib.pyplot as plt
from reversal_facts import BOTH, FORWARD, REVERSE
from tasks_table import COLOURS, GREY, STYLE, wilson

# (model, way of asking) -> the heading of its column, and the colour of its bars
COLUMNS = {
    ("arm", "written"): ("autoregressive", COLOURS[2]),
    ("arm", "chosen"): ("autoregressive, choosing", COLOURS[4]),
    ("llada", "written"): ("LLaDA", COLOURS[1]),
    ("llada", "filled"): ("LLaDA, filling in", COLOURS[3]),
}
CASES = (
    (FORWARD, FORWARD),
    (FORWARD, REVERSE),
    (REVERSE, REVERSE),
    (REVERSE, FORWARD),
    (BOTH, FORWARD),
    (BOTH, REVERSE),
)


class Share(NamedTuple):
    """The share of right answers of all seeds, its interval, and the shares of the single seeds."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]


Table = dict[str, dict[tuple[str, str], dict[tuple[str, str], Share]]]  # task -> case -> column


def table_of(records: Iterable[dict]) -> Table:
    """Returns the shares of each task, case (order seen, order asked for) and column of COLUMNS."""
    found = defaultdict(list)
    for record in records:
        for answer in record["answers"]:
            case, column = (answer["seen"], answer["asked"]), (record["model"], answer["way"])
            found[record["task"], case, column].append((answer["right"], answer["count"]))
    table: Table = {}
    for (task, case, column), pairs in found.items():
        right, count = map(sum, zip(*pairs, strict=True))
        seeds = tuple(r / n for r, n in pairs)
        table.setdefault(task, {}).setdefault(case, {})[column] = Share(
            right / count, *interval(seeds, right, count), seeds
        )
    return table


def interval(seeds: Sequence[float], right: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share.

    Each seed has a model of its own, which may have learned more or less. If the seeds differ it is Student's, over
    their shares; if they do not, Wilson's, over all answers.
    """
    if len(set(seeds)) == 1:
        return wilson(right, count)
    mean = statistics.mean(seeds)
    half = scipy.stats.t.ppf(0.975, len(seeds) - 1) * statistics.stdev(seeds) / math.sqrt(len(seeds))
    return max(0.0, mean - half), min(1.0, mean + half)


def markdown(table: Table) -> str:
    """Returns the table as Markdown."""
    lines = ["| task | seen | asked for | " + " | ".join(name for name, _ in COLUMNS.values()) + " |"]
    lines += ["|---" * (3 + len(COLUMNS)) + "|"]
    for task, cases in table.items():
        for case in CASES:
            if case in cases:
                cells = [_cell(cases[case][column]) if column in cases[case] else "" for column in COLUMNS]
                lines.append("| " + " | ".join([task, *case, *cells]) + " |")
    return "\n".join(lines)


def _cell(share: Share) -> str:
    mean, low, high, least, most = (100 * x for x in (*share[:3], min(share.seeds), max(share.seeds)))
    return f"{mean:.1f} % ({low:.1f} to {high:.1f}), seeds {least:.0f} to {most:.0f}"


def picture(table: Table, output: Path) -> None:
    """Draws bars with their intervals, and a point for each seed."""
    counts = [sum(case in cases for case in CASES) for cases in table.values()]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(table), figsize=(9, 3.6), layout="constrained", sharey=True, squeeze=False, width_ratios=counts
        )
        for (task, cases), axes in zip(table.items(), panels[0], strict=True):
            shown = [case for case in CASES if case in cases]
            for place, case in enumerate(shown):
                for i, (column, (_, colour)) in enumerate(COLUMNS.items()):
                    if column in cases[case]:
                        _bar(axes, place + (i - 1.5) * 0.21, cases[case][column], colour)
            labels = [f"seen {seen},\nasked {asked}" for seen, asked in shown]
            axes.set_xticks(range(len(shown)), labels, fontsize=7)
            axes.set(title=task, ylim=(0, 105))
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set(ylabel="right answers, %")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in COLUMNS.values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(output, transparent=True, metadata={"Date": None})


def _bar(axes: plt.Axes, at: float, share: Share, colour: str) -> None:
    """Draws a share with its interval at the right and the points of the seeds at the left of the bar's middle."""
    mean, low, high = (100 * x for x in share[:3])
    axes.bar(at, mean, 0.19, color=colour)
    axes.errorbar(at + 0.05, mean, [[max(0, mean - low)], [max(0, high - mean)]], color=GREY, elinewidth=1.5, capsize=2)
    points = [100 * x for x in share.seeds]
    style = {"linestyle": "", "marker": "o", "markersize": 2.5, "markeredgewidth": 0.7}
    axes.plot([at - 0.05] * len(points), points, color=colour, markeredgecolor=GREY, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=expanded_path, required=True)
    parser.add_argument("--output", type=expanded_path, help="the picture, an .svg file")
    args = parser.parse_args()
    table = table_of(map(json.loads, args.input.read_text(encoding="utf-8").splitlines()))
    print(markdown(table))
    if args.output:
        picture(table, args.output)


if __name__ == "__main__":
    main()
