"""Starts programs as several processes, for the tests of this folder."""

import importlib.util
import signal
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest
import tiny
from paths import PYTHONPATH

GONE = 60  # seconds from the end of one process until the launcher kills those that are left: none may be left by then
ALL = 600  # seconds until a start of the processes that does not end is killed


class End(NamedTuple):
    """How the processes of one start have ended."""

    codes: list[int]  # the exit code of each process
    said: str  # the output of all processes; every line begins with the index of its process


@pytest.fixture(scope="module")
def local():
    """Returns launch/local.py as a module."""
    spec = importlib.util.spec_from_file_location("local", tiny.ROOT / "launch" / "local.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def launch(local):
    """Returns launch(command, devices=1, meanwhile=None), which runs two processes of the command until they end.

    Each process has so many devices. More than one make it slow: each is a thread that waits for all others, and there
    are fewer cores. `meanwhile` is called with the processes as soon as they have started.
    """

    def start(command: list[str], devices: int = 1, meanwhile: Callable | None = None) -> End:
        flags = ["--processes=2", f"--devices={devices}", f"--patience={GONE}", "--"]
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", PYTHONPATH)
            patch.setattr(local, "print", lambda *line, **_: lines.append(*line), raising=False)
            job = local.Job(local.parse([*flags, *command]))
            hanging = threading.Timer(ALL, job.send, (signal.SIGKILL,))
            hanging.start()
            if meanwhile:
                meanwhile(job.processes)
            job.wait(threading.Event())
            hanging.cancel()
        return End([process.returncode for process in job.processes], "".join(lines))

    return start
