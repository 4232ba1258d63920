"""Finds out which host keeps the others waiting.

All hosts take the same time for a step, because each of them waits for all others in it. What tells them apart is how
long the devices of a host had nothing to do before a step, because the host was late with its batch: the devices of the
other hosts are busy then, since they have begun the step and wait in it. A host whose devices compute slowly cannot be
found in this way; a profile shows it.

Each process publishes its figures at a log line and waits for nobody. Process 0 reads what is there.
"""

import platform
import statistics

from llada_jax.devices import distributed

# A host is clearly slower if it is late by this share of a step, and by so many times the median of the others.
SHARE, TIMES = 0.1, 3.0
_KEY = "hosts"


class Hosts:
    """The delays of this process since the last log line and, in process 0, those of all processes."""

    def __init__(self):
        self._steps, self._data, self._idle = 0, 0.0, 0.0
        self._suspect: int | None = None  # the process that was clearly slower at the last log line
        self._told: int | None = None

    def add(self, data: float, idle: float) -> None:
        """Adds a step.

        Args:
          data: The seconds in which the devices had nothing to do while the process waited for a batch.
          idle: The seconds in which they had nothing to do before the step, for any reason.
        """
        self._steps, self._data, self._idle = self._steps + 1, self._data + data, self._idle + idle

    def look(self, step_seconds: float) -> tuple[dict[str, float], str | None]:
        """Publishes the means of the steps since the last call, and compares all processes.

        Args:
          step_seconds: The seconds of a step.

        Returns:
          Values for the record of a log line, and a line that names the slowest host or None. The values of processes
          other than process 0 are not complete.
        """
        steps = max(self._steps, 1)
        mine = {"host": platform.node(), "data": self._data / steps, "idle": self._idle / steps}
        self._steps, self._data, self._idle = 0, 0.0, 0.0
        distributed.publish(_KEY, mine)
        found = distributed.published(_KEY) if distributed.index() == 0 else {distributed.index(): mine}
        waits = [one["data"] for one in found.values()]
        values = {"hosts/data_seconds_max": max(waits)}
        if len(found) == 1:
            return values, None
        slowest = max(found, key=lambda process: found[process]["idle"])
        idle = found[slowest]["idle"]
        others = statistics.median(one["idle"] for process, one in found.items() if process != slowest)
        values |= {"hosts/data_seconds_median": statistics.median(waits), "hosts/slowest": slowest}
        values |= {"hosts/idle_seconds_max": idle, "hosts/idle_seconds_median_of_others": others}
        slow = slowest if idle > SHARE * step_seconds and idle > TIMES * others else None
        # One log line may be chance, the second one in a row is not.
        tell = slow is not None and slow == self._suspect and slow != self._told
        self._told = slow if tell else self._told if slow is not None else None
        self._suspect = slow
        if not tell:
            return values, None
        return values, (
            f"process {slow} ({found[slow]['host']}) keeps the others waiting: it is late by {idle:.3g} s of a step of "
            f"{step_seconds:.3g} s, {found[slow]['data']:.3g} s of it waiting for data; the others by {others:.3g} s"
        )
