"""Draws the picture of benchmarks/scaling_table.py; this needs the extra `plots`."""

from pathlib import Path

import numpy as np
from scaling_table import BASELINE, Point, envelope, fits_of, learned
from tasks_table import COLOURS, GREY, STYLE, plt

MARKERS = "osD^vP"
NAMES = {BASELINE: "autoregressive, exact", "llada": "LLaDA, bound", "llada_window": "LLaDA, t in (0.2, 0.9), bound"}


def draw(compute: list[Point], epochs: list[Point], output: Path) -> None:
    """Draws the loss against FLOPs with the fits on the left, and against epochs over little text on the right."""
    kinds = list(dict.fromkeys(point.kind for point in compute + epochs))
    colours = dict(zip(kinds, COLOURS[1:], strict=False))
    widths = sorted({point.width for point in compute})
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
        for kind in kinds:
            for width, marker in zip(widths, MARKERS, strict=False):
                same = [point for point in compute if (point.kind, point.width) == (kind, width)]
                left.plot(
                    [point.flops for point in same], [point.nats for point in same], marker=marker, markersize=4,
                    color=colours[kind], linewidth=0.5, alpha=0.6,
                )  # fmt: skip
            same = [point for point in epochs if point.kind == kind]
            right.errorbar(
                [point.epochs for point in same], [point.nats for point in same],
                [1.96 * point.error for point in same], marker="o", markersize=4, color=colours[kind], linewidth=1,
            )  # fmt: skip
        for kind, line in fits_of(compute).items():
            used = [point.flops for point in learned(envelope(compute, kind))]
            flops = np.geomspace(min(used), max(used), 50)
            left.plot(flops, line.loss(flops), color=colours[kind], linewidth=2)
            left.fill_between(flops, *line.band(flops), color=colours[kind], alpha=0.15, linewidth=0)
        unigram = [point.unigram for point in compute + epochs]
        for axes in (left, right):
            axes.axhline(unigram[0], color=GREY, linewidth=0.8, linestyle=":")
            axes.set(ylabel="nats per token, held-out text", xscale="log", yscale="log")
            axes.yaxis.set_major_locator(plt.MaxNLocator(6))
            axes.yaxis.set_major_formatter(plt.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(plt.NullLocator())
            axes.spines[["top", "right"]].set_visible(False)
        left.set(xlabel="FLOPs of training", title="equal compute; lines: fits of the best")
        right.set(xlabel="epochs over the same text", title="little text")
        if epochs:
            right.set_title(f"many epochs over {epochs[0].tokens / epochs[0].epochs:,.0f} tokens")
            ticks = sorted({point.epochs for point in epochs})
            right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            right.xaxis.set_minor_locator(plt.NullLocator())
        handles = [plt.Line2D([], [], color=colour, label=NAMES.get(kind, kind)) for kind, colour in colours.items()]
        handles += [
            plt.Line2D([], [], marker=marker, linestyle="", color=GREY, label=f"width {width}")
            for width, marker in zip(widths, MARKERS, strict=False)
        ]
        handles.append(plt.Line2D([], [], color=GREY, linestyle=":", label="frequencies of tokens"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(output, transparent=True, metadata={"Date": None})
