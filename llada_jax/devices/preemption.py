"""Remembers SIGTERM, so that a run can save and exit; several processes agree on the step at which they do so."""

import signal
import threading
from typing import Any

import jax
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from llada_jax.devices import distributed


class StopSignal:
    """Remembers a SIGTERM to any process of the run, so that the training loop can save and exit.

    Until `listen` is called, the signal ends the process at once. That is right while there is nothing to save:
    otherwise the process would finish a long compilation first, and its sender would not wait that long.
    """

    def __init__(self):
        self._received = self._together = False
        self._before: Any = None

    def listen(self) -> None:
        """Starts to remember the signal instead of ending at once. All processes must call this at the same step."""
        if distributed.count() > 1:
            if global_state.preemption_sync_manager is None:
                jax.config.update("jax_enable_preemption_service", True)
                global_state.initialize_preemption_sync_manager()
            self._together = True
        elif threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def received(self, step: int) -> bool:
        """Returns whether to stop at this step. Several processes agree on a step shortly after the signal."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def _receive(self, *_: Any) -> None:
        self._received = True

    def close(self) -> None:
        """Restores the signal handler that was in place before `listen`."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
