"""Starts a run of several processes, lets process 0 decide for all of them, and ends them together.

A run on one machine usually has a single process; the functions of this module then have nothing to coordinate. On
several hosts, each process runs the same command and finds the other processes in one of two ways:

  automatically  if JAX recognizes a cluster that announces several processes: Slurm (srun), Cloud TPU, GKE;
  by flags       if all N processes get --coordinator_address=HOST:PORT --num_processes=N --process_id=I.

All processes share one workdir, on a mounted file system or in a bucket. Process 0 alone makes every decision that does
not follow from the data that all processes share (Does a checkpoint exist? Is the workdir in use?); see
`first_decides`.

No process is left hanging. If a process fails, it announces its exit code, and the other processes exit with the same
code within seconds. If a process dies without announcing anything (kill -9, a lost host), its death is detected after
config.distributed.heartbeat_timeout seconds, and JAX then aborts the other processes (SIGABRT, exit code 134).

Decisions are sent through the key-value store of JAX's coordinator and not through the devices, because the store
exists before any device is initialized, and because a process can wait for a key in it.
"""

import collections
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src import clusters
from jax._src.distributed import global_state  # holds the client of the coordinator, for which JAX has no public name

from llada_jax.cli import entry_point, streams
from llada_jax.config import DistributedConfig, NonFinite, UserError

# The timeout of a wait. Preparing text may take hours, and a failing process ends the wait anyway.
_LONG_MS = 24 * 3600 * 1000
_LOOK_SECONDS = 2.0  # interval between two checks whether a process has failed
_TELL_SECONDS = 15.0  # how long a process waits for the others at the start before it prints that it is waiting
_FAILED = "llada_jax/failed/"
_TPU_CLUSTERS = ("gcetpu", "gketpu")

ABORTED = 134  # JAX's exit code when another process has died; the run is then worth restarting

_uses: collections.Counter = collections.Counter()
_alone: dict[str, Any] = {}  # what the only process has published
_leaving = threading.Lock()  # acquired by the thread that ends this process, and never released


def count() -> int:
    """Returns the number of processes of this run. Unlike jax.process_count, it does not initialize any device."""
    return global_state.num_processes if global_state.client else 1


def index() -> int:
    """Returns the index of this process, from 0. Unlike jax.process_index, it does not initialize any device."""
    return global_state.process_id if global_state.client else 0


def log(message: str) -> None:
    """Prints a line to stderr in process 0, and does nothing in the other processes.

    A line that nobody can read any more is dropped: a training run must outlive the terminal, or the `tee`, that shows
    its lines.
    """
    if index() == 0:
        try:
            print(message, file=sys.stderr, flush=True)
        except OSError:
            streams.drop(sys.stderr)


def first_decides(what: str, decide: Callable[[], Any]) -> Any:
    """Calls `decide` in process 0 only, and returns its result in every process.

    All processes must make their calls in the same order. If process 0 fails, `run` ends the other processes.

    Args:
      what: The name of the decision. It is part of the key in the store, which helps to find out where a run hangs.
      decide: A function whose result can be written as JSON. With several processes, tuples in it become lists.

    Returns:
      The result of `decide` in process 0.
    """
    if count() == 1:
        return decide()
    key = _key(what)
    if index() == 0:
        text = json.dumps(decide())
        global_state.client.key_value_set(key, text)
    else:
        text = global_state.client.blocking_key_value_get(key, _LONG_MS)
    return json.loads(text)


def check_same(what: str, mine: Any, explain: Callable[[Any], str]) -> None:
    """Checks that a value is the same in this process as in process 0.

    Args:
      what: The name of the value, as for `first_decides`.
      mine: The value of this process. It must be possible to write it as JSON.
      explain: A function that takes the value of process 0 and returns the error message.

    Raises:
      UserError: If the two values differ.
    """
    if count() == 1:
        return
    first = first_decides(what, lambda: mine)
    if json.dumps(first) != json.dumps(mine):
        raise UserError(f"process {index()} (of {count()}): {explain(first)}")


def first_problem(what: str, problem: str | None) -> str | None:
    """Returns the same problem in every process, or None if no process has a problem.

    Waits until all processes have called it.

    Args:
      what: The name of what is checked, as for `first_decides`.
      problem: A description of the problem of this process; None if it has no problem.

    Returns:
      The problem of the process with the lowest index among those that have one.
    """
    if count() == 1:
        return problem
    key = _key(what)
    if problem is not None:
        where = problem if index() == 0 else f"process {index()}: {problem}"
        global_state.client.key_value_set(f"{key}/{index():08}", where)
    global_state.client.wait_at_barrier(key, _LONG_MS)
    return next((text for _, text in sorted(global_state.client.key_value_dir_get(key + "/"))), None)


def publish(what: str, value: Any) -> None:
    """Puts a value of this process, which can be written as JSON, in place of its last one under the same name.

    Waits for no other process; `published` reads the values.
    """
    if count() == 1:
        _alone[what] = value
        return
    global_state.client.key_value_set(f"llada_jax/{what}/{index():08}", json.dumps(value), allow_overwrite=True)


def published(what: str) -> dict[int, Any]:
    """Returns the newest value that each process has published under a name, by the index of the process."""
    if count() == 1:
        return {0: _alone[what]} if what in _alone else {}
    found = global_state.client.key_value_dir_get(f"llada_jax/{what}/")
    return {int(key.rpartition("/")[2]): json.loads(text) for key, text in sorted(found)}


def barrier(what: str) -> None:
    """Waits until all processes have called it."""
    if count() > 1:
        global_state.client.wait_at_barrier(_key(what), _LONG_MS)


def _key(what: str) -> str:
    _uses[what] += 1
    return f"llada_jax/{what}/{_uses[what]}"


def announce(code: int) -> bool:
    """Announces to the other processes that this process fails with the exit code `code`.

    Returns:
      False if another process has announced a failure before: its message is then enough. True otherwise.
    """
    if count() == 1:
        return True
    try:
        global_state.client.key_value_set(_FAILED + "code", str(code))
    except jax.errors.JaxRuntimeError as error:
        return "ALREADY_EXISTS" not in str(error)
    return True


def run(
    main: Callable[[], int],
    settings: DistributedConfig,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """Connects to the other processes, if there are any, calls `main`, and ends all processes together.

    Args:
      settings: The time limits of config.distributed.
      main: The function that does the work of one process and returns its exit code.
      coordinator_address: The value of --coordinator_address, or None if the flag was not given.
      num_processes: The value of --num_processes, or None if the flag was not given.
      process_id: The value of --process_id, or None if the flag was not given.

    Returns:
      The exit code of `main`, if there is only one process or if `main` succeeds in all of them (it finished, or it was
      stopped and saved). Otherwise this function does not return: all processes exit with the exit code of the first
      process that failed, and one message is printed.

    Raises:
      UserError: If only some of the three flags are given, or if their values do not fit together.
    """
    _start(settings, coordinator_address, num_processes, process_id)
    if count() == 1:
        return main()
    finished = threading.Event()
    watch = threading.Thread(target=_watch, args=(finished, settings), name="other processes", daemon=True)
    watch.start()
    code, raised = _call(main)
    if raised or code not in (entry_point.FINISHED, entry_point.PREEMPTED):
        announce(code)
        _leave(settings)
    barrier("end")
    finished.set()
    watch.join()
    return code


def _call(main: Callable[[], int]) -> tuple[int, bool]:
    """Calls `main` and prints its errors; returns its exit code and whether it raised an exception."""
    try:
        return main(), False
    except UserError as error:
        if announce(entry_point.USER_ERROR):
            entry_point.print_error(str(error))
        return entry_point.USER_ERROR, True
    except NonFinite as error:
        if announce(entry_point.FAILURE):
            entry_point.print_error(str(error))
        return entry_point.FAILURE, True
    except KeyboardInterrupt:
        return entry_point.INTERRUPTED, True
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else entry_point.FAILURE, True
    except BaseException:
        if not _leaving.locked():  # otherwise the exception is only a consequence of the end of another process
            print(f"process {index()} (of {count()}):\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return entry_point.FAILURE, True


def _watch(finished: threading.Event, settings: DistributedConfig) -> None:
    """Ends this process when another process has failed, because the main thread may wait for it forever."""
    while not finished.wait(_LOOK_SECONDS):
        try:
            if global_state.client.key_value_dir_get(_FAILED):
                _leave(settings)
        except jax.errors.JaxRuntimeError:
            return  # the coordinator is gone, so JAX itself ends this process


def _leave(settings: DistributedConfig) -> NoReturn:
    """Ends this process with the announced exit code as soon as all processes are about to exit, without clean-up.

    A clean-up would wait for the other processes, for example for their files of a checkpoint or in a collective.
    Half-written files look like those that a killed process leaves behind; the next start finds and removes them.
    """
    with _leaving:
        code = ABORTED
        try:
            code = int(global_state.client.key_value_dir_get(_FAILED)[0][1])
            global_state.client.wait_at_barrier("llada_jax/leaving", settings.shutdown_timeout * 1000)
        except (jax.errors.JaxRuntimeError, IndexError):
            # A process is dead or stuck, and most likely caused the exception in this one. ABORTED instead of FAILURE
            # tells the launcher that another start is worthwhile.
            code = ABORTED if code == entry_point.FAILURE else code
        if index() == 0:
            time.sleep(0.5)  # process 0 runs the coordinator and must exit last, or JAX aborts the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _start(
    settings: DistributedConfig, coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    flags = (coordinator_address, num_processes, process_id)
    timeouts = {
        "heartbeat_timeout_seconds": settings.heartbeat_timeout,
        "shutdown_timeout_seconds": settings.shutdown_timeout,
        "initialization_timeout": settings.initialization_timeout,
    }
    if any(flag is not None for flag in flags):
        where = _check_flags(*flags)
        options = {"cluster_detection_method": "deactivate"}
    elif jax.distributed.is_initialized() or (cluster := _cluster()) is None:
        return
    else:
        where, flags = f"the coordinator that {cluster.name} announces", (None, None, None)
        options = {"cluster_detection_method": cluster.name}
        if cluster.name == "slurm":
            options["local_device_ids"] = _slurm_devices()
    # devices/preemption.py starts this service after the first step; until then SIGTERM ends a process at once.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX waits without printing anything, and aborts with exit code 134 when the time is over.
    late = f"waiting for the other processes at {where}, for at most {settings.initialization_timeout} seconds"
    waiting = threading.Timer(_TELL_SECONDS, lambda: print(late, file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    jax.distributed.initialize(*flags, **options, **timeouts)
    waiting.cancel()


def _check_flags(address: str | None, processes: int | None, process: int | None) -> str:
    """Returns the address, or raises UserError if the three flags do not fit together."""
    if address is None or processes is None or process is None:
        raise UserError(
            "--coordinator_address=HOST:PORT, --num_processes and --process_id belong together: give all three"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator_address={address} is not HOST:PORT: give the host and port where process 0 will listen"
        )
    if processes < 1:
        raise UserError(f"--num_processes={processes}: it must be at least 1")
    if not 0 <= process < processes:
        raise UserError(
            f"--process_id={process}: with --num_processes={processes} it must be from 0 to {processes - 1}"
        )
    return address


def _cluster() -> type[clusters.ClusterEnv] | None:
    """Returns JAX's class for the cluster that this process runs in, or None.

    The result is None if JAX recognizes no cluster, or if the cluster does not announce more than one process.
    """
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method or not _may_ask(kind):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kind.is_env_present():
                    return kind if kind.get_process_count() > 1 else None
        except (ImportError, OSError):
            pass  # a TPU machine without the metadata server that lists other hosts, or without a package to query it
    return None


def _may_ask(kind: type[clusters.ClusterEnv]) -> bool:
    if kind.name in _TPU_CLUSTERS:  # with JAX_PLATFORMS=cpu, a process is not part of a TPU cluster
        return os.environ.get("JAX_PLATFORMS", "tpu") != "cpu"
    # JAX takes any pod for part of a cluster, even the pod of a notebook. It would then query Kubernetes, which may
    # refuse to answer. Only the pods of an indexed job have JOB_COMPLETION_INDEX.
    return kind.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ


def _slurm_devices() -> list[int] | None:
    """Returns the indices of all GPUs of the node if this Slurm task is the only one on it; None otherwise.

    None leaves JAX's default in place, which gives one GPU to each task.
    """
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    return list(range(int(gpus))) if alone and gpus.isdigit() else None
