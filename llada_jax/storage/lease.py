"""One owner at a time for a folder of a bucket, by a lease: an object that the owner rewrites every few seconds.

The object is created, renewed and taken over by conditional writes, so of several processes exactly one succeeds. An
owner that dies leaves the object behind; who finds it waits until it was not renewed for SECONDS, and takes it over. An
owner that was only slow notices that at its next renewal, and must stop. If the owner was the only process of its run,
the lease names it, and who finds the lease on the same machine, in the same container and since the same boot, does not
wait if there is no such process any more. (Two copies of one snapshot of a machine would be taken for the same.)

The age of a lease is measured with the clock of the process that finds it. Clocks that differ by more than
SECONDS - RENEWAL_SECONDS could make it take over the lease of a living owner, which then stops.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llada_jax.config import UserError
from llada_jax.storage import addresses, objects

SECONDS = 60.0  # a lease that was not renewed for so long may be taken over
RENEWAL_SECONDS = 10.0  # interval between two renewals


class LeaseLost(Exception):
    """Raised in a process that owned a lease which another process has taken over."""


class Lease:
    """The lease of this process, which a thread renews until `release`."""

    def __init__(self, path: str | os.PathLike, used: str, report: Callable[[str], None], alone: bool = True):
        """Takes the lease, after waiting for at most SECONDS if its last owner may be alive.

        Args:
          path: The address of the object.
          used: What error messages call the owned folder, such as "--workdir=gs://b/run".
          report: A function that is called with one line of text if there is something to wait for.
          alone: Whether the run has no other process. If it has, they may write for a while after this one has died.

        Raises:
          UserError: If another process owns the lease and is alive, if the object cannot be written, or if the storage
            does not keep to the conditions of a write.
        """
        self.mark = f"{platform.node()} {os.getpid()} {time.time_ns()}"
        self._path, self._used, self._alone = path, used, alone
        self._renewals = 0
        self._lost = False
        self._lock, self._end = threading.Lock(), threading.Event()
        generation = objects.write_if(path, self._content(), self._free(report))
        if generation is None:  # another process was faster
            raise UserError(f"{used} is in use by another process")
        self._generation, self._renewed = generation, time.monotonic()
        self._require_conditions()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _require_conditions(self) -> None:
        """Raises UserError if the storage creates an object that is there already. gs:// never does."""
        if addresses.parse(self._path).kind != "s3":
            return
        _, absent = objects.read_with_generation(f"{self._path}.absent")
        if objects.write_if(self._path, self._content(), absent) is not None:
            objects.delete(self._path)
            raise UserError(
                f"{self._used}: this storage does not keep conditional writes (If-None-Match), so nothing would "
                "protect the run from a second process"
            )

    def _free(self, report: Callable[[str], None]) -> bytes:
        """Returns the generation of a lease that nobody owns any more. Raises UserError if its owner is alive."""
        content, first = objects.read_with_generation(self._path)
        if content is None or _dead(content):
            return first
        owner, renewed = _owner(content)
        until = time.monotonic() + min(SECONDS, max(0.0, renewed + SECONDS - time.time()))
        if time.monotonic() < until:
            seconds = until - time.monotonic()
            report(f"{self._used} was in use by {owner}: waiting for at most {seconds:.0f} s whether it still is")
        while time.monotonic() < until:
            time.sleep(min(1.0, RENEWAL_SECONDS / 4))
            content, generation = objects.read_with_generation(self._path)
            if content is None:
                return generation  # its owner has ended
            if generation != first:
                raise UserError(f"{self._used} is in use by another process")
        return first

    def _content(self) -> bytes:
        self._renewals += 1
        record = {"owner": self.mark, "time": time.time(), "renewals": self._renewals}
        if self._alone:
            record |= {"processes": _processes(), "pid": os.getpid()}
        return json.dumps(record).encode()

    def _keep(self) -> None:
        while not self._end.wait(RENEWAL_SECONDS) and not self._lost:
            # A storage that fails is asked again: as long as nobody else takes the lease over, it stays ours.
            with contextlib.suppress(Exception):
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            if not self._lost:
                generation = objects.write_if(self._path, self._content(), self._generation)
                if generation is None:
                    self._lost = True
                else:
                    self._generation, self._renewed = generation, time.monotonic()

    def confirm(self) -> None:
        """Checks as `check`, and asks the bucket if the last renewal is long ago. Call this before anything is written.

        Raises:
          LeaseLost: If another process owns the lease now.
          StorageFailed: If the bucket does not answer.
        """
        if time.monotonic() - self._renewed > SECONDS / 2:
            self._renew()
        self.check()

    def check(self) -> None:
        """Raises LeaseLost if the last renewal has found that another process owns the lease. This takes no time."""
        if self._lost:
            raise LeaseLost(
                f"{self._used} was taken over by another process, because this one could not renew its lease for "
                f"{SECONDS:.0f} s"
            )

    def release(self) -> None:
        """Gives the lease back, so that the next owner need not wait."""
        self._end.set()
        self._thread.join(RENEWAL_SECONDS)
        if not self._lost:
            with contextlib.suppress(Exception):  # then the next owner waits
                objects.delete(self._path, self._generation)


def _owner(content: bytes) -> tuple[str, float]:
    """Returns the mark of the owner that a lease names, and the time of its last renewal."""
    try:
        record = json.loads(content)
        return str(record["owner"]), float(record["time"])
    except (ValueError, KeyError, TypeError):
        return "another program", time.time()


def _processes() -> str:
    """Returns what names the process ids of this machine or container since it was started; "" if that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _dead(content: bytes) -> bool:
    """Returns whether the owner that a lease names was a process of this machine, and has ended."""
    try:
        record, here = json.loads(content), _processes()
        if not here or record["processes"] != here:
            return False
        os.kill(int(record["pid"]), 0)  # this sends nothing
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return False


def mark_of(path: str | os.PathLike) -> str | None:
    """Returns the mark of the process that owns the lease, or None if nobody does."""
    content, _ = objects.read_with_generation(path)
    return None if content is None else _owner(content)[0]
