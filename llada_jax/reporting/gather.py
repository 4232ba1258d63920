"""Gathers what the files of a workdir say about a run: its starts, where its time went, its curves and its samples.

Everything comes from starts.jsonl, metrics.jsonl and samples.txt, which a run writes while it goes on. So a report can
be made at any time, also of a run that is going on or was killed. No checkpoint is read.
"""

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence

from llada_jax.storage import objects
from llada_jax.storage.objects import Place
from llada_jax.training.goodput import KINDS, LOST, added, latest, records_in, share

MOST_POINTS = 1000  # of a curve; if it has more, neighbours are averaged
MOST_SAMPLES = 200
BUCKET = "loss_t/"
# The curves of a page: title, unit, whether the axis is logarithmic, and the metrics with their names.
CURVES = (
    ("Loss and validation bound", "nats per token", False,
     (("loss", "training loss"), ("validation/nats_per_token", "validation bound"))),
    ("Validation bound", "bits per byte", False, (("validation/bits_per_byte", "bits per byte"),)),
    ("Learning rate", "", False, (("learning_rate", "learning rate"),)),
    ("Gradient norm, before clipping", "", True, (("grad_norm", "gradient norm"),)),
    ("Speed", "tokens per second", False, (("tokens_per_second", "tokens per second"),)),
    ("Model FLOPs utilization", "share of peak", False, (("mfu", "MFU"),)),
    ("Goodput of the run so far", "share of its time", False, (("goodput", "goodput"),)),
    ("Stall of a step by a checkpoint", "seconds", False, (("checkpoint_stall_seconds", "stall"),)),
    ("Waiting for data per step", "seconds", False,
     (("hosts/data_seconds_max", "slowest host"), ("hosts/data_seconds_median", "median of all hosts"))),
)  # fmt: skip
# What a line of starts.jsonl has beside the settings, and what may also change between two starts.
_AROUND = ("commit", "versions", "hardware", "xla_flags")


def read_text(folder: Place, name: str) -> str:
    """Returns the text of a file of a workdir; "" if it is missing. All files are read here."""
    try:
        return objects.read(folder / name).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""


def gather(folder: Place) -> dict:
    """Returns all that a report says of a run, as JSON values.

    Args:
      folder: The workdir of the run, which may lie in a bucket.

    Returns:
      A dict with
      workdir: The folder.
      step, steps: The last step of metrics.jsonl, and the steps of the whole run.
      seconds, goodput: Where the time of the run went, by kind (see `training/goodput.py`), and the share of `train`.
      starts: For each start: "began" (ISO time), "step" and "to" (its first and its last known step), "seconds" by
        kind, and "changes", the settings and surroundings that differ from the start before: name -> [before, after].
      curves: For each chart: "title", "unit", "log", and its "series", each with a "name" and "points", which are
        [step, mean, lowest, highest].
      spikes: The spikes of the loss or the gradient norm: "step", and "text", which describes it.
      samples: The samples: "step" and "text".
    """
    starts, records = (records_in(read_text(folder, name)) for name in ("starts.jsonl", "metrics.jsonl"))
    listed = _starts(starts, records)
    seconds = listed[-1]["seconds"] if listed else {}
    if starts:
        seconds = added(starts[-1].get("earlier", {}).get("seconds", {}), seconds)
    return {
        "workdir": str(folder),
        "step": records[-1]["step"] if records else 0,
        "steps": starts[-1]["config"]["steps"] if starts else 0,
        "seconds": {kind: seconds[kind] for kind in (*KINDS, *LOST) if seconds.get(kind)},
        "goodput": share(seconds),
        "starts": listed,
        "curves": _curves(records),
        "spikes": [{"step": r["step"], "text": r["spike/text"]} for r in records if "spike/text" in r],
        "samples": _samples(read_text(folder, "samples.txt")),
    }


def _starts(starts: Sequence[dict], records: Sequence[dict]) -> list[dict]:
    found = []
    for i, start in enumerate(starts):
        after = starts[i + 1].get("earlier") if i + 1 < len(starts) else None
        if after:
            before = start.get("earlier", {}).get("seconds", {})
            known, lost = after["start"], {k: after["seconds"].get(k, 0) - before.get(k, 0) for k in LOST}
        elif i + 1 == len(starts) and "began" in start:
            known, lost = latest(start, records), {}
        else:  # a start of a version that kept no account
            known, lost = {"seconds": {}, "step": start["step"]}, {}
        seconds = dict(known["seconds"]) | {kind: value for kind, value in lost.items() if value > 0}
        seconds["train"] = seconds.get("train", 0.0) - lost.get("redone", 0.0)
        began = start.get("began") or datetime.datetime.fromisoformat(start["time"]).timestamp()
        found.append(
            {
                "began": datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat(timespec="seconds"),
                "step": start["step"],
                "to": known["step"],
                "seconds": {kind: round(value, 3) for kind, value in seconds.items() if value},
                "changes": _changes(starts[i - 1], start) if i else {},
            }
        )
    return found


def _changes(before: Mapping, after: Mapping) -> dict[str, list]:
    """Returns what differs between two starts: dotted name -> [before, after]; None where there was no such value."""
    old, new = (
        dict(_leaves(start["config"], "config."))
        | dict(_leaves({name: start[name] for name in _AROUND if name in start}, ""))
        for start in (before, after)
    )
    return {name: [old.get(name), new.get(name)] for name in {**old, **new} if old.get(name) != new.get(name)}


def _leaves(node: Mapping, prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _curves(records: Sequence[dict]) -> list[dict]:
    buckets = sorted({name for record in records for name in record if name.startswith(BUCKET)})
    named = tuple((name, name.removeprefix(BUCKET)) for name in buckets)
    chosen = (*CURVES[:2], ("Loss by mask ratio", "nats per masked token", False, named), *CURVES[2:])
    found = []
    for title, unit, logarithmic, metrics in chosen:
        series = [{"name": name, "points": _points(records, metric)} for metric, name in metrics]
        series = [one for one in series if one["points"]]
        if series:
            found.append({"title": title, "unit": unit, "log": logarithmic, "series": series})
    return found


def _points(records: Sequence[dict], metric: str) -> list[list[float]]:
    """Returns [step, mean, lowest, highest] of a metric; each point stands for the same number of records."""
    values = [(r["step"], r[metric]) for r in records if isinstance(r.get(metric), int | float)]
    size = -(-len(values) // MOST_POINTS)
    found = []
    for begin in range(0, len(values), max(size, 1)):
        group = values[begin : begin + size]
        ys = [y for _, y in group]
        found.append([group[-1][0], *(float(f"{y:.6g}") for y in (sum(ys) / len(ys), min(ys), max(ys)))])
    return found


def _samples(text: str) -> list[dict]:
    """Returns the samples of a samples.txt, as `training/samples.py` writes it; if there are many, some of them."""
    blocks = re.split(r"^--- step (\d+)\n", text, flags=re.MULTILINE)
    found = [
        {"step": int(step), "text": body.rstrip("\n")} for step, body in zip(blocks[1::2], blocks[2::2], strict=True)
    ]
    if len(found) <= MOST_SAMPLES:
        return found
    return [found[i * (len(found) - 1) // (MOST_SAMPLES - 1)] for i in range(MOST_SAMPLES)]
