"""Accounts for the time of a run: how much of it went into steps that count, and what the rest was spent on.

The kinds of time, in seconds on the clock of the wall:

  startup     from the birth of the process to the first batch: imports, devices, data, reading a checkpoint
  compile     compiling the train step, with the first step of each width
  train       steps
  data        waiting for a batch while the devices had nothing to do
  checkpoint  the stall of a step by saving; the files are written later, while training goes on
  evaluate    validation and samples, with what they compile
  redone      steps that a killed start had done beyond the checkpoint from which the next start went on
  down        from the last log line of a start to the birth of the next one, with the steps after that line

The goodput is the share of `train` in the whole. Each record of a log line in metrics.jsonl has the seconds of its
start ("this_start/KIND") and of the whole run ("goodput/KIND"), so a kill loses no more than the time since the last
log line. A run that resumes drops the records beyond its checkpoint. It therefore writes the account of all earlier
starts into its line of starts.jsonl first ("earlier").
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

KINDS = ("startup", "compile", "train", "data", "checkpoint", "evaluate")
LOST = ("redone", "down")


class Stopwatch:
    """Divides the time of this start among the kinds. At any time exactly one kind is counted, at first `startup`."""

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.monotonic):
        """Starts to count.

        Args:
          began: The time at which the process began, in seconds since 1970. None means now.
          clock: The clock that measures durations.
        """
        self.began = time.time() if began is None else began
        self.earlier: dict = {}  # the account of the earlier starts, see `account`
        self._clock = clock
        self._since = clock() - (time.time() - self.began)
        self._seconds, self._kind = dict.fromkeys(KINDS, 0.0), KINDS[0]

    def start(self) -> dict:
        """Returns what starts.jsonl says of this start."""
        startup = round(self.seconds()["startup"], 3)
        return {"began": round(self.began, 3), "startup_seconds": startup, "earlier": self.earlier}

    def switch(self, kind: str) -> str:
        """Counts another kind from now on. Returns the kind that was counted until now."""
        now, before = self._clock(), self._kind
        self._seconds[before] += now - self._since
        self._since, self._kind = now, kind
        return before

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Counts a kind until the block ends, and then again the kind before it."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, seconds: float, kind: str) -> None:
        """Counts seconds that have just passed as another kind than the current one."""
        self._seconds[self._kind] -= seconds
        self._seconds[kind] += seconds

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of this start by kind."""
        self.switch(self._kind)
        return dict(self._seconds)

    def record(self) -> dict[str, float]:
        """Returns the values for the record of a log line, without the kinds that have not occurred."""
        mine = self.seconds()
        whole = added(self.earlier.get("seconds", {}), mine)
        values = {f"this_start/{kind}": seconds for kind, seconds in mine.items()}
        values |= {f"goodput/{kind}": seconds for kind, seconds in whole.items()}
        found = {name: round(seconds, 3) for name, seconds in values.items() if seconds}
        return found | {"goodput": round(share(whole), 4), "time": round(time.time(), 3)}


class Device:
    """Knows when the devices of this process have finished the newest step, to tell how long they had nothing to do."""

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._end: Future[float] | None = None

    def follow(self, value: Any) -> None:
        """Makes a step that was just dispatched the newest one; `value` is an array of its results."""
        self._end = self._executor.submit(_finished, value)

    def idle(self, since: float) -> float:
        """Returns the seconds from `since` (of time.perf_counter) to now in which the devices had nothing to do."""
        if self._end is not None and not self._end.done():
            return 0.0
        return max(0.0, time.perf_counter() - max(since, self._end.result() if self._end else since))

    def close(self) -> None:
        """Ends the thread, without waiting for the devices."""
        self._executor.shutdown(wait=False)


def _finished(value: Any) -> float:
    with contextlib.suppress(Exception):  # the training loop raises the same error
        value.block_until_ready()
    return time.perf_counter()


def process_began() -> float:
    """Returns the time at which this process began, in seconds since 1970; on systems without /proc, the time now."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of proc(5), counted from the start of the machine
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()


def added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Returns the sums of two accounts, by kind."""
    return {kind: one.get(kind, 0.0) + other.get(kind, 0.0) for kind in (*KINDS, *LOST)}


def share(seconds: Mapping[str, float]) -> float:
    """Returns the goodput: the share of `train` in all seconds of an account."""
    return seconds.get("train", 0.0) / max(sum(seconds.values()), 1e-9)


def account(starts: Sequence[dict], records: Sequence[dict], step: int, began: float) -> dict:
    """Accounts for all starts of a run before a new one.

    Args:
      starts: The lines of starts.jsonl, without that of the new start.
      records: The records of metrics.jsonl, as the last start has left them.
      step: The step that the new start begins at.
      began: The time at which the process of the new start began, in seconds since 1970.

    Returns:
      A dict for starts.jsonl. {} means that there was no start before, or that the last one kept no account.
      seconds: The seconds of the run until `began`, by kind.
      start: What the last start did: its "seconds" by kind, and its last known "step" and "time".
    """
    if not starts or "began" not in starts[-1]:
        return {}
    last = latest(starts[-1], records)
    here = [one for one in records if one.get("time", 0) >= starts[-1]["began"] and one["step"] <= step]
    kept = [(one["step"], one.get("this_start/train", 0.0)) for one in here]
    base, trained = kept[-1] if kept else (starts[-1]["step"], 0.0)
    redone, reached = 0.0, max(base, step)
    if last["step"] > reached:  # between two log lines, all steps count as equally long
        redone = (last["seconds"].get("train", 0.0) - trained) * (last["step"] - reached) / (last["step"] - base)
    seconds = added(starts[-1].get("earlier", {}).get("seconds", {}), last["seconds"])
    seconds = added(seconds, {"train": -redone, "redone": redone, "down": max(0.0, began - last["time"])})
    return {"seconds": {kind: round(value, 3) for kind, value in seconds.items()}, "start": last}


def latest(start: Mapping, records: Sequence[dict]) -> dict:
    """Returns what is known of a start from its line of starts.jsonl and from the records of metrics.jsonl.

    Returns:
      A dict with the "seconds" of the start by kind, and the last "step" and "time" that are known of it.
    """
    for record in reversed(records):
        if record.get("time", 0) >= start["began"]:
            found = {kind: record.get(f"this_start/{kind}", 0.0) for kind in KINDS}
            return {"seconds": found, "step": record["step"], "time": record["time"]}
    known = start["began"] + start["startup_seconds"]  # it was killed before its first log line
    return {"seconds": {"startup": start["startup_seconds"]}, "step": start["step"], "time": known}


def read_lines(path: Path) -> list[dict]:
    """Returns the whole records of starts.jsonl or metrics.jsonl; [] if there is no such file."""
    return records_in(path.read_text(encoding="utf-8")) if path.exists() else []


def records_in(text: str) -> list[dict]:
    """Returns the records of a text of JSON lines that have a step. A line that a kill has torn is left out."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            found += [record] if isinstance(record, dict) and isinstance(record.get("step"), int) else []
    return found
