"""Several processes, one run: how they start, what one of them decides for all, and how they end together.

A run on one machine has one process and nothing here does anything. On several hosts each process runs the same
command and finds the others in one of two ways:

  by itself     where JAX knows the cluster and it announces several processes: Slurm (srun), Cloud TPU, GKE;
  by the flags  --coordinator_address=HOST:PORT --num_processes=N --process_id=I, in all N processes.

All share one workdir, a mounted folder. What depends on more than shared data (Is there a checkpoint? Is the
workdir free?) is decided by process 0 alone, see `first_decides`. No process is left hanging: one that fails says
so and the others leave with its exit code within seconds; one that dies without a word (kill -9, a lost host) is
missed after config.distributed.heartbeat_timeout, and JAX then aborts the others (SIGABRT, exit code 134).

Decisions travel through the key-value store of JAX's coordinator, not through devices: it is there before any
device is touched, and it can be waited for.
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
from jax._src.distributed import global_state  # the client of the coordinator: JAX has no public name for it

from llada_jax.cli import entry_point
from llada_jax.config import DistributedConfig, UserError

_LONG_MS = 24 * 3600 * 1000  # text may take hours to prepare; a process that fails ends the waiting anyway
_LOOK_SECONDS = 2.0  # between two looks at whether some process has failed
_TELL_SECONDS = 15.0  # of waiting at the start before it is told
_FAILED = "llada_jax/failed/"
_TPU_CLUSTERS = ("gcetpu", "gketpu")

ABORTED = 134  # what JAX leaves with when another process has died: worth another start

_uses: collections.Counter = collections.Counter()
_leaving = threading.Lock()  # taken by the thread that ends this process, never released


def count() -> int:
    """Processes of this run. Unlike jax.process_count it touches no device."""
    return global_state.num_processes if global_state.client else 1


def index() -> int:
    """Which of them this is, from 0. Unlike jax.process_index it touches no device."""
    return global_state.process_id if global_state.client else 0


def log(message: str) -> None:
    """A line to stderr, from process 0 only."""
    if index() == 0:
        print(message, file=sys.stderr, flush=True)


def first_decides(what: str, decide: Callable[[], Any]) -> Any:
    """What `decide` returns in process 0, in every process; it is not called in the others.

    All processes must come here in the same order. If process 0 fails, `run` ends the others.

    Args:
      what: names it, for whoever looks into a hanging run.
      decide: returns something JSON can hold; lists come out as lists, tuples too.
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
    """UserError unless `mine`, which JSON can hold, is the same in this process as in process 0.

    Args:
      what: names it.
      mine: to be compared.
      explain: the message, given what process 0 has.
    """
    if count() == 1:
        return
    first = first_decides(what, lambda: mine)
    if json.dumps(first) != json.dumps(mine):
        raise UserError(f"process {index()} (of {count()}): {explain(first)}")


def first_problem(what: str, problem: str | None) -> str | None:
    """The problem of the lowest process that has one, in every process; None if none has. Waits for all."""
    if count() == 1:
        return problem
    key = _key(what)
    if problem is not None:
        where = problem if index() == 0 else f"process {index()}: {problem}"
        global_state.client.key_value_set(f"{key}/{index():08}", where)
    global_state.client.wait_at_barrier(key, _LONG_MS)
    return next((text for _, text in sorted(global_state.client.key_value_dir_get(key + "/"))), None)


def barrier(what: str) -> None:
    """Until all processes are here."""
    if count() > 1:
        global_state.client.wait_at_barrier(_key(what), _LONG_MS)


def _key(what: str) -> str:
    _uses[what] += 1
    return f"llada_jax/{what}/{_uses[what]}"


def announce(code: int) -> bool:
    """Says that this process fails with this exit code; True if no other was first, whose message is then enough."""
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
    """Finds the other processes, if there are any, calls `main` and brings all of them to one end.

    Returns:
      The exit code of `main`, if it is one of success in all of them (or there is just one process). Otherwise it does
      not return: all processes leave with the exit code of the first that failed, and one message.

    Raises:
      UserError: the three arguments do not fit together.
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
    """The exit code of `main`, and whether it raised something, which is then told."""
    try:
        return main(), False
    except UserError as error:
        if announce(entry_point.USER_ERROR):
            entry_point.print_error(str(error))
        return entry_point.USER_ERROR, True
    except KeyboardInterrupt:
        return entry_point.INTERRUPTED, True
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else entry_point.FAILURE, True
    except BaseException:
        if not _leaving.locked():  # else it comes of the end of the others
            print(f"process {index()} (of {count()}):\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return entry_point.FAILURE, True


def _watch(finished: threading.Event, settings: DistributedConfig) -> None:
    """Leaves when another process has failed: the main thread may be waiting for it for ever."""
    while not finished.wait(_LOOK_SECONDS):
        try:
            if global_state.client.key_value_dir_get(_FAILED):
                _leave(settings)
        except jax.errors.JaxRuntimeError:
            return  # the coordinator is gone: JAX itself ends this process


def _leave(settings: DistributedConfig) -> NoReturn:
    """Ends this process with the exit code that was announced, once all are about to; without any clean-up.

    A clean-up would wait for the others: files of a checkpoint, collectives. What is half-written is what a kill
    leaves behind, and is found and removed at the next start.
    """
    with _leaving:
        code = ABORTED
        try:
            code = int(global_state.client.key_value_dir_get(_FAILED)[0][1])
            global_state.client.wait_at_barrier("llada_jax/leaving", settings.shutdown_timeout * 1000)
        except (jax.errors.JaxRuntimeError, IndexError):
            # Some process is dead or stuck, and our failure most likely comes of that: nothing to give up for.
            code = ABORTED if code == entry_point.FAILURE else code
        if index() == 0:
            time.sleep(0.5)  # the coordinator lives here: it goes last, or JAX aborts the others
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
    # Started by the first step, see preemption.py: until then SIGTERM ends a process at once.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX waits without a word, and aborts (134) when the time is over.
    late = f"waiting for the other processes at {where}, {settings.initialization_timeout} seconds at most"
    waiting = threading.Timer(_TELL_SECONDS, lambda: print(late, file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    jax.distributed.initialize(*flags, **options, **timeouts)
    waiting.cancel()


def _check_flags(address: str | None, processes: int | None, process: int | None) -> str:
    """The address. UserError unless the three flags fit together."""
    if address is None or processes is None or process is None:
        raise UserError("--coordinator_address=HOST:PORT, --num_processes and --process_id belong together: give all")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator_address={address}: HOST:PORT is needed, where process 0 will listen")
    if processes < 1:
        raise UserError(f"--num_processes={processes}: at least one is needed")
    if not 0 <= process < processes:
        raise UserError(f"--process_id={process}: with --num_processes={processes} it is 0 to {processes - 1}")
    return address


def _cluster() -> type[clusters.ClusterEnv] | None:
    """The cluster around this process as JAX recognises it, if it announces several processes."""
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method or not _may_ask(kind):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kind.is_env_present():
                    return kind if kind.get_process_count() > 1 else None
        except (ImportError, OSError):
            pass  # a TPU machine without the metadata server that would know of others, or without a way to ask it
    return None


def _may_ask(kind: type[clusters.ClusterEnv]) -> bool:
    if kind.name in _TPU_CLUSTERS:  # not for a process that was told to leave the TPU alone
        return os.environ.get("JAX_PLATFORMS", "tpu") != "cpu"
    # Any pod would do for JAX, a notebook's too; it then asks Kubernetes, which may refuse to answer.
    return kind.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ


def _slurm_devices() -> list[int] | None:
    """All GPUs of the node for a Slurm task that has the node to itself; None = one each, as JAX does it."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    return list(range(int(gpus))) if alone and gpus.isdigit() else None
