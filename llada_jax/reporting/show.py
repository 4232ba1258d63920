"""Shows a report: as lines of text, and as a page that refers to no other file."""

from llada_jax.cli import pages
from llada_jax.training.goodput import KINDS, LOST, share


def page(report: dict) -> str:
    """Returns the page of a report, as `gather.gather` returns it."""
    return pages.page(__package__, "report", report | {"kinds": (*KINDS, *LOST)})


def text(report: dict) -> str:
    """Returns the lines of a report for a person: the starts, where the time went, and what changed."""
    starts, whole = report["starts"], report["seconds"]
    count = f"{len(starts)} start{'s' * (len(starts) > 1)}"
    lines = [f"{report['workdir']}: step {report['step']:,} of {report['steps']:,}, {count}"]
    if whole:
        parts = ", ".join(f"{kind} {_duration(whole[kind])}" for kind in (*KINDS, *LOST) if whole.get(kind))
        lines.append(f"goodput {report['goodput']:.1%} of {_duration(sum(whole.values()))}: {parts}")
    shown = [kind for kind in (*KINDS, *LOST) if any(start["seconds"].get(kind) for start in starts)]
    table = [("start", "began (UTC)", "steps", "goodput", *shown)]
    for i, start in enumerate(starts, 1):
        seconds, began = start["seconds"], start["began"][:19].replace("T", " ")
        cells = (_duration(seconds[kind]) if seconds.get(kind) else "" for kind in shown)
        table.append((f"{i}", began, f"{start['step']:,} to {start['to']:,}", f"{share(seconds):.1%}", *cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for i, row in enumerate(table):
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        changes = starts[i - 1]["changes"] if i else {}
        lines += [f"       {name}: {before} -> {after}" for name, (before, after) in changes.items()]
    lines += [one["text"] for one in report["spikes"]]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """Formats seconds as 4.2 s below a minute, else as 1:02:03 or 2d 03:04:05."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock:0>8}" if days else clock
