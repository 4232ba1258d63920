"""Makes a table and a picture of the output of benchmarks/stories.py.

    python benchmarks/stories_table.py --input=stories.jsonl --output=benchmarks/stories.svg > table.md

The table goes to stdout, as Markdown. The judge's nats per character are those of all continuations together, divided
by all their characters. The column behind them is the difference from the exact sampler of LLaDA (one token per step,
blocks of 32, no cache), for the same prompts. Both have their 95 % interval, by the bootstrap over prompts. Fewer nats
are not always better: dull and repetitive text has few. So diversity stands beside them: the share of different pairs
and triples of words among all of the continuations, and the share of continuations in which four words in a row occur
twice. The speed is the number of tokens per second, as a ratio to the exact sampler's, both medians over the batches;
--clock=cpu_seconds takes the CPU time, where other load made the clock useless.

The picture shows the nats per character against the speed, and against the share of different triples. It needs the
extra `plots`.
"""

import argparse
import json
import statistics
import string
from collections import defaultdict
from pathlib import Path

import numpy as np
from stories import AUTOREGRESSIVE, EXACT, TRUE, WAYS
from tasks_table import COLOURS, GREY, MARKERS, STYLE, TICKS, plt

from llada_jax.cli.paths import expanded_path

RESAMPLES = 10_000
SHAPES = {"remasking": "d", "revoke": "P"}  # the marks of the ways that have these fields
WIDTH = 4  # words in a row that count as repeated


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without the marks around them."""
    return [word for each in text.lower().split() if (word := each.strip(string.punctuation))]


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Returns all runs of n words in a text."""
    found = words(text)
    return [*zip(*(found[i:] for i in range(n)), strict=False)]


def distinct(texts: list[str], n: int) -> float:
    """Returns the number of different runs of n words in all texts, divided by the number of all runs."""
    found = [each for text in texts for each in ngrams(text, n)]
    return len({*found}) / max(len(found), 1)


def repeats(text: str) -> bool:
    """Returns whether some run of WIDTH words occurs twice in a text."""
    found = ngrams(text, WIDTH)
    return len({*found}) < len(found)


def resampled(nats_N: np.ndarray, characters_N: np.ndarray) -> np.ndarray:
    """Returns the nats per character of RESAMPLES draws of N prompts with replacement, the same draws in each call."""
    count = len(nats_N)
    drawn_RN = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    return nats_N[drawn_RN].sum(1) / characters_N[drawn_RN].sum(1)


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """Returns the bounds between which 95 % of the values are."""
    low, high = np.quantile(values_R, (0.025, 0.975))
    return float(low), float(high)


def summary(lines: list[dict], clock: str) -> dict:
    """Returns what the batches of one way come to; speed and passes only if something was written."""
    nats_N, characters_N = (np.concatenate([line[name] for line in lines]) for name in ("nats", "characters"))
    texts = [text for line in lines for text in line["texts"]]
    rates_R = resampled(nats_N, characters_N)
    point = {
        "count": len(texts),
        "nats": nats_N.sum() / characters_N.sum(),
        "resampled": rates_R,
        "interval": interval(rates_R),
        "bigrams": distinct(texts, 2),
        "trigrams": distinct(texts, 3),
        "repeats": sum(map(repeats, texts)) / len(texts),
    }
    if "passes" in lines[0]:
        point["tokens_per_pass"] = sum(line["tokens"] for line in lines) / sum(line["passes"] for line in lines)
        point["rate"] = statistics.median(line["tokens"] / line[clock] for line in lines)
    return point


def row(name: str, point: dict, exact: dict) -> str:
    """Returns the line of the table of one way."""
    low, high = interval(point["resampled"] - exact["resampled"])
    difference = "" if point is exact else f"{point['nats'] - exact['nats']:+.3f} ({low:+.3f} to {high:+.3f})"
    work = [f"{point['tokens_per_pass']:.2f}", f"{point['speed']:.2f}"] if "rate" in point else ["", ""]
    cells = [name, *work, "{:.3f} ({:.3f} to {:.3f})".format(point["nats"], *point["interval"]), difference]
    cells += [f"{100 * point[each]:.0f} %" for each in ("bigrams", "trigrams", "repeats")]
    return "| " + " | ".join(cells) + " |"


def kind(name: str) -> str:
    """Returns what the color of a way stands for."""
    return AUTOREGRESSIVE if name.startswith(AUTOREGRESSIVE) else str(WAYS[name].get("commit", "schedule"))


def marker(name: str) -> str:
    """Returns the shape of a way's mark."""
    if kind(name) == AUTOREGRESSIVE:
        return MARKERS["causal"]
    return next((SHAPES[field] for field in SHAPES if field in WAYS[name]), MARKERS[WAYS[name].get("cache", "none")])


def picture(table: dict[str, dict], output: Path) -> None:
    """Draws the nats per character against the speed and against the share of different triples of words."""
    written = {name: point for name, point in table.items() if "rate" in point}
    kinds = list(dict.fromkeys(map(kind, written)))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
        for name, point in written.items():
            colour, way = COLOURS[kinds.index(kind(name))], WAYS[name]
            fill = {0.0: "none", 1.0: "black"}.get(way.get("temperature"), colour)
            for axes, x in zip(panels, (point["speed"], 100 * point["trigrams"]), strict=True):
                low, high = point["interval"]
                axes.errorbar(
                    x, point["nats"], [[point["nats"] - low], [high - point["nats"]]], marker=marker(name),
                    color=colour, markerfacecolor=fill, elinewidth=0.5, alpha=0.85,
                )  # fmt: skip
        for axes in panels:
            if TRUE in table:
                axes.axhline(table[TRUE]["nats"], color=GREY, linewidth=0.8, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set(xlabel="tokens per second, times the exact sampler's", ylabel="judge's nats per character")
        panels[0].set_xscale("log")
        panels[0].set_xticks(TICKS, [f"{tick:g}" for tick in TICKS], minor=False)
        panels[0].xaxis.set_minor_locator(plt.NullLocator())
        panels[1].set(xlabel="different triples of words, %")
        if TRUE in table:
            panels[1].plot(100 * table[TRUE]["trigrams"], table[TRUE]["nats"], marker="x", color=GREY)
        marks = [(each, c, "*" if each == AUTOREGRESSIVE else "o", c) for each, c in zip(kinds, COLOURS, strict=False)]
        shapes = {f"cache {each}": MARKERS[each] for each in ("prefix", "dual")}
        shapes |= {"random order": SHAPES["remasking"], "takes tokens back": SHAPES["revoke"]}
        marks += [(text, GREY, shape, GREY) for text, shape in shapes.items()]
        marks += [("greedy", GREY, "o", "none"), ("temperature 1", GREY, "o", "black"), (TRUE, GREY, "x", GREY)]
        handles = [
            plt.Line2D([], [], linestyle="", label=text, color=colour, marker=shape, markerfacecolor=fill)
            for text, colour, shape, fill in marks
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(output, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=expanded_path, required=True)
    parser.add_argument("--output", type=expanded_path, help="the picture, an .svg file")
    parser.add_argument("--clock", choices=("seconds", "cpu_seconds"), default="seconds", help="what the speed counts")
    args = parser.parse_args()

    lines = [json.loads(text) for text in args.input.read_text(encoding="utf-8").splitlines()]
    # Only batches that all ways have, or the ways would be compared on different prompts.
    batches: dict[str, set[int]] = defaultdict(set)
    for line in lines:
        batches[line["way"]].add(line["batch"])
    common = set.intersection(*batches.values())
    table = {
        name: summary([line for line in lines if line["way"] == name and line["batch"] in common], args.clock)
        for name in WAYS
        if name in batches
    }
    exact = table[EXACT]
    for point in table.values():
        if "rate" in point:
            point["speed"] = point["rate"] / exact["rate"]
    print(
        f"{exact['count']} prompts each\n\n| way | tokens per pass | speed | nats per character (95 %) | "
        "against the exact sampler | different pairs | triples | repeating |"
    )
    print("|---" * 8 + "|")
    for name, point in table.items():
        print(row(name, point, exact))
    if args.output:
        picture(table, args.output)


if __name__ == "__main__":
    main()
