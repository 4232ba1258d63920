"""Reports failures of Orbax and TensorStore in one line instead of dozens of tracebacks."""

import functools
import logging
import sys
from typing import Any


def one_line(error: BaseException) -> str:
    """Returns one line that describes the root cause of an exception of Orbax or TensorStore."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split("\n")[0].split())
    if len(text) > 300:
        text = f"{text[:100]} ... {text[-195:]}"  # TensorStore names the operation first and the cause last
    return text if type(error).__module__.startswith("llada_jax") else f"{type(error).__name__}: {text}"


@functools.cache
def quiet() -> None:
    """Stops Orbax from printing dozens of tracebacks from its threads when it fails.

    This package reports such a failure itself, in one line.
    """
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "/orbax/" not in record.getMessage())
    before = sys.unraisablehook

    def hook(event: Any) -> None:
        # Ignore reads and writes that were still in progress when another one failed.
        if "Event loop is closed" not in str(event.exc_value) and "_read_array_index" not in repr(event.object):
            before(event)

    sys.unraisablehook = hook
