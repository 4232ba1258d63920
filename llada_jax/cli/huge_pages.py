"""Lets the allocator ask for huge pages, with which a train step of a small model on a CPU takes less time.

XLA allocates the temporary memory of each step anew. With pages of 4 kB, the kernel has to map some 20,000 of them in
every step. The C library reads the variable that asks for huge pages only when a process starts.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # such as "always [madvise] never"


def restart() -> None:
    """Replaces this process by one with the same command and huge pages, if it does not have them yet and can.

    It says so in one line on stderr. The process keeps its id, its files and its working folder. Nothing happens where
    GLIBC_TUNABLES is set (to anything, even to nothing), JAX_PLATFORMS names an accelerator, the system gives huge
    pages anyway or never, or the C library is not glibc 2.35 or newer.
    """
    if not _helps(os.environ):
        return
    message = f"starting again with {VARIABLE}={HUGE_PAGES}, for speed (a value that you set is kept)"
    print(message, file=sys.stderr, flush=True)
    # The name of the program must be its path: found by name, it could be the Python of another environment.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {VARIABLE: HUGE_PAGES})


def _helps(environment: Mapping[str, str]) -> bool:
    """Returns whether a new start of this process would give it huge pages that it does not have."""
    if VARIABLE in environment or environment.get("JAX_PLATFORMS", "") not in ("", "cpu"):
        return False
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return name == "glibc" and _numbers(version) >= (2, 35) and "[madvise]" in KERNEL.read_text()
    except (OSError, ValueError, AttributeError):  # not Linux, or another C library
        return False


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
