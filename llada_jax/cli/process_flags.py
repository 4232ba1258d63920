"""The flags by which the processes of a run find each other where no cluster announces them."""

from absl import flags

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, where the processes meet. Needed only if no cluster announces several processes.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")


def given() -> tuple[str | None, int | None, int | None]:
    """Returns the values of the three flags, as `devices.distributed.run` takes them."""
    return _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
