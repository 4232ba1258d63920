"""SIGTERM: noted, so that a run can save and leave; several processes agree on the step."""

import signal
import threading
from typing import Any

import jax
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from llada_jax.devices import distributed


class StopSignal:
    """Remembers SIGTERM, to this process or to any of several, so that the loop can save and leave.

    Until `listen` the signal ends the process at once, as it should while there is nothing to save: a long
    compilation would otherwise outlast the patience of whoever sent it.
    """

    def __init__(self):
        self._received = self._together = False
        self._before: Any = None

    def listen(self) -> None:
        """From here on the signal is only remembered. All processes must come here at the same step."""
        if distributed.count() > 1:
            if global_state.preemption_sync_manager is None:
                jax.config.update("jax_enable_preemption_service", True)
                global_state.initialize_preemption_sync_manager()
            self._together = True
        elif threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def received(self, step: int) -> bool:
        """Whether to stop at this step; several processes agree on it, some steps after the signal."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def _receive(self, *_: Any) -> None:
        self._received = True

    def close(self) -> None:
        """Restores what was there before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
