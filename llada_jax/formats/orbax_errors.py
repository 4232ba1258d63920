"""Failures of Orbax and TensorStore, said by us in one line instead of by them in dozens of tracebacks."""

import functools
import logging
import sys
from typing import Any


def one_line(error: BaseException) -> str:
    """What is behind an exception of Orbax or TensorStore."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split("\n")[0].split())
    if len(text) > 300:
        text = f"{text[:100]} ... {text[-195:]}"  # TensorStore starts with what it did and ends with the cause
    return text if type(error).__module__.startswith("llada_jax") else f"{type(error).__name__}: {text}"


@functools.cache
def quiet() -> None:
    """Keeps Orbax from telling of a failure itself, in dozens of tracebacks from its threads: we say it in a line."""
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "/orbax/" not in record.getMessage())
    before = sys.unraisablehook

    def hook(event: Any) -> None:
        # Reads and writes that were still under way when one of them failed.
        if "Event loop is closed" not in str(event.exc_value) and "_read_array_index" not in repr(event.object):
            before(event)

    sys.unraisablehook = hook
