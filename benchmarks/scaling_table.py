"""Makes tables and a picture of the runs of benchmarks/scaling.py.

    python benchmarks/scaling_table.py --input=runs/scaling/runs.jsonl --picture=scaling.svg

Tables:

  rates     The results by learning rate, those of one width and budget. The best should not be the lowest or highest.
  budgets   For each budget of FLOPs and kind of model: the width that did best, and its result. The width should not be
            the smallest or largest one of the grid, or a better one may be missing.
  fits      L = a C^-b through the best results of the budgets C. It is a line through their logarithms, by least
            squares, with intervals of 95 % by Student's distribution, as if the results lay around a line by chance.
            They have few degrees of freedom and say nothing of budgets outside the measured ones. Results
            above 97 % of what the frequencies of tokens give take no part: such a model has hardly learned from
            context.
  ratios    How many times the compute of the baseline a kind takes for the same loss, by the two lines, at its own
            budgets. Only at losses that the baseline was measured at: none is extrapolated. The interval takes both
            lines as uncertain. What others found stands below.
  epochs    The results over a small part of the text, by the number of times that a run went over it. arXiv 2511.03276
            reports that masked diffusion overtakes autoregression there.

The baseline's results are exact, those of LLaDA upper bounds: a ratio is one for equal numbers, and may be too large
for equal likelihood. The picture needs the extra `plots`.
"""

import argparse
import dataclasses
import json
import math
import statistics
from collections import defaultdict

import numpy as np

from llada_jax.cli.paths import expanded_path

BASELINE = "autoregressive"
DRAWS = 20_000
LEARNED = 0.97  # of the nats per token by frequencies alone
# As they report it. Their models are larger by orders of magnitude.
OTHERS = (
    ("Nie et al., arXiv 2410.18514", "16"),
    ("Sahoo et al., arXiv 2602.15014, trained on the bound", "16"),
    ("Sahoo et al., arXiv 2602.15014, trained with plain cross-entropy", "14"),
)


@dataclasses.dataclass(frozen=True)
class Point:
    """The mean of the runs that differ in the seed only."""

    kind: str
    budget: float
    width: int
    flops: float
    tokens: int
    epochs: float
    nats: float
    error: float  # the largest standard error of the bound among the runs
    bits_per_byte: float
    unigram: float  # nats per token by the frequencies of tokens alone


def points(lines: list[dict], experiment: str) -> list[Point]:
    """Returns the points of an experiment, by kind, width and FLOPs."""
    groups = defaultdict(list)
    for line in lines:
        if line["experiment"] == experiment:
            groups[line["kind"], line["width"], line["steps"], line["budget"], line["learning_rate"]].append(line)
    found = []
    for (kind, width, _, budget, _), same in sorted(groups.items()):
        mean = {
            name: statistics.mean(line[name] for line in same)
            for name in ("nats_per_token", "bits_per_byte", "unigram_nats_per_token")
        }
        error = max(line["standard_error"] for line in same)
        values = (same[0][name] for name in ("flops", "tokens", "epochs"))
        found.append(Point(kind, budget, width, *values, mean["nats_per_token"], error, *list(mean.values())[1:]))
    return found


def envelope(found: list[Point], kind: str) -> list[Point]:
    """Returns the best point of each budget, the smallest budget first."""
    best: dict[float, Point] = {}
    for point in found:
        if point.kind == kind and (point.budget not in best or point.nats < best[point.budget].nats):
            best[point.budget] = point
    return [best[budget] for budget in sorted(best)]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A line log L = intercept + slope (log C - centre)."""

    centre: float  # the mean of log C
    intercept: float
    slope: float
    draws: np.ndarray  # (DRAWS, 2): intercepts and slopes by Student's distribution; one row of NaN if unknown

    def loss(self, flops: float | np.ndarray) -> float | np.ndarray:
        """Returns L at a budget of FLOPs."""
        return np.exp(self.intercept + self.slope * (np.log(flops) - self.centre))

    def band(self, flops: np.ndarray) -> np.ndarray:
        """Returns the lower and upper end of the interval of 95 % of L, (2, N)."""
        lines = self.draws[:, :1] + self.draws[:, 1:] * (np.log(flops) - self.centre)
        return np.exp(np.quantile(lines, (0.025, 0.975), axis=0))


def fit(flops: list[float], nats: list[float], seed: int = 0) -> Fit:
    """Fits L = a C^-b by least squares of the logarithms; two points give a line without intervals."""
    x, y = np.log(flops), np.log(nats)
    centre, free = x.mean(), len(x) - 2
    spread = ((x - centre) ** 2).sum()
    intercept, slope = y.mean(), ((x - centre) * y).sum() / spread
    draws = np.full((1, 2), np.nan)
    if free > 0:
        rest = ((y - intercept - slope * (x - centre)) ** 2).sum() / free
        errors = np.sqrt(rest * np.array([1 / len(x), 1 / spread]))  # independent, because x is centred
        rng = np.random.default_rng(seed)
        # The residual variance is common to both, so that they share the denominator of Student's distribution.
        scale = np.sqrt(rng.chisquare(free, (DRAWS, 1)) / free)
        draws = np.array([intercept, slope]) + errors * rng.standard_normal((DRAWS, 2)) / scale
    return Fit(float(centre), float(intercept), float(slope), draws)


def ratio(of: Fit, baseline: Fit, flops: float) -> tuple[float, float, float]:
    """Returns how many times the baseline's compute `of` takes for the loss that it has at `flops`, and the interval.

    An end of the interval is infinite if the baseline may not improve with compute at all.
    """

    def times(intercept, slope, base_intercept, base_slope):
        nats = intercept + slope * (math.log(flops) - of.centre)
        with np.errstate(divide="ignore"):
            needed = (nats - base_intercept) / np.minimum(base_slope, -1e-12) + baseline.centre
        return np.exp(np.clip(math.log(flops) - needed, -700, 700))

    value = times(of.intercept, of.slope, baseline.intercept, baseline.slope)
    low, high = np.quantile(times(*of.draws.T, *baseline.draws.T), (0.025, 0.975))
    return float(value), float(low), float(high)


def number(value: float) -> str:
    """Returns a number with two digits, or a dash."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.2g}" if value < 1000 else ("over 1e6" if value > 1e6 else f"{value:,.0f}")


def learned(best: list[Point]) -> list[Point]:
    """Returns the points that are clearly better than the frequencies of tokens."""
    return [point for point in best if point.nats < LEARNED * point.unigram]


def fits_of(found: list[Point]) -> dict[str, Fit]:
    """Returns the fit of each kind that has at least two points that learned."""
    fits = {}
    for kind in dict.fromkeys(point.kind for point in found):
        good = learned(envelope(found, kind))
        if len(good) > 1:
            fits[kind] = fit([point.flops for point in good], [point.nats for point in good])
    return fits


def compute_tables(found: list[Point]) -> list[str]:
    """Returns the lines of the tables of budgets, fits and ratios."""
    kinds = list(dict.fromkeys(point.kind for point in found))
    best = {kind: {point.budget: point for point in envelope(found, kind)} for kind in kinds}
    text = ["| FLOPs |" + "".join(f" {kind}: width | tokens | nats per token | bits per byte |" for kind in kinds)]
    text.append("|---" * (1 + 4 * len(kinds)) + "|")
    for budget in sorted({point.budget for point in found}):
        cells = [f"{budget:.2g}"]
        for kind in kinds:
            point = best[kind].get(budget)
            cells += _result(point) if point else ["-"] * 4
        text.append("| " + " | ".join(cells) + " |")
    fits = fits_of(found)
    text += ["", "| kind | points | exponent b (95 %) |", "|---|---|---|"]
    for kind, line in fits.items():
        low, high = np.quantile(-line.draws[:, 1], (0.025, 0.975))
        text.append(
            f"| {kind} | {len(learned(list(best[kind].values())))} | {-line.slope:.4f} ({low:.4f} to {high:.4f}) |"
        )
    text += ["", "| compute for equal loss, times the baseline's | nats per token | ratio (95 %) |", "|---|---|---|"]
    for kind in (kind for kind in fits if kind != BASELINE and BASELINE in fits):
        measured = [point.nats for point in best[BASELINE].values()]
        for point in learned(list(best[kind].values())):
            nats = float(fits[kind].loss(point.flops))
            if min(measured) <= nats <= max(measured):
                value, low, high = map(number, ratio(fits[kind], fits[BASELINE], point.flops))
                text.append(f"| {kind}, {point.budget:.2g} FLOPs | {nats:.3f} | {value} ({low} to {high}) |")
    return text + [f"| {name} | | {times} |" for name, times in OTHERS]


def _result(point: Point) -> list[str]:
    error = f" ± {point.error:.3f}" if point.error else ""
    return [str(point.width), f"{point.tokens:.2g}", f"{point.nats:.3f}{error}", f"{point.bits_per_byte:.3f}"]


def rates_table(lines: list[dict]) -> list[str]:
    """Returns the lines of the table of learning rates. The best result of each kind is in bold."""
    found = {(line["kind"], line["learning_rate"]): line for line in lines if line["experiment"] == "rates"}
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    best = {kind: min(line["nats_per_token"] for key, line in found.items() if key[0] == kind) for kind in kinds}
    text = ["| learning rate |" + "".join(f" {kind}, nats per token |" for kind in kinds)]
    text.append("|---" * (1 + len(kinds)) + "|")
    for rate in sorted({rate for _, rate in found}):
        cells = [f"{rate:.2g}"]
        for kind in kinds:
            nats = found[kind, rate]["nats_per_token"] if (kind, rate) in found else math.nan
            cells.append(f"**{nats:.3f}**" if nats == best[kind] else f"{nats:.3f}")
        text.append("| " + " | ".join(cells) + " |")
    return text


def epochs_table(found: list[Point]) -> list[str]:
    """Returns the lines of the table of epochs. The best result of each kind is in bold."""
    kinds = list(dict.fromkeys(point.kind for point in found))
    best = {kind: min(point.nats for point in found if point.kind == kind) for kind in kinds}
    text = ["| epochs | FLOPs |" + "".join(f" {kind}, nats per token |" for kind in kinds)]
    text.append("|---" * (2 + len(kinds)) + "|")
    for epochs, flops in sorted({(point.epochs, point.flops) for point in found}):
        cells = [f"{epochs:g}", f"{flops:.2g}"]
        for kind in kinds:
            same = [point for point in found if (point.kind, point.flops) == (kind, flops)]
            point = min(same, key=lambda point: point.nats, default=None)
            cell = _result(point)[2] if point else "-"
            cells.append(f"**{cell}**" if point and point.nats == best[kind] else cell)
        text.append("| " + " | ".join(cells) + " |")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=expanded_path, required=True, help="runs.jsonl")
    parser.add_argument("--picture", type=expanded_path, help="the picture, an .svg file")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.input.read_text(encoding="utf-8").splitlines()]
    compute, epochs = points(lines, "compute"), points(lines, "epochs")
    tables = [rates_table(lines)] if any(line["experiment"] == "rates" for line in lines) else []
    tables += [compute_tables(compute)] if compute else []
    tables += [epochs_table(epochs)] if epochs else []
    print("\n\n".join("\n".join(rows) for rows in tables))
    if args.picture:
        from scaling_picture import draw

        draw(compute, epochs, args.picture)


if __name__ == "__main__":
    main()
