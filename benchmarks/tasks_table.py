"""Makes a table and a picture of the output of benchmarks/tasks.py.

    python benchmarks/tasks_table.py --input=tasks.jsonl --output=benchmarks/tasks.svg > table.md

The table goes to stdout, as Markdown. "Signs" are the digits or letters of the results that are at their place. The
speed is the number of tokens per second, as a ratio to that of the exact sampler: one token per step, without a cache,
in blocks of --block_length tokens. Both are medians over the batches, and the ratio is that of the medians.
--clock=cpu_seconds takes the CPU time, where other load made the clock useless. Shares of right answers have their 95 %
interval (Wilson's). --compact makes a shorter table without intervals, in which the caches stand beside each other, and
the tasks in one cell. The picture has a panel for each task: right answers against speed. Longer blocks have larger
marks. It needs the extra `plots`.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import scipy.stats
from tasks import VARIED

from llada_jax.cli.paths import expanded_path

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = ("#888888", "#1f6fb4", "#d9730d", "#2b8a3e", "#8f4ab8", "#c2255c", "#0b8a8a")
MARKERS = {"none": "o", "prefix": "^", "dual": "s", "causal": "*"}
TICKS = (0.5, 1, 2, 4, 8, 16, 32)
GREY = "#888888"  # is readable on light and dark pages
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY),
    "font.size": 9,
    "svg.hashsalt": "llada_jax",  # A fixed salt makes the same input give the same file.
}


def wilson(right: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, by Wilson's formula, which also holds near 0 and 1."""
    interval = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    return interval.low, interval.high


def summary(lines: list[dict], clock: str) -> dict[str, float]:
    """Returns what the batches of one task and setting come to."""
    count, right = (sum(line[name] for line in lines) for name in ("problems", "correct"))
    low, high = wilson(right, count)
    tokens, passes = (sum(line[name] for line in lines) for name in ("tokens", "passes"))
    return {
        "correct": right / count,
        "low": low,
        "high": high,
        "passes": passes / count,
        "tokens_per_pass": tokens / passes,
        "parts": sum(line["right"] * line["problems"] for line in lines) / count,
        "rate": statistics.median(line["tokens"] / line[clock] for line in lines),
    }


def _varied(key: tuple) -> dict:
    return dict(zip(VARIED, key, strict=True))


def label(varied: dict, gen_length: int) -> str:
    """Returns the name of a rule with its bound, if it is not the default one."""
    name = varied["commit"]
    if name == "schedule":
        blocks = -(-gen_length // varied["block_length"])
        name += f", {round(varied['block_length'] / (varied['steps'] / blocks))} per step"
    for key in ("commit_bound", "remasking", "revoke", "length"):
        if varied[key] is not None:
            name += f", {varied[key]}"
    return name


def whole(table: dict[tuple, dict[str, dict]], gen_length: int) -> Iterator[list[str]]:
    """Yields the cells of the rows of the table, a row for each setting."""
    tasks = list(next(iter(table.values())))
    head = ["rule", "cache", "block"]
    for task in tasks:
        head += [f"{task}: right (95 %)", "signs", "tokens per pass", "speed"]
    yield head
    yield ["---"] * len(head)
    for key, each in table.items():
        varied = _varied(key)
        cells = [label(varied, gen_length), varied["cache"], str(varied["block_length"] or "")]
        for task in tasks:
            p = each[task]
            cells += [f"{100 * p['correct']:.1f} % ({100 * p['low']:.1f} to {100 * p['high']:.1f})"]
            cells += [f"{100 * p['parts']:.0f} %", f"{p['tokens_per_pass']:.2f}", f"{p['speed']:.2f}"]
        yield cells


def compact(table: dict[tuple, dict[str, dict]], gen_length: int) -> Iterator[list[str]]:
    """Yields the cells of the rows of the table, a row for the settings that differ in their cache alone."""
    at = VARIED.index("cache")
    caches = list(dict.fromkeys(key[at] for key in table))
    head = ["rule", "block", "tokens per pass"]
    for cache in caches:
        head += [f"{cache}: right, %", "speed"]
    yield head
    yield ["---"] * len(head)
    for key in dict.fromkeys((*key[:at], caches[0], *key[at + 1 :]) for key in table):
        varied = _varied(key)
        found = [table.get((*key[:at], cache, *key[at + 1 :])) for cache in caches]
        some = next(filter(None, found))
        cells = [label(varied, gen_length), str(varied["block_length"] or "")]
        cells.append(", ".join(f"{p['tokens_per_pass']:.1f}" for p in some.values()))
        for each in found:
            points = each.values() if each else ()
            cells.append(", ".join(f"{100 * p['correct']:.1f}" for p in points))
            cells.append(", ".join(f"{p['speed']:.1f}" for p in points))
        yield cells


def _size(block_length: int) -> float:
    return 2 + block_length / 8


def _mark(label: str, **how) -> plt.Line2D:
    return plt.Line2D([], [], linestyle="", color=GREY, label=label, **how)


def picture(table: dict[tuple, dict[str, dict]], gen_length: int, output: Path) -> None:
    """Draws the share of right answers against the speed, with a panel for each task."""
    tasks = list(dict.fromkeys(task for each in table.values() for task in each))
    rules = list(dict.fromkeys(key[0] for key in table))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(tasks), figsize=(9, 3.6), layout="constrained", sharex=True)
        for task, axes in zip(tasks, panels, strict=True):
            for key, each in table.items():
                varied, point = _varied(key), each[task]
                colour = COLOURS[rules.index(varied["commit"])]
                axes.errorbar(
                    point["speed"], 100 * point["correct"],
                    [[100 * (point["correct"] - point["low"])], [100 * (point["high"] - point["correct"])]],
                    marker=MARKERS[varied["cache"]], markersize=_size(varied["block_length"] or gen_length),
                    elinewidth=0.5, alpha=0.85, color=colour, markerfacecolor="none" if varied["revoke"] else colour,
                    fillstyle="left" if varied["length"] else "full", markerfacecoloralt="none",
                )  # fmt: skip
            axes.set(xlabel="tokens per second, times the exact sampler's", title=task, xscale="log")
            axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS], minor=False)
            axes.xaxis.set_minor_locator(plt.NullLocator())
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set(ylabel="right answers, %")
        handles = [
            plt.Line2D([], [], marker="o", linestyle="", color=c, label=r) for c, r in zip(COLOURS, rules, strict=False)
        ]
        column = {name: {key[VARIED.index(name)] for key in table} for name in VARIED}
        handles += [_mark(f"cache {c}", marker=m) for c, m in MARKERS.items() if c in column["cache"]]
        if column["revoke"] - {None}:
            handles.append(_mark("takes tokens back", marker="o", markerfacecolor="none"))
        if column["length"] - {None}:
            handles.append(_mark("finds the length", marker="o", fillstyle="left", markerfacecoloralt="none"))
        for length in sorted(column["block_length"] - {None}):
            handles.append(_mark(f"blocks of {length}", marker="o", markersize=_size(length)))
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
        figure.savefig(output, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=expanded_path, required=True)
    parser.add_argument("--output", type=expanded_path, help="the picture, an .svg file")
    parser.add_argument("--block_length", type=int, default=24, help="of the exact sampler that others are compared to")
    parser.add_argument("--compact", action="store_true", help="a shorter table, with the caches beside each other")
    parser.add_argument("--clock", choices=("seconds", "cpu_seconds"), default="seconds", help="what the speed counts")
    args = parser.parse_args()

    groups: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for text in args.input.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        groups[tuple(line.get(name) for name in VARIED)][line["task"]].append(line)
    gen_length = line["gen_length"]
    table = {key: {task: summary(lines, args.clock) for task, lines in each.items()} for key, each in groups.items()}
    blocks = -(-gen_length // args.block_length)
    one_by_one = {"commit": "schedule", "steps": blocks * args.block_length, "cache": "none"}
    exact = table[tuple((one_by_one | {"block_length": args.block_length}).get(name) for name in VARIED)]
    for each in table.values():
        for task, point in each.items():
            point["speed"] = point["rate"] / exact[task]["rate"]
    for cells in (compact if args.compact else whole)(table, gen_length):
        print("| " + " | ".join(cells) + " |")
    if args.output:
        picture(table, gen_length, args.output)


if __name__ == "__main__":
    main()
